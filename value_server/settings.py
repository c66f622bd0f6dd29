"""Settings of the value server: flags of `lenvm serve`, or LENVM_SERVER_* in the environment."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from value_server.contract.tokens import checked, read_tokens

# The plugin reads the same ones.
TOKEN_VARIABLE = "LENVM_TOKEN"
TOKEN_FILE_VARIABLE = "LENVM_TOKEN_FILE"


class ServerSettings(BaseSettings):
    """Frozen; an unknown field is an error."""

    model_config = SettingsConfigDict(env_prefix="LENVM_SERVER_", frozen=True, extra="forbid")

    base_model: str | None = Field(
        default=None,
        description="Where the backbone lies, of each model, if not where CHECKPOINT says.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8100, ge=0, le=65535, description="TCP port.")
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port that shows /metrics, and nothing else, without a token.",
    )
    uds: Path | None = Field(default=None, description="Unix socket to listen on instead.")
    device: str = Field(default="auto", description="Device of the model; auto: cuda if there.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="Type of the backbone; auto: what is fast on the device. The head is float32.",
    )
    compile: bool = Field(
        default=False,
        description="MLPs and norms through torch.compile: meant for GPUs; slower on a CPU.",
    )
    graphs: bool = Field(
        default=True,
        description="On a GPU, passes as CUDA graphs; not with --compile.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a forward pass; by default torch's."
    )
    slots: int = Field(
        default=65536,
        ge=64,
        description="Tokens and candidates whose keys and values fit, all sessions together; of "
        "several models each has an even share.",
    )
    max_sessions: int = Field(
        default=512,
        ge=1,
        description="Sessions held at once; idle ones go first, newcomers wait.",
    )
    max_candidates: int = Field(
        default=64, ge=1, description="Candidates of one session in one step."
    )
    session_ttl: float = Field(
        default=600.0,
        gt=0,
        description="Seconds after which an unused session or closed text is dropped.",
    )
    pass_tokens: int = Field(default=2048, ge=16, description="Most tokens in one forward pass.")
    prefill_tokens: int = Field(
        default=512, ge=16, description="Of --pass-tokens, the most for long prompts."
    )
    max_waiting: int = Field(
        default=1024,
        ge=1,
        description="Unfinished requests, beyond which steps have no values, others a 503.",
    )
    drain_s: float = Field(
        default=1.0,
        ge=0,
        description="Least seconds after SIGTERM in which new requests get a 503.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log format; json: one object per line."
    )
    max_body_bytes: int = Field(
        default=16 << 20,
        ge=1024,
        description="Size of a request, beyond which the server answers 413.",
    )
    picture_bytes: int = Field(
        default=1 << 30,
        ge=1 << 20,
        description="Memory for what the model has seen of pictures, in bytes; of several models "
        "each has as much.",
    )
    picture_pixels: int = Field(
        default=1 << 25,
        ge=1,
        description="Size of a picture, width times height, beyond which it is refused.",
    )
    client_sessions: int | None = Field(
        default=None,
        ge=1,
        description="Sessions in use of one client (token or address); more of its own wait.",
    )
    client_slots: int | None = Field(
        default=None,
        ge=64,
        description="Tokens and candidates of one client in use, shared ones counted for each.",
    )
    token: SecretStr | None = Field(
        default=None,
        description="Bearer token that clients must send; better given through LENVM_TOKEN.",
    )
    token_file: Path | None = Field(
        default=None,
        description="File of bearer tokens, a line each, one for a client; or LENVM_TOKEN_FILE.",
    )
    tls_cert: Path | None = Field(
        default=None, description="PEM file of the certificate; with --tls-key, https only."
    )
    tls_key: Path | None = Field(default=None, description="PEM file of its private key.")

    @model_validator(mode="after")
    def _cert_and_key(self) -> "ServerSettings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: give both or none")
        return self

    @model_validator(mode="after")
    def _two_ports(self) -> "ServerSettings":
        if self.metrics_port and self.metrics_port == self.port and self.uds is None:
            raise ValueError(f"metrics_port: {self.metrics_port}, must be another than port")
        return self

    @property
    def tokens(self) -> list[str]:
        """Of clients; none at all where everybody may ask.

        Raises OSError for a file that cannot be read, ValueError for one without a token and for a
        token that no header can have.
        """
        file = self.token_file or os.environ.get(TOKEN_FILE_VARIABLE)
        if file is not None:
            return read_tokens(file)
        given = self.token.get_secret_value() if self.token else os.environ.get(TOKEN_VARIABLE)
        return [checked(given)] if given else []
