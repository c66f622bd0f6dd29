"""Settings of the value server: flags of `lenvm serve`, or LENVM_SERVER_* in the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServerSettings(BaseSettings):
    """Frozen; an unknown field is an error.

    base_model: where the backbone lies, instead of the place that the checkpoint names.
    host, port: TCP address. uds: Unix socket to listen on instead.
    device: "auto" is cuda if there is one.
    dtype: of the backbone, "auto" is bfloat16 where the device is fast at it; the head is float32.
    threads: CPU threads of a forward pass; default is torch's.
    slots: tokens and candidates whose keys and values fit, all sessions together.
    max_sessions: sessions held at once; the least recently used idle one goes first.
    max_candidates: candidates of one session in one step.
    session_ttl: seconds after which an unused session is dropped.
    pass_tokens: tokens in one forward pass at most.
    prefill_tokens: of these, tokens of long prompts.
    max_waiting: requests in the queue, beyond which the server answers 503.
    max_body_bytes: size of a request, beyond which it answers 413.
    token: bearer token that clients must send; better through LENVM_TOKEN than as a flag.
    """

    model_config = SettingsConfigDict(env_prefix="LENVM_SERVER_", frozen=True, extra="forbid")

    base_model: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8100, ge=0, le=65535)
    uds: Path | None = None
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    slots: int = Field(default=65536, ge=64)
    max_sessions: int = Field(default=512, ge=1)
    max_candidates: int = Field(default=64, ge=1)
    session_ttl: float = Field(default=600.0, gt=0)
    pass_tokens: int = Field(default=2048, ge=16)
    prefill_tokens: int = Field(default=512, ge=16)
    max_waiting: int = Field(default=1024, ge=1)
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    token: SecretStr | None = None
