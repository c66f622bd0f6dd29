"""A few answers with the length that the value model still expected after each token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from trainer.rows import Rows
from value_server.contract.wire import VALUES_PATH


@dataclass(frozen=True, slots=True)
class Text:
    """title: arm and lengths. tokens: of each its text, and tokens expected after it."""

    title: str
    request: str
    tokens: list[tuple[str, float]]
    expected: float  # before the first token


def choose(answers: Sequence[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """Every arm's answer to `count` requests for equal_to the middle of the targets."""
    exact = [a for a in answers if a["mode"] == "equal_to"]
    targets = sorted({a["target"] for a in exact})
    middle = [a for a in exact if a["target"] == targets[len(targets) // 2]] if targets else []
    chosen = list(dict.fromkeys(a["id"] for a in middle))[:count]
    return (a for a in middle if a["id"] in chosen)


def read_texts(
    answers: Sequence[dict[str, Any]], values: Rows, url: str, tokenizer: PreTrainedTokenizerBase
) -> list[Text]:
    """With the values that `url`, a value server, gives; those that `values` holds stay."""
    texts = []
    for answer in answers:
        if answer["key"] not in values:
            body = {"token_ids": answer["prompt_ids"] + answer["ids"]}
            reply = httpx.post(f"{url}{VALUES_PATH}", json=body, timeout=600).raise_for_status()
            lengths = reply.json()["predicted_tokens"][len(answer["prompt_ids"]) - 1 :]
            values.add({"key": answer["key"], "predicted": [round(n, 1) for n in lengths]})
        before, *after = values[answer["key"]]["predicted"]
        pieces = [tokenizer.decode([i]) for i in answer["ids"]]
        asked = f"{answer['mode'].replace('_', ' ')} {answer['target']}"
        title = f"{answer['arm']}: asked for {asked}, wrote {answer['length']} tokens"
        tokens = list(zip(pieces, after, strict=True))
        texts.append(Text(title, answer["request"], tokens, before))
    return texts
