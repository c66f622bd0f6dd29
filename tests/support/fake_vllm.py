"""A vLLM made by hand: it answers a prompt with its own bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.support.training import grouped
from trainer.rollouts import rollout as command
from trainer.rollouts.prompts import Selection
from trainer.rollouts.samplers import Engine, Sampling


def rollout(prompts: Path, output: Path, **options: Any) -> None:
    kinds = {"selection": Selection, "sampling": Sampling, "engine": Engine}
    command.rollout(prompts, output, **grouped(options, **kinds))


@dataclass
class Completion:
    token_ids: Sequence[int]
    finish_reason: str


@dataclass
class Output:
    prompt_token_ids: list[int]
    outputs: list[Completion]


@dataclass
class FakeVllm(ModuleType):
    """Completion k of a prompt repeats its bytes and ends with k; one of over 5 tokens is cut.

    chats: the texts of every call. After `calls_left` calls the next one fails.
    """

    models: list[dict[str, Any]] = field(default_factory=list)
    samplings: list[dict[str, Any]] = field(default_factory=list)
    chats: list[list[str]] = field(default_factory=list)
    systems: list[str] = field(default_factory=list)
    calls_left: int = 1000

    def LLM(self, **options: Any) -> "FakeVllm":  # noqa: N802
        self.models.append(options)
        return self

    def SamplingParams(self, **options: Any) -> dict[str, Any]:  # noqa: N802
        self.samplings.append(options)
        return options

    @property
    def model_config(self) -> SimpleNamespace:
        return SimpleNamespace(max_model_len=self.models[-1]["max_model_len"] or 1000)

    def get_tokenizer(self) -> "FakeVllm":
        return self

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def apply_chat_template(self, chat: list[dict[str, str]], **_options: bool) -> dict[str, Any]:
        return {"input_ids": [1, *chat[0]["content"].encode(), 2]}

    def chat(
        self, chats: list[list[dict[str, str]]], sampling: dict[str, Any], use_tqdm: bool
    ) -> list[Output]:
        if self.calls_left == 0:
            raise KilledError
        self.calls_left -= 1
        assert all([m["role"] for m in chat][-1:] == ["user"] for chat in chats)
        self.systems += [m["content"] for chat in chats for m in chat if m["role"] == "system"]
        texts = [chat[-1]["content"] for chat in chats]
        self.chats.append(texts)
        return [
            Output([1, *text.encode(), 2], [answer(text, k) for k in range(sampling["n"])])
            for text in texts
        ]


def answer(text: str, k: int) -> Completion:
    ids = (*text.encode(), k)  # vLLM gives a tuple or its own sequence
    return Completion(ids, "stop" if len(ids) <= 5 else "length")


class KilledError(Exception):
    pass
