"""The countdown: a model that is told to number its words down to 0 as it writes them.

No values and no plugin: all of it is in the prompt, as in "Prompt-Based One-Shot Exact
Length-Controlled Generation with LLMs" (arXiv 2508.13805). Behind the prompt stands a rule of our
own words, with an example:

    <4> Cats <3> sleep <2> all <1> day. <0>

`<0>` is a stop string. A target in tokens is told as the words that so many take in the prompt's
own text. The markers are taken out before anything is measured, and the rule out of the prompt
that a text is judged behind; what the markers cost stays in the sampled tokens.
"""

import unicodedata
from typing import Any

import regex

from value_server.contract.units import UNITS, WORDS, count, tokens_per_unit

ARM = "countdown"
END = "<0>"
EACH = 8  # tokens of a marker of three digits and its word
_MARKER = regex.compile(r"(\s*)<\d+>(\s*)")
_RULES = {
    "en": "Write {mode} {words} words. Count down while you write: before each word put the number "
    "of words that are left, in angle brackets, from <{words}> to <1>. After the last word write "
    "<0> and stop. With 4 words it looks like this: <4> Cats <3> sleep <2> all <1> day. <0>",
    "cn": "请写{mode}{words}个字。边写边倒数：在每个字前面用尖括号写出还剩多少个字，"  # noqa: RUF001
    "从<{words}>到<1>。写完最后一个字后写<0>并停止。四个字的例子：<4>猫<3>在<2>睡<1>觉。<0>",  # noqa: RUF001
}
_MODES = {
    "en": {"equal_to": "exactly", "at_most": "at most"},
    "cn": {"equal_to": "正好", "at_most": "最多"},
}


def fields(mode: str) -> dict[str, Any] | None:
    """What a request adds; None for at_least, which no countdown says."""
    return {"stop": [END]} if mode in _MODES["en"] else None


def words_of(amount: int, unit: str, text: str, tokenizer: Any) -> int:
    """The target in words. unit: tokens or words. text: the prompt.

    tokenizer: of the served model; None takes the tokens of a word in plain English.
    """
    if unit != UNITS[0]:
        return amount
    known = len(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else 0
    return max(1, round((amount - 1) / tokens_per_unit(WORDS, known, count(text, WORDS))))


def limit(words: int, most: int) -> int | None:
    """Tokens of so many marked words: those of the other arms, or where these may not be enough
    all that the context has."""
    return most if words * EACH <= most else None


def rule(words: int, language: str, mode: str) -> str:
    """What stands behind the prompt. language: en or cn."""
    return _RULES[language].format(mode=_MODES[language][mode], words=words)


def without_markers(text: str) -> str:
    """The words alone. Only markers as the rule has them go; a model's own kinds are text."""
    return _MARKER.sub(_gap, text).strip()


def _gap(marker: regex.Match[str]) -> str:
    """What stands in a marker's place: its line ends, or a space where the script has spaces."""
    wide = [
        unicodedata.east_asian_width(marker.string[i]) in "WF"
        for i in (marker.start() - 1, marker.end())
        if 0 <= i < len(marker.string)
    ]
    space: str = max(marker[1], marker[2], key=lambda part: part.count("\n"))
    return space if "\n" in space else " " * (not all(wide))


def measured(answer: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A row as `Endpoint.answer` makes it, as it is measured: the text without markers, in tokens
    of its own, behind the prompt without the rule. `sampled` stays; `written` is the text as it
    came."""
    text = without_markers(answer["text"])
    ids = tokenizer.encode(text, add_special_tokens=False)
    if answer["finish"] == "stop" or not ids:
        ids = [*ids, tokenizer.eos_token_id]
    asked = [{"role": "user", "content": answer["request"]}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    own = {"text": text, "ids": ids, "length": len(ids), "prompt_ids": list(prompt)}
    return answer | own | {"written": answer["text"]}
