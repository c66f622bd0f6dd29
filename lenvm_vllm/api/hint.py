"""The length in words, as a line of the prompt.

Values steer each step; a model that plans its answer does so from what it reads. So the request
can have its target said to it as well, in the language of its last message.
"""

from typing import Any

import regex

from lenvm_vllm.api.prompts import text_of
from lenvm_vllm.target.request import FIELD, LengthTarget, LengthTargetError
from lenvm_vllm.text.tokenizer import tokenizer_of
from value_server.contract.units import CHARACTERS, UNITS, WORDS, count, tokens_per_unit

_ENOUGH = 4000  # characters of a message that tell how many tokens its words take

# Script → what is said by mode, and the units. The first that a text has letters of counts.
_LINES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    r"[\p{Hiragana}\p{Katakana}]": (
        {
            "equal_to": "約{low}{unit}で答えてください。",
            "at_most": "{high}{unit}以内で答えてください。",
            "at_least": "{low}{unit}以上で答えてください。",
            "range": "{low}から{high}{unit}で答えてください。",
        },
        {WORDS: "字", CHARACTERS: "文字"},
    ),
    r"\p{Hangul}": (
        {
            "equal_to": "약 {low}{unit}로 답해 주세요.",
            "at_most": "{high}{unit} 이내로 답해 주세요.",
            "at_least": "{low}{unit} 이상으로 답해 주세요.",
            "range": "{low}~{high}{unit}로 답해 주세요.",
        },
        {WORDS: "단어", CHARACTERS: "자"},
    ),
    r"\p{Han}": (
        {
            "equal_to": "请用大约{low}个{unit}回答。",
            "at_most": "请用最多{high}个{unit}回答。",
            "at_least": "请用至少{low}个{unit}回答。",
            "range": "请用{low}到{high}个{unit}回答。",
        },
        {WORDS: "字", CHARACTERS: "字符"},
    ),
    "": (
        {
            "equal_to": "Answer in about {low} {unit}.",
            "at_most": "Answer in at most {high} {unit}.",
            "at_least": "Answer in at least {low} {unit}.",
            "range": "Answer in {low} to {high} {unit}.",
        },
        {WORDS: WORDS, CHARACTERS: CHARACTERS},
    ),
}


def say(request: dict[str, Any], target: LengthTarget, config: Any) -> LengthTarget:
    """Put the target's hint behind the last message of a request.

    config: of the served vLLM. Returns the target with the line that was put there. Raises
    LengthTargetError where there is no message of the user to put it behind.
    """
    if not target.hint:
        return target
    name = "messages" if "messages" in request else "input"
    messages = request.get(name)
    if isinstance(messages, str) and name == "input":
        messages = [{"role": "user", "content": messages}]
    messages = messages if isinstance(messages, list) else []
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "user" or target.prefix_tokens:
        what = "prefix_tokens" if target.prefix_tokens else "no message of the user at its end"
        raise LengthTargetError(
            f"{FIELD}.hint: {target.hint!r} cannot be said in a request with {what}"
        )
    content = last.get("content")
    parts = content if isinstance(content, list) else []
    text = text_of([part for part in parts if text_of([part])] if parts else content) or ""
    line = target.hint if isinstance(target.hint, str) else _line(target, text, config)
    kind = "input_text" if name == "input" else "text"
    said = [*parts, {"type": kind, "text": line}] if parts else f"{text}\n\n{line}".strip()
    request[name] = [*messages[:-1], {**last, "content": said}]
    return target.model_copy(update={"hint": line})


def _line(target: LengthTarget, text: str, config: Any) -> str:
    """What is said of a target, in the language of `text`."""
    lines, units = next(said for script, said in _LINES.items() if regex.search(script, text))
    low, high = target.limits
    unit = target.unit
    if unit == UNITS[0]:
        # Models know words and not tokens; the request's own text tells how many they take.
        tokenizer, unit = config and tokenizer_of(config), WORDS
        some = text[-_ENOUGH:].encode("utf-8", "replace").decode()  # a lone surrogate is no text
        tokens = len(tokenizer.encode(some, add_special_tokens=False)) if tokenizer else 0
        each = tokens_per_unit(WORDS, tokens, count(some, WORDS))
        low, high = (_plain((end - 1) / each) for end in (low, high))
    return lines[target.mode].format(low=low, high=high, unit=units[unit])


def _plain(amount: float) -> int:
    """As a person would say it: two digits, then zeros."""
    zeros = 10 ** max(0, len(str(int(amount))) - 2)
    return max(1, round(amount / zeros) * zeros)
