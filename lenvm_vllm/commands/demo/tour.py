"""The demo's way: what is asked after what, which answers are shown, and what stays in files."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from openai import DefaultHttpxClient, OpenAI
from rich.console import Console

from lenvm_vllm.commands.demo.page import console, show_answer, show_question, table
from lenvm_vllm.commands.demo.questions import (
    BOTH,
    DEFAULT,
    EXACT,
    FREE,
    GUIDED,
    IN_TOKENS,
    IN_WORDS,
    LENGTHS,
    PROMPTS,
    UNGUIDED,
    Answer,
    Create,
    Length,
    Question,
    ask,
    ask_all,
)

ASKED = PROMPTS[1:3]  # one at a time each of them takes a minute and a half
# The prompt whose answers are shown for a length.
SHOWN = {Length(100): ASKED[0], IN_WORDS: ASKED[1]}
SHOWN_EXACT = Question(EXACT, ASKED[0], (Length(100),))
AT_ONCE = 16  # of those whose seconds are not told
INTRODUCTION = """\
A small model answers some prompts. How long its answers shall be it is told
by a sentence in the prompt, by the request field "length_target", or by both.
"""
AFTERWARDS = """\

Lengths are means of {prompts} prompts (of one, by both the prompt and the field);
"off by" is the mean of |length - wanted| / wanted. A text ends well where the
model might have ended it (natural end), or behind a sentence (whole sentence).
Seconds are those of one request at a time.

All texts: {texts}
           {rows}
By hand:   make serve, then http://127.0.0.1:8000/lenvm
Read on:   README.md, "The request field" and "What the answer tells";
           docs/training.md for a model of your own
"""


def alone() -> Iterator[Question]:
    """What is asked one at a time, first what is shown."""
    for length, prompt in SHOWN.items():
        yield from (Question(arm, prompt, (length,)) for arm in (UNGUIDED, DEFAULT, BOTH))
    yield SHOWN_EXACT
    for length in LENGTHS:
        for prompt in ASKED:
            if prompt != SHOWN.get(length):
                yield from (Question(arm, prompt, (length,)) for arm in (UNGUIDED, DEFAULT))


def together() -> Iterator[Question]:
    """What is asked side by side."""
    for prompt in ASKED:
        for length in IN_TOKENS:
            questions = (Question(arm, prompt, (length,)) for arm in (EXACT, GUIDED))
            yield from (question for question in questions if question != SHOWN_EXACT)
        yield Question(FREE, prompt, LENGTHS)


def client_of(url: str) -> OpenAI:
    """Of a vLLM on this machine, which no proxy reaches; it has its key from the environment."""
    http = DefaultHttpxClient(trust_env=False)
    key = os.environ.get("VLLM_API_KEY") or "none"
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http)


def tour(url: str, model: str, page: Console, tell: Callable[..., None]) -> list[Answer]:
    """Asks all and shows some of it. url: of vLLM. Raises RuntimeError where an answer fails."""
    create = partial(client_of(url).chat.completions.create, model=model)
    tell("asking")
    ask(create, Question(DEFAULT, PROMPTS[0], (Length(8),)))  # a server's first takes longer
    return asked(create, page, tell)


def asked(create: Create, page: Console, tell: Callable[..., None]) -> list[Answer]:
    """All answers."""
    first, second = list(alone()), list(together())
    answers: list[Answer] = []

    def waiting(done: int, before: int = 0) -> None:
        tell("asking", f"{before + done} of {len(first) + len(second)} answers, ")

    for answer in ask_all(create, first, waiting=waiting):
        answers.append(answer)
        if SHOWN.get(answer.length) == answer.prompt:
            if answer.arm in (UNGUIDED, EXACT):
                exactly = "exactly " if answer.arm == EXACT else ""
                show_question(page, answer.prompt, f"{exactly}{answer.length}")
            show_answer(page, answer)
    answers += ask_all(create, second, AT_ONCE, partial(waiting, before=len(first)))
    return answers


def end(page: Console, answers: Sequence[Answer], folder: Path) -> None:
    """The table of all answers, all of them in files, and what to do next."""
    texts, rows = folder / "demo.txt", folder / "demo.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer.row()) + "\n" for answer in answers)
    with texts.open("w", encoding="utf-8") as file:
        _write_texts(console(file), answers)
    page.rule("[bold]all of them")
    page.print(table(answers))
    note = AFTERWARDS.format(prompts=len(ASKED), texts=texts, rows=rows)
    page.print(note, markup=False, soft_wrap=True)


def _write_texts(page: Console, answers: Sequence[Answer]) -> None:
    for length in LENGTHS:
        for prompt in ASKED:
            show_question(page, prompt, str(length))
            for answer in answers:
                if (answer.prompt, answer.length) == (prompt, length):
                    show_answer(page, answer)
