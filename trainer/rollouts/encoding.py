"""Turns as token ids: those that were sampled, or texts encoded as the served model reads them.

    prompt       the chat template of the messages before the turn, up to where the answer begins
    completion   the answer, and the token that ends it; a cut one has no end

An answer with reasoning or tool calls is what the template writes behind the prompt.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from trainer.rollout_files import ENGINE, TEXT, TokenizerOf
from trainer.rollouts.logs import CUT, ENDED, bad
from trainer.rollouts.turns import Messages, Turn
from value_server.contract.checkpoint import tokenizer_fingerprint

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Encoded:
    """exact: whether the ids give the logged text back, None where no text says; held: whether
    it is a part of what they give. tokens: what the server counted for a text that was encoded."""

    row: dict[str, Any]
    exact: bool | None
    held: bool
    tokens: int | None


class ChatEncoder:
    """Of the served model: a hub name or folder. template: another one than its own.

    Raises ValueError where there is no tokenizer or no template.
    """

    def __init__(self, model: str, template: str | None = None) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"model: {model!r} does not load: {error}") from error
        if template:
            self.tokenizer.chat_template = template
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"model: {model!r} has no chat template; chat_template gives one")
        self.whose = TokenizerOf(model, tokenizer_fingerprint(self.tokenizer))
        may = self._ends(model)
        self.end = self._end(model, may)
        ends = "|".join(re.escape(self.text([token])) for token in sorted(may))
        self._behind = re.compile(rf"(?:(?:{ends})\s*)+\Z")  # an answer, as the template writes it

    def _ends(self, model: str) -> set[int]:
        """The tokens that may end a text."""
        try:
            given = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:
            given = None
        ends = given if isinstance(given, list) else [given]
        known = range(len(self.tokenizer))
        return {end for end in [*ends, self.tokenizer.eos_token_id] if end in known}

    def _end(self, model: str, may: set[int]) -> int:
        """The token that ends an answer: the one of those that may which the template writes."""
        asked = [{"role": "user", "content": "a"}]
        answered = [*asked, {"role": "assistant", "content": "b"}]
        written = self.ids(self._text("model", answered, None, {}, answers=False))
        behind = written[len(self.ids(self._text("model", asked, None, {}, answers=False))) :]
        found = next((token for token in behind if token in may), self.tokenizer.eos_token_id)
        if found is None:
            raise ValueError(f"model: {model!r} has no token that ends a text")
        return int(found)

    def encode(self, turn: Turn) -> Encoded:
        """A row of SCHEMA. Raises ValueError naming the line where it cannot be one."""
        finished = turn.finish_reason not in CUT
        if turn.token_ids:
            prompt_ids, ids, source = [*turn.prompt_ids], [*turn.token_ids], ENGINE
            known = len(self.tokenizer)
            if (largest := max(*prompt_ids, *ids)) >= known:
                raise bad(turn.place, "token_ids", largest, f"below {known}, the tokens of MODEL")
            exact, held = self._reads(ids, turn.answer)
        else:
            prompt = self._text(turn.place, turn.messages, turn.tools, turn.template_options)
            text, own, end = self._completion(turn, prompt)
            prompt_ids, source = self.ids(prompt), TEXT
            exact = held = self.text(own) == text
            ids = [*own, end] if finished else own
        row = {
            "prompt_id": "",
            "domain": turn.domain,
            "prompt": next((m["content"] for m in turn.messages[::-1] if m["role"] == "user"), ""),
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "finish_reason": "stop" if turn.finish_reason in (None, *ENDED) else turn.finish_reason,
            "conversation": turn.conversation,
            "token_source": source,
        }
        return Encoded(row, exact, held, turn.tokens if source == TEXT else None)

    def ids(self, text: str, *, plain: bool = False) -> list[int]:
        """plain: names of special tokens in the text are no special tokens."""
        found: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=plain
        )["input_ids"]
        return found

    def text(self, ids: list[int], *, skip_special: bool = False) -> str:
        """What a server makes of these ids."""
        found: str = self.tokenizer.decode(
            ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return found

    def _completion(self, turn: Turn, prompt: str) -> tuple[str, list[int], int]:
        """The text of an answer and its ids, without the end, and the end."""
        assert turn.answer
        if not _is_more(turn.answer):
            text = turn.answer["content"]
            return text, self.ids(text, plain=True), self.end
        parts = (turn.tools, turn.template_options)
        whole = self._text(turn.place, [*turn.messages, turn.answer], *parts, answers=False)
        if not whole.startswith(prompt):
            more = "without reasoning and tool calls: the chat template writes it otherwise"
            raise bad(turn.place, "the answer", turn.answer, more)
        text = whole[len(prompt) :]
        found = self._behind.search(text)
        text, end = (text[: found.start()], self.ids(found[0])[0]) if found else (text, self.end)
        for name, part in _parts(turn.answer):
            if part not in text:
                raise bad(turn.place, name, part, "written by the chat template, which omits it")
        return text, self.ids(text), end

    def _reads(self, ids: list[int], answer: dict[str, Any] | None) -> tuple[bool | None, bool]:
        """exact, held of the logged answer and its ids; parsers take parts away."""
        if answer is None or _is_more(answer):
            return None, False
        text, logged = self.text(ids, skip_special=True), answer["content"]
        return text == logged, logged.strip() in text

    def _text(
        self,
        place: str,
        messages: Messages,
        tools: list[dict[str, Any]] | None,
        options: Options,
        *,
        answers: bool = True,
    ) -> str:
        """The template of messages, up to where the answer begins if one is asked for."""
        try:
            found: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=answers, tokenize=False, **options
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(
                f"{place}: messages: the chat template refuses them: {error}"
            ) from error
        return found


def _is_more(message: dict[str, Any]) -> bool:
    return bool(message.get("tool_calls") or message.get("reasoning_content"))


def _parts(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Of an answer, by field: what the text of it cannot be without."""
    for name in ("reasoning_content", "content"):
        yield name, (message.get(name) or "").strip()
    for call in message.get("tool_calls") or ():
        yield "tool_calls.function.name", call["function"]["name"]
