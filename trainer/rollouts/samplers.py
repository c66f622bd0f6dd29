"""Who samples: vLLM in this process, or a server of the OpenAI API. Token ids are kept exactly."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import httpx
import torch
from cyclopts import Parameter

from trainer.checks import check, check_positive
from trainer.rollout_files import TokenizerOf
from trainer.rollouts.prompts import Prompt
from value_server.contract.checkpoint import tokenizer_fingerprint
from value_server.model.value_model import default_dtype

ATTEMPTS = 4
TIMEOUT = httpx.Timeout(30, read=3600)
Chat = list[dict[str, Any]]
# In vLLM's refusals: of a server, the second where the prompt leaves room for no token; offline, of
# the text and of the whole.
TOO_LONG = ("maximum context length", "max_tokens must be at least 1")
LONGER = ("maximum context length", "maximum model length")
# vLLM's server would take these from the model's generation_config.json.
NO_DEFAULTS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is drawn: by default from the model's own distribution."""

    n: int = 2
    """Completions per prompt."""
    max_tokens: int = 1024
    """Cuts a completion; training drops it or takes it as a lower bound."""
    temperature: float = 1.0
    """Temperature of the sampling whose lengths are to be learnt."""
    top_p: float = 1.0
    """top_p of the same sampling."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_positive(n=self.n, max_tokens=self.max_tokens)
        check(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Sampled:
    """prompt_ids: (P,). completions: of each the ids with end-of-sequence, and finish_reason."""

    prompt_ids: list[int]
    completions: list[tuple[list[int], str]]


class Sampler(Protocol):
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled | None]:
        """Completions of each prompt; None where it is too long."""

    def tokenizer(self) -> TokenizerOf | None:
        """Whose ids these are; None where nobody tells."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Engine:
    """Who samples: a server, or vLLM in this process."""

    server: str | None = None
    """URL of an OpenAI API that returns token ids, with its /v1, to sample from; by default vLLM
    is loaded. Its key comes from OPENAI_API_KEY."""
    tokenizer: str | None = None
    """Hub name or folder of the server's tokenizer, to be told in the files; by default where the
    server says that its model lies."""
    concurrency: int = 64
    """Requests that are open at a server at once."""
    max_model_len: int | None = None
    """Tokens of prompt and completion that vLLM makes room for; by default the model's own."""
    dtype: str = "auto"
    """Type of the model's weights, by vLLM's names; auto is the model's own, and float32 on a CPU
    that has no instructions for bfloat16."""
    seed: int = 0
    """Seed of the sampling in vLLM."""
    engine_arg: tuple[str, ...] = ()
    """Any other argument of vLLM's LLM class as name=value, the value JSON or else a text, as
    tensor_parallel_size=2 or quantization=fp8."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_positive(concurrency=self.concurrency)
        url = self.server is None or self.server.startswith(("http://", "https://"))
        check(url, "server", self.server, "a URL, as http://127.0.0.1:8000/v1")
        alone = not (self.server and self.engine_arg)
        check(alone, "engine_arg", [*self.engine_arg], "left out with a server, which has its own")
        self.engine_arguments()

    def engine_arguments(self) -> dict[str, Any]:
        """What vLLM's LLM class is given, but the model. Raises ValueError naming what is wrong."""
        dtype = "float32" if self.dtype == "auto" and not has_bfloat16() else self.dtype
        given: dict[str, Any] = {
            "max_model_len": self.max_model_len, "dtype": dtype, "seed": self.seed
        }  # fmt: skip
        own = {"model", *given}
        for argument in self.engine_arg:
            name, equals, value = argument.partition("=")
            name = name.strip().replace("-", "_")
            fits = bool(equals and name.isidentifier() and name not in own)
            rule = f"name=value, once, and of a name beside {', '.join(sorted(own))}"
            check(fits and name not in given, "engine_arg", argument, rule)
            try:
                given[name] = json.loads(value)
            except json.JSONDecodeError:
                given[name] = value
        return given

    def sampler(self, model: str) -> Sampler:
        """Ready to sample."""
        if self.server:
            key = os.environ.get("OPENAI_API_KEY", "none")
            return ServerSampler(
                self.server,
                model,
                api_key=key,
                concurrency=self.concurrency,
                source=self.tokenizer,
            )
        return OfflineSampler(model=model, **self.engine_arguments())


def has_bfloat16() -> bool:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return default_dtype(device) == torch.bfloat16


class OfflineSampler:
    """vLLM's offline class; `options` are its own."""

    def __init__(self, **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(**options)
        self.model = str(options["model"])

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled | None]:
        from vllm import SamplingParams

        chats = [prompt.messages() for prompt in prompts]
        fits = [self._fits(*own) for own in zip(prompts, chats, strict=True)]
        fitting = [chat for chat, fit in zip(chats, fits, strict=True) if fit]
        params = SamplingParams(**asdict(sampling))
        sampled = iter(self._sample(fitting, params))
        return [next(sampled) if fit else None for fit in fits]

    def _sample(self, chats: list[Chat], params: Any) -> list[Sampled | None]:
        """All at once; one by one where one with pictures proves too long."""
        try:
            outputs = self.llm.chat(chats, params, use_tqdm=False) if chats else []
        except Exception as error:  # vLLM has a class of its own for it, and had others
            too_long = any(told in str(error) for told in LONGER)
            if not too_long or not any(map(_has_pictures, chats)):
                raise
            if len(chats) == 1:
                return [None]
            return [one for chat in chats for one in self._sample([chat], params)]
        return [
            Sampled(
                list(output.prompt_token_ids),
                [(list(c.token_ids), c.finish_reason) for c in output.outputs],
            )
            for output in outputs
        ]

    def tokenizer(self) -> TokenizerOf:
        return TokenizerOf(self.model, tokenizer_fingerprint(self.llm.get_tokenizer()))

    def _fits(self, prompt: Prompt, chat: Chat) -> bool:
        """Whether the prompt leaves room for a token; vLLM would refuse all of its shard. Of a
        prompt with pictures only vLLM knows the length."""
        if _has_pictures(chat):
            return True
        tokenizer = self.llm.get_tokenizer()
        try:
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates raise what they like
            what = f"the chat template of {self.model} refuses it"
            raise ValueError(f"prompt {prompt.id}: {what}: {error}") from error
        return len(ids["input_ids"]) < int(self.llm.model_config.max_model_len)


def _has_pictures(chat: Chat) -> bool:
    return any(part["type"] == "image_url" for m in chat for part in _parts(m["content"]))


def _parts(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else []


class ServerSampler:
    """`POST {url}/chat/completions` of a server that returns token ids, as vLLM's does.

    At most `concurrency` requests are open at once. A request that fails for a passing reason is
    repeated, which takes a minute at most. Raises ValueError for an answer without token ids.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str = "none",
        concurrency: int = 64,
        source: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.client = httpx.Client(
            base_url=url.rstrip("/"),
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=concurrency),
            transport=transport,
        )
        self.model = model
        self.concurrency = concurrency
        self.source = source
        self.pause = 3.0

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled | None]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda prompt: self._one(prompt, sampling), prompts))

    def tokenizer(self) -> TokenizerOf | None:
        """That of `source`, or of where the server's model lies, if that can be read here.

        Raises ValueError where `source` holds none.
        """
        try:
            return TokenizerOf.load(self.source or self._root())
        except (OSError, ValueError, LookupError, httpx.HTTPError) as error:
            if self.source:
                raise ValueError(f"tokenizer: {self.source!r} does not load: {error}") from error
            return None

    def _root(self) -> str:
        """What vLLM was started with."""
        models = self.client.get("/models").raise_for_status().json()["data"]
        return {str(own["id"]): str(own["root"]) for own in models if own.get("root")}[self.model]

    def _one(self, prompt: Prompt, sampling: Sampling) -> Sampled | None:
        body = {
            "model": self.model,
            "messages": prompt.messages(),
            "return_token_ids": True,
            **NO_DEFAULTS,
            **asdict(sampling),
        }
        answer = self._post(body)
        if answer is None:
            return None
        prompt_ids = answer.get("prompt_token_ids")
        completions = [(c.get("token_ids"), c["finish_reason"]) for c in answer["choices"]]
        if not prompt_ids or any(not ids for ids, _ in completions):
            raise ValueError(
                f"server: {self.client.base_url} answers without token ids; it has to know "
                "return_token_ids, as vLLM does"
            )
        return Sampled(prompt_ids, completions)

    def _post(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None where the prompt is too long."""
        for attempt in range(ATTEMPTS):
            last = attempt + 1 == ATTEMPTS
            try:
                answer = self.client.post("/chat/completions", json=body)
            except httpx.TransportError as error:
                if last:
                    raise ValueError(f"server: {self.client.base_url}: {error!r}") from error
            else:
                if answer.is_success:
                    return dict(answer.json())
                if answer.status_code == 400 and any(told in answer.text for told in TOO_LONG):
                    return None
                passing = answer.status_code >= 500 or answer.status_code == 429
                if last or not passing:
                    raise ValueError(
                        f"server: {self.client.base_url}: {answer.status_code} {answer.text[:500]}"
                    )
            time.sleep(self.pause * 2**attempt)
        raise AssertionError("unreachable")
