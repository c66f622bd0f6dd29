"""Settings of the plugin, one for the whole vLLM process."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lenvm_vllm.steering import constants
from value_server.contract.tokens import checked, read_tokens

_UNIX = "unix:"


def _listed(urls: Any) -> Any:
    """One URL, several with commas between them, a JSON list or a list."""
    if not isinstance(urls, str):
        return urls
    if urls.lstrip().startswith("["):
        return json.loads(urls)
    return [url.strip() for url in urls.split(",")]


def _checked(urls: tuple[str, ...]) -> tuple[str, ...]:
    if not urls:
        raise ValueError("no server is named")
    for url in urls:
        if not _is_place(url):
            raise ValueError(f"expected http://host:port, https://… or unix:/path, got {url!r}")
    if len(set(urls)) < len(urls):
        raise ValueError(f"a server is named twice in {', '.join(urls)}")
    return urls


def _is_place(url: str) -> bool:
    if url.startswith(_UNIX):
        return bool(url.removeprefix(_UNIX).partition(":/")[0])
    try:
        read = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return read.scheme in ("http", "https") and bool(read.host) and (read.port or 1) < 65536


Urls = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_checked)]


class Settings(BaseSettings):
    """Read from LENVM_<NAME> in the environment; `--additional-config '{"lenvm": {...}}'` wins.

    url: of the value server, http://host:port or unix:/path/to/socket, with /models/NAME behind
        it where it has several models (unix:/path/to/socket:/models/NAME); several replicas with
        commas between them, or as a JSON list.
    adapters: the same for LoRA adapters that have value models of their own, by their names; the
        texts of all others have the values of `url`.
    token, token_file: bearer token, or the file that holds it, if the server asks for one.
    tls_ca: PEM file of the authority that signs the certificates of https:// servers.
    wait_share: how long a step may wait for values, in times of what vLLM's own step takes. Texts
        that have none by then go on without. An answer that usually takes less is not waited for
        so long.
    wait_floor_s: seconds that a step waits at least.
    timeout_s: seconds after which a value server that does not answer counts as lost.
    max_kl: nats that one step of `project` may move the text, unless the request says.
    endings: that an answer with a length in tokens and guard rails may have at most, unless the
        request says.
    endings_at_once: rounds of them that may run at a time in an API server process.
    endings_patience: how long a request may look for other endings, in times of what its first
        answer took.
    endings_pause_s: seconds for which a stream may stop before its end for other endings; with 0
        here or as endings_patience nothing of a stream is held back, and it has one ending.
    top_k, top_p: candidate cut of a request with a token target that sets none itself.
    tilt_min_p: candidate cut of a tilt that sets none itself.
    thinking_end_ids: tokens of the marker that ends a thinking, in their order, for the scopes
        thinking and answer; without, that of vLLM's reasoning parser.
    forecast: predict the length of each answer before it is written, for the response header
        and, under `--scheduling-policy priority`, for the queue.
    aging: tokens a second by which the queue prefers what came earlier.
    playground: serve the page for trying lengths by hand, at /lenvm on vLLM's own port.
    scoring: "exact" is by a row of the value model for each candidate; "auto" by one a text where
        the model has a lookahead head, else exact; "landing" as auto, but exact in the landing.
    max_pictures, max_picture_bytes, max_picture_pixels: of one guided request, and of each of its
        pictures, that a value model is shown; a request with more goes without values.
    max_candidates: candidates per request and step at most.
    scored_mass, max_scored: the most probable candidates, up to this share of their probability
        together and to this number, are scored; the others count with their mean. The policy
        greedy scores all. With lookahead all have values.
    """

    model_config = SettingsConfigDict(env_prefix="LENVM_", frozen=True, extra="forbid")

    url: Urls = ("http://127.0.0.1:8100",)
    adapters: dict[Annotated[str, Field(min_length=1)], Urls] = {}
    token: SecretStr | None = None
    token_file: Path | None = None
    tls_ca: Path | None = None
    wait_share: float = Field(2.0, ge=0)
    wait_floor_s: float = Field(0.01, ge=0)
    timeout_s: float = Field(2.0, gt=0, allow_inf_nan=False)
    max_kl: float = Field(constants.MAX_KL, ge=0)
    endings: int = Field(8, ge=1, le=64)
    endings_at_once: int = Field(4, ge=1)
    endings_patience: float = Field(1.0, ge=0)
    endings_pause_s: float = Field(1.2, ge=0)
    top_k: int = Field(constants.TOP_K, ge=1)
    top_p: float = Field(constants.TOP_P, gt=0, le=1)
    tilt_min_p: float = Field(constants.TILT_MIN_P, ge=0, le=1)
    thinking_end_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    forecast: bool = False
    aging: float = Field(10.0, ge=0, allow_inf_nan=False)
    playground: bool = False
    scoring: Literal["auto", "landing", "exact"] = "auto"
    max_pictures: int = Field(8, ge=0)
    max_picture_bytes: int = Field(16 << 20, ge=1)
    max_picture_pixels: int = Field(1 << 25, ge=1)
    max_candidates: int = Field(constants.MAX_CANDIDATES, ge=1)
    scored_mass: float = Field(constants.SCORED_MASS, gt=0, le=1)
    max_scored: int = Field(constants.MAX_SCORED, ge=2)

    @property
    def servers(self) -> list[str]:
        """URLs of all value servers, each once."""
        urls = [self.url, *self.adapters.values()]
        return list(dict.fromkeys(url for each in urls for url in each))

    @property
    def connection(self) -> dict[str, Any]:
        """Options of `endpoint.http_client`.

        Raises OSError or ValueError for a token_file that cannot be read or has not one token, and
        for a token that no header can have.
        """
        token = checked(self.token.get_secret_value()) if self.token else None
        if self.token_file is not None:
            token, *more = read_tokens(self.token_file)
            if more:  # it would be no header
                raise ValueError(f"token_file: {self.token_file}, must have one token for a client")
        return {"token": token, "timeout_s": self.timeout_s, "tls_ca": self.tls_ca}


def load_settings(additional_config: Any = None) -> Settings:
    """Environment and the `lenvm` block of vLLM's additional_config; its unknown keys are errors.

    Raises ValueError naming the key, or a block that has none.
    """
    block = additional_config.get("lenvm", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(block, Mapping):
        raise ValueError(f"additional_config.lenvm: {block!r}, must be an object of settings")
    return Settings(**block)
