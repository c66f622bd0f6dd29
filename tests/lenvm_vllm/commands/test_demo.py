"""The demo's own parts, with a model by hand: what it asks, shows, sums up and waits for."""

import io
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import BadRequestError
from rich.console import Console

from lenvm_vllm.commands.demo.page import EVERY_S, Waiting, console, show_answer, table
from lenvm_vllm.commands.demo.questions import (
    BOTH,
    DEFAULT,
    EXACT,
    FREE,
    GUIDED,
    IN_WORDS,
    UNGUIDED,
    Answer,
    Arm,
    Length,
    Question,
    ask,
    ask_all,
    summary,
)
from lenvm_vllm.commands.demo.tour import ASKED, SHOWN, asked, client_of, end

HUNDRED = Length(100)
WALK = " ".join(["a walk through the forest"] * 40)


class Model:
    """Writes what it is asked for: 300 tokens where only the prompt tells it, else the target."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.running = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, **request: Any) -> Any:
        with self._lock:
            self.requests.append(request)
            self.running += 1
            self.most = max(self.most, self.running)
        target = request["extra_body"].get("length_target")
        unit = "words" if isinstance(target, dict) and "words" in target else "tokens"
        number = target[unit] if isinstance(target, dict) else target
        result = {"end": "whole", "forced": True} if target else None
        choice = SimpleNamespace(
            finish_reason="stop",
            message=SimpleNamespace(content="word " * number if unit == "words" else WALK),
            length_result=result,
        )
        with self._lock:
            self.running -= 1
        return SimpleNamespace(
            choices=[choice], usage=SimpleNamespace(completion_tokens=number or 300)
        )


def answer(arm: Arm = DEFAULT, count: int = 100, length: Length = HUNDRED, **fields: Any) -> Answer:
    parts = {"end": "natural", "forced": False, "seconds": 2.0, "text": "Some text."} | fields
    return Answer(arm, ASKED[0], length, count, **parts)


def shown(write: Callable[[Console], object]) -> str:
    """What it prints where there is no terminal, 80 columns wide."""
    file = io.StringIO()
    page = Console(file=file, width=80, highlight=False)
    write(page)
    return file.getvalue()


@pytest.mark.parametrize(
    ("arm", "prompt", "target"),
    [
        (FREE, "Hi.", None),
        (UNGUIDED, "Hi. Your answer must be equal to 100 tokens.", None),
        (DEFAULT, "Hi.", 100),
        (BOTH, "Hi. Your answer must be equal to 100 tokens.", 100),
        (GUIDED, "Hi.", {"tokens": 100, "tolerance": None}),
        (EXACT, "Hi.", {"tokens": 100, "tolerance": 0}),
    ],
)
def test_what_an_arm_sends(arm: Arm, prompt: str, target: Any) -> None:
    model = Model()
    ask(model, Question(arm, "Hi.", (HUNDRED,)))
    (request,) = model.requests
    assert request["messages"] == [{"role": "user", "content": prompt}]
    assert request["extra_body"].get("length_target") == target


def test_words_are_asked_for_and_counted() -> None:
    model = Model()
    (unguided,) = ask(model, Question(UNGUIDED, "Hi.", (IN_WORDS,)))
    (guided,) = ask(model, Question(DEFAULT, "Hi.", (IN_WORDS,)))
    said, sent = model.requests
    assert said["messages"][0]["content"] == "Hi. Answer in about 60 words."
    assert sent["extra_body"]["length_target"] == {"words": 60}
    assert (unguided.count, guided.count) == (200, 60)
    assert "→ 60 words (+0%)" in shown(lambda page: show_answer(page, guided))


def test_a_prompt_that_tells_no_length_is_asked_once() -> None:
    model = Model()
    several = ask(model, Question(FREE, "Hi.", (Length(100), Length(200))))
    assert [a.deviation for a in several] == [200, 50]
    assert len(model.requests) == 1


@pytest.mark.parametrize("at_once", [1, 4])
def test_seconds_are_those_of_a_request_alone(at_once: int) -> None:
    model = Model()
    answers = list(ask_all(model, [Question(DEFAULT, "Hi.", (HUNDRED,))] * 8, at_once))
    assert model.most <= at_once
    assert all((a.seconds is not None) == (at_once == 1) for a in answers)


def test_a_refusal_has_the_servers_words() -> None:
    body = {"message": "length_target: must be at least 2, got 1", "code": 400}
    response = httpx.Response(400, request=httpx.Request("POST", "http://x"))

    def refuse(**_: Any) -> Any:
        raise BadRequestError("Error code: 400", response=response, body=body)

    words = "^vLLM did not answer a request with {'length_target': 100}: length_target: must be"
    with pytest.raises(RuntimeError, match=words):
        list(ask_all(refuse, [Question(DEFAULT, "Hi.", (HUNDRED,))]))


def test_summary() -> None:
    answers = [
        answer(UNGUIDED, 300, seconds=4.0),
        answer(UNGUIDED, 50, seconds=8.0),
        answer(DEFAULT, 110, end="cut", seconds=3.0),
        answer(DEFAULT, 95, end="whole", seconds=2.0),
        answer(BOTH, 100, seconds=1.0),
        answer(GUIDED, 170, seconds=None),
        answer(EXACT, 100, seconds=None),
        answer(UNGUIDED, 90, IN_WORDS, seconds=100.0),
        answer(DEFAULT, 63, IN_WORDS, end="cut", seconds=100.0),
    ]
    assert summary(answers) == {
        "targets": [50, 100, 200],
        "prompts": 1,
        "unguided_ld": 125.0,
        "guided_ld": 70.0,
        "exact_ld": 0.0,
        "default_ld": 5.0,
        "default_whole": 0.667,
        "seconds_per_request": {"unguided": 6.0, "default": 2.0},
        "words": {"targets": [60], "unguided_ld": 50.0, "default_ld": 5.0},
    }


def test_an_answer_is_shown_whole() -> None:
    text = shown(lambda page: show_answer(page, answer(count=110, text=WALK)))
    lines = text.splitlines()
    assert lines[:2] == ['"length_target": 100', "→ 110 tokens (+10%), natural end, 2.0 s"]
    assert " ".join(text.split()).endswith(WALK)
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("end", "forced", "told"),
    [
        ("cut", True, "cut by the target"),
        ("cut", False, "cut"),
        ("whole", True, "whole sentence"),
        (None, False, "end unknown"),
        ("max_tokens", False, "cut by max_tokens"),
    ],
)
def test_how_an_answer_ended(end: str | None, forced: bool, told: str) -> None:
    text = shown(lambda page: show_answer(page, answer(end=end, forced=forced)))
    assert text.splitlines()[1] == f"→ 100 tokens (+0%), {told}, 2.0 s"


def test_markup_in_a_text_is_text() -> None:
    assert "[bold]x[/red]" in shown(lambda page: show_answer(page, answer(text="[bold]x[/red]")))


def test_the_table() -> None:
    answers = [answer(UNGUIDED, 300), answer(DEFAULT, 104), answer(EXACT, seconds=None)]
    rows = shown(lambda page: page.print(table(answers))).splitlines()[2:]
    assert [row.split() for row in rows] == [
        ["the", "prompt", "300", "200%", "100%", "2.0"],
        ["the", "field", '"length_target"', "104", "4%", "100%", "2.0"],
        ["the", "field,", '"tolerance":', "0", "100", "0%", "100%"],
    ]


def test_the_tour_with_a_model_by_hand(tmp_path: Path) -> None:
    """One screen a question, all arms in the summary, every text in the files."""
    told: list[str] = []
    answers: list[Answer] = []

    def tour(page: Console) -> None:
        answers.extend(asked(Model(), page, lambda *what: told.append(" ".join(what))))
        end(page, answers, tmp_path)

    page = shown(tour)
    assert page.index("wanted: 100 tokens") < page.index("wanted: 60 words")
    for length, prompt in SHOWN.items():
        assert f"wanted: {length} ──" in page
        assert prompt in page
    assert page.count("both of these") == len(SHOWN)
    assert "make serve, then http://127.0.0.1:8000/lenvm" in page
    assert max(len(line) for line in page.splitlines() if str(tmp_path) not in line) <= 80
    figures = summary(answers)
    assert figures["prompts"] == len(ASKED)
    assert (figures["exact_ld"], figures["default_whole"]) == (0.0, 1.0)
    rows = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert len(rows) == len(answers)
    assert (tmp_path / "demo.txt").read_text().count("→") == len(answers)


def test_a_vllm_beside_a_proxy_and_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment: vLLM takes its key from there, too."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    keys = []

    class Models(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": []}')

    with HTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert client_of(f"http://127.0.0.1:{server.server_port}").models.list().data == []
        thread.join()
    assert keys == ["Bearer secret"]


def test_what_is_waited_for_is_told_now_and_then() -> None:
    """Where nothing can move: when it is another, and each half minute."""
    clock = [0.0]

    def wait(page: Console) -> None:
        waiting = Waiting(page, clock=lambda: clock[0])
        for clock[0] in range(EVERY_S + 2):
            waiting.tell("waiting for vLLM")
        waiting.tell("asking", "1 of 9 answers, ")
        waiting.close()

    assert shown(wait).splitlines() == [
        "waiting for vLLM",
        f"waiting for vLLM: {EVERY_S} s",
        "asking",
    ]


def test_in_a_terminal_one_line_moves() -> None:
    file = io.StringIO()
    page = Console(file=file, width=80, force_terminal=True, force_interactive=True)
    clock = iter([0.0, 0.0, 7.0])
    waiting = Waiting(page, clock=lambda: next(clock))
    waiting.tell("waiting for vLLM")
    waiting.tell("waiting for vLLM")
    waiting.close()
    assert "waiting for vLLM: 7 s" in file.getvalue()


def test_a_page_is_not_too_wide_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert console(io.StringIO()).width == 96
