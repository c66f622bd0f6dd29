"""The texts in a line of a log: each assistant turn of its conversation, redacted where wanted."""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.checks import check, check_choice
from trainer.rollouts.logs import Answer, Logged, bad

Messages = list[dict[str, Any]]
Redact = Callable[[Messages], Messages | None]
Which = Literal["all", "last"]


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer, and the messages before it. token_ids, prompt_ids: as sampled, or empty."""

    place: str
    domain: str
    messages: Messages
    answer: dict[str, Any] | None
    tools: list[dict[str, Any]] | None
    template_options: dict[str, Any]
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    finish_reason: str | None
    tokens: int | None = None

    @property
    def conversation(self) -> str:
        """The same for all turns of a conversation: of what is said until its user first spoke."""
        first = next((n for n, m in enumerate(self.messages) if m["role"] == "user"), None)
        return "" if first is None else key_of(self.messages[: first + 1])


@dataclass(slots=True)
class Turns:
    """Takes the turns out of lines, each once.

    A conversation is logged again with every request that goes on with it, so that most turns
    come as an answer and again as messages before other answers, maybe of other logs. told: the
    answers of all logs, which `note` gathers before any turn is taken. dropped, repeated: counts.
    """

    which: Which = "all"
    redact: Redact | None = None
    told: set[str] = field(default_factory=set)
    dropped: int = 0
    repeated: int = 0
    _answers: set[str] = field(default_factory=set)
    _before: set[str] = field(default_factory=set)

    def note(self, line: Logged) -> None:
        """The answers of a line: they are no turns where they come as messages. Raises as `of`."""
        for answer in line.answers:
            whole, _ = self._redacted(line, answer)
            if whole and answer.message:
                self.told.add(key_of(whole))

    def of(self, line: Logged) -> Iterator[Turn]:
        """Raises ValueError where there is nothing that could be redacted."""
        if not line.answers:
            yield from self._of(line, None)
        for answer in line.answers:
            if answer.key in self._answers:
                self.repeated += 1
                continue
            if answer.key:
                self._answers.add(answer.key)
            yield from self._of(line, answer)

    def _of(self, line: Logged, answer: Answer | None) -> Iterator[Turn]:
        whole, same = self._redacted(line, answer)
        if whole is None:
            self.dropped += 1
            return
        answered = answer is not None and answer.message is not None
        before, last = (whole[:-1], whole[-1]) if answered else (whole, None)
        common = (line.tools, line.template_options)
        if self.which == "all":
            for number, message in enumerate(before):
                if message["role"] == "assistant" and number and self._is_new(before[: number + 1]):
                    own = (before[:number], message)
                    yield Turn(line.place, line.domain, *own, *common, [], [], None)
        if answer:
            ids = (answer.prompt_ids, answer.token_ids)
            known = same and all(ids)
            reason, tokens = answer.finish_reason, answer.tokens if same else None
            exact = ids if known else ([], [])
            yield Turn(line.place, line.domain, before, last, *common, *exact, reason, tokens)

    def _redacted(self, line: Logged, answer: Answer | None) -> tuple[Messages | None, bool]:
        """What is left of a conversation, and whether it is as it was."""
        told = [answer.message] if answer and answer.message else []
        whole = [*line.messages, *told]
        if self.redact is None:
            return whole, True
        if not line.messages:
            raise bad(line.place, "messages", [], "there, to be redacted")
        if answer and not told:
            raise bad(line.place, "message", None, "there beside its ids, to be redacted")
        try:
            left = self.redact(deepcopy(whole))
        except Exception as error:
            raise ValueError(f"{line.place}: redact: {error!r}") from error
        if left is None:
            return None, False
        kept = bool(left) and isinstance(left, list) and all(map(_is_message, left))
        same_end = kept and left[-1]["role"] == whole[-1]["role"]
        check(same_end, f"{line.place}: redact", type(left), "messages with the same last role")
        return left, left == whole

    def _is_new(self, messages: Messages) -> bool:
        """Of a turn that is not the last: no log has it as an answer."""
        key = key_of(messages)
        if key in self.told or key in self._before:
            return False
        self._before.add(key)
        return True


def key_of(messages: Messages) -> str:
    """Of what is said; reasoning is not, as clients do not send it again."""
    plain = [
        [m["role"], m.get("content"), [call["function"] for call in m.get("tool_calls") or ()]]
        for m in messages
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


def _is_message(found: object) -> bool:
    names = ("role", "content")
    return isinstance(found, dict) and all(isinstance(found.get(name), str) for name in names)


def check_turns(which: str) -> None:
    """Raises ValueError naming the option."""
    check_choice("turns", which, get_args(Which))


def load_redact(name: str) -> Redact:
    """The function `module:function`; modules of the working directory are found.

    Raises ValueError where there is none.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"redact: {name!r}, must be module:function: {error}") from error
    check(callable(found), "redact", name, "module:function")
    hook: Redact = found
    return hook


def source_of(name: str) -> Path | None:
    """The file of a hook that was loaded; some modules have none."""
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return Path(file) if file else None
