"""The harnesses that ask servers, from data to JSON line, on real ones with tiny random models."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from benchmarks import report
from benchmarks.endpoint import Endpoint
from benchmarks.evidence import lifebench, tradeoff
from benchmarks.evidence.answers import Served
from benchmarks.evidence.arms import ARMS, USUAL, check_served
from benchmarks.evidence.measures import MODES
from benchmarks.servers import served
from tests.support.tiny import tiny_checkpoint, tiny_tokenizer
from tests.support.tiny_llm import tiny_llm
from value_server.contract.units import count

pytestmark = pytest.mark.e2e
TARGETS = (8, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With model/, values/, tasks.jsonl and, in url, where a vLLM of both is served."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_llm(folder / "model")
    tiny_checkpoint(folder / "values")
    text = "Write. It must be {word_count_type} {word_count} words long."
    rows = [{"id": i, "category": "qa", "lang": "en", "task": text} for i in range(3)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(
        str(folder / "model"),
        folder / "values",
        folder,
        max_model_len=512,
        dtype="float32",
        ramp=True,
    ) as own:
        (folder / "url").write_text(own.url)
        yield folder


def served_in(folder: Path) -> Served:
    url = (folder / "url").read_text()
    return Served(model=str(folder / "model"), url=url, checkpoint=folder / "values")


def run(folder: Path, capsys: pytest.CaptureFixture[str], limit: int) -> dict[str, dict]:
    capsys.readouterr()
    data = folder / "tasks.jsonl"
    lifebench.main(
        plan=lifebench.Plan(data=data, targets=TARGETS, limit=limit, max_tokens=48),
        served=served_in(folder),
        output=folder / "runs" / "lifebench",
    )
    return json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]


def test_the_last_line_and_a_run_that_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = run(folder, capsys, limit=1)
    assert tuple(arms) == USUAL
    for arm, figures in arms.items():
        modes = MODES[:2] if arm in ("ramp", "countdown") else MODES
        assert {"unforced_share", "ppl_ratio", *modes} <= figures.keys()
        assert all(figures[mode]["n"] == len(TARGETS) for mode in modes)
        assert figures[modes[0]].keys() >= {"ls", "ld", "ls_ci", "ld_ci"}
    assert arms["limits"]["equal_to"]["ld"] == 0.0
    assert arms["railed"]["equal_to"]["ld"] <= 10.0
    assert arms["railed"]["at_least"]["ls"] == 100.0
    assert arms["prompt"]["ppl_ratio"] == 1.0

    answers = folder / "runs" / "lifebench" / "answers.jsonl"
    before = answers.read_bytes()
    whole = before.splitlines(keepends=True)
    answers.write_bytes(b"".join(whole[:-3]))  # as if killed three answers earlier
    arms = run(folder, capsys, limit=2)
    after = answers.read_bytes()
    assert after.startswith(b"".join(whole[:-3]))
    assert len(after.splitlines()) == 2 * len(whole)
    assert arms["project"]["at_most"]["n"] == 2 * len(TARGETS)


def test_lifebench_in_its_own_unit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "own"
    plan = lifebench.Plan(
        data=folder / "tasks.jsonl",
        arms=("prompt", "limits", "single", "railed"),
        modes=MODES[:2],
        unit="own",
        targets=(6, 12),
        limit=2,
        max_tokens=300,
    )
    same = {"served": served_in(folder), "output": output}
    lifebench.main(plan=plan, **same)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["unit"] == "words"
    assert set(result["arms"]) == {"prompt", "single", "railed"}
    for line in (output / "answers.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        assert row["arm"] == "prompt" or count(row["text"], "words") <= 1.1 * row["target"]
    with pytest.raises(ValueError, match=r"unit: .* made with 'own', this run has None"):
        lifebench.main(plan=replace(plan, unit="tokens"), **same)


def test_an_arm_that_the_server_cannot_do(folder: Path) -> None:
    endpoint = Endpoint((folder / "url").read_text(), str(folder / "model"))
    check_served(ARMS, endpoint)
    assert not endpoint.refuses({"unknown": 1})  # as a server without the plugin would


def test_the_ramp_ends_a_text_about_its_target(folder: Path) -> None:
    """A model that mostly writes full stops: each is a place where the end may come."""
    url = (folder / "url").read_text()
    stop = tiny_tokenizer().convert_tokens_to_ids(".")
    body = {"model": str(folder / "model"), "messages": [{"role": "user", "content": "?"}]}
    body |= {"logit_bias": {str(stop): 8.0}, "max_tokens": 100, "n": 8, "seed": 1}
    ended = {}
    for target in (20, 60):
        ask = body | {"vllm_xargs": {"ramp_tokens": target}, "return_token_ids": True}
        reply = httpx.post(f"{url}/chat/completions", json=ask, timeout=60).raise_for_status()
        ended[target] = [len(choice["token_ids"]) for choice in reply.json()["choices"]]
    assert sum(ended[20]) / 8 < 24 < 45 < sum(ended[60]) / 8 < 70


def test_tradeoff_from_data_to_the_last_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder / "questions.jsonl"
    row = json.dumps({"question": "How many?", "answer": "#### 7"})
    data.write_text(f"{row}\n{row}\n")
    plan = tradeoff.Plan(
        data=data, betas=(-5.0,), budgets=(8,), cuts=(8, 12), limit=2, samples=1, max_tokens=24
    )

    def run() -> str:
        tradeoff.main(plan=plan, served=served_in(folder), output=folder / "runs" / "tradeoff")
        return capsys.readouterr().out.splitlines()[-1]

    first = run()
    result = json.loads(first)
    assert result["free"]["n"] == 2
    points = {(p["arm"], p["dial"]): p for p in result["points"]}
    assert points.keys() >= {("tilt", -5.0), ("at_most", 8), ("budget", 8), ("brief", "brief")}
    assert points["budget", 8]["tokens"] <= 8
    assert points["budget", 12]["tokens"] <= 12
    assert ("at_most", 12) not in points
    assert points["at_most", 8]["tokens"] <= 8
    assert (folder / "runs" / "tradeoff" / "tradeoff.png").exists()
    answers = folder / "runs" / "tradeoff" / "answers.jsonl"
    before = answers.read_bytes()
    assert run() == first
    assert answers.read_bytes() == before


def test_report_of_both(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(**more: Path) -> str:
        report.main(runs=folder / "runs", docs=tmp_path, model=str(folder / "model"), **more)
        return capsys.readouterr().out.splitlines()[-1]

    assert json.loads(run(checkpoint=folder / "values"))["sections"] == ["lifebench", "tradeoff"]
    assert "### tradeoff" in (tmp_path / "figures.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"lifebench.png", "tradeoff.png"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<ruby>") > 100
    assert "railed: asked for equal to 24, wrote" in page
    run(checkpoint=Path("nowhere"))  # the values are kept
    assert (tmp_path / "report.html").read_text() == page
