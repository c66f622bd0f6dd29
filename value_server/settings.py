"""Settings of the value server: flags of `lenvm serve`, or LENVM_SERVER_* in the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServerSettings(BaseSettings):
    """Frozen; an unknown field is an error."""

    model_config = SettingsConfigDict(env_prefix="LENVM_SERVER_", frozen=True, extra="forbid")

    base_model: str | None = Field(
        default=None, description="Where the backbone lies, if not where CHECKPOINT says."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8100, ge=0, le=65535, description="TCP port.")
    uds: Path | None = Field(default=None, description="Unix socket to listen on instead.")
    device: str = Field(default="auto", description="Of the model; auto is cuda if there is one.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="Of the backbone; auto is what the device is fast at. The head is float32.",
    )
    compile: bool = Field(
        default=False,
        description="MLPs and norms through torch.compile: meant for GPUs; slower on a CPU.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a forward pass; by default torch's."
    )
    slots: int = Field(
        default=65536,
        ge=64,
        description="Tokens and candidates whose keys and values fit, all sessions together.",
    )
    max_sessions: int = Field(
        default=512,
        ge=1,
        description="Sessions held at once; the least recently used idle one goes first.",
    )
    max_candidates: int = Field(
        default=64, ge=1, description="Candidates of one session in one step."
    )
    session_ttl: float = Field(
        default=600.0, gt=0, description="Seconds after which an unused session is dropped."
    )
    pass_tokens: int = Field(default=2048, ge=16, description="Tokens in one forward pass at most.")
    prefill_tokens: int = Field(default=512, ge=16, description="Of these, tokens of long prompts.")
    max_waiting: int = Field(
        default=1024, ge=1, description="Unfinished requests, beyond which the server answers 503."
    )
    max_body_bytes: int = Field(
        default=16 << 20,
        ge=1024,
        description="Size of a request, beyond which the server answers 413.",
    )
    token: SecretStr | None = Field(
        default=None,
        description="Bearer token that clients must send; better given through LENVM_TOKEN.",
    )
