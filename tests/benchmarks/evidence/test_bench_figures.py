"""The figures of the benchmarks: against naive definitions and examples counted by hand."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.estimates import Sample, bootstrap, estimate
from benchmarks.evidence.arms import chosen_by, fields
from benchmarks.evidence.lifebench_table import cells, judged, lasts_of, summary, tables
from benchmarks.evidence.measures import (
    MODES,
    deviation,
    distinct,
    ends_naturally,
    repetition,
    score,
)
from benchmarks.evidence.units import Answer, figures_of, of_lifebench, rows_of
from benchmarks.ramp import STRENGTH, boost
from lenvm_vllm.target.request import LengthTarget
from tests.support.tiny import tiny_tokenizer
from trainer.evaluation.forecasts import rank_correlation
from trainer.output import table
from value_server.contract.units import WORDS
from value_server.http.text import Texts

# ---- lengths


@pytest.mark.parametrize(
    ("length", "target", "mode", "expected"),
    [
        (100, 100, "equal_to", 100.0),
        (90, 100, "equal_to", 100 * math.exp(-0.5)),  # 60.65
        (110, 100, "equal_to", 100 * math.exp(-0.2)),  # 81.87
        (50, 100, "at_most", 100.0),
        (150, 100, "at_most", 100 * math.exp(-1.0)),
        (150, 100, "at_least", 100.0),
        (80, 100, "at_least", 100 * math.exp(-1.0)),
    ],
)
def test_score(length: int, target: int, mode: str, expected: float) -> None:
    assert score(length, target, mode) == pytest.approx(expected)


def test_deviation() -> None:
    assert deviation(150, 100) == deviation(50, 100) == 50.0


# ---- estimates


def test_mean_and_a_narrower_interval_of_more_rows() -> None:
    chance = np.random.default_rng(1)
    few, many = chance.normal(5, 1, 20), chance.normal(5, 1, 2000)
    found = [estimate(Sample(list(x), [str(i) for i in range(len(x))])) for x in (few, many)]
    assert [e.value for e in found] == pytest.approx([few.mean(), many.mean()])
    for sample, e in zip((few, many), found, strict=True):
        standard_error = sample.std() / math.sqrt(len(sample))
        assert e.high - e.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
        assert e.low < e.value < e.high
    assert [e.n for e in found] == [20, 2000]


def test_rows_of_one_prompt_are_no_new_evidence() -> None:
    values, groups = [1.0, 2.0, 3.0, 4.0], list("abcd")
    once = estimate(Sample(values, groups))
    tenfold = estimate(Sample(values * 10, groups * 10))
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))
    assert (tenfold.n, tenfold.groups) == (40, 4)


def test_arms_are_resampled_by_the_same_prompts() -> None:
    rng = random.Random(0)
    free = [rng.gauss(0, 1) for _ in range(50)]
    groups = [str(i) for i in range(50)]
    paired = Sample([x + 1 for x in free], groups), Sample(free, groups)
    difference = estimate(*paired, of=lambda a, b: a - b)
    assert (difference.low, difference.value, difference.high) == pytest.approx((1, 1, 1))


def test_a_figure_of_all_prompts_together_is_resampled_as_a_whole() -> None:
    """The interval of a mean is that of `estimate`; a correlation that a draw lacks is left out."""
    values = np.random.default_rng(2).normal(5, 1, 60)
    whole = bootstrap(lambda x: float(x.mean()), values)
    alike = estimate(Sample(list(values), [str(i) for i in range(60)]))
    assert whole is not None
    assert (whole.value, whole.n) == (pytest.approx(alike.value), 60)
    assert (whole.low, whole.high) == pytest.approx((alike.low, alike.high), abs=0.02)
    few = np.array([1.0, 2.0, 3.0])
    same = bootstrap(rank_correlation, few, few)
    assert same is not None
    assert (same.low, same.value, same.high) == pytest.approx((1, 1, 1))
    assert bootstrap(rank_correlation, np.ones(3), few) is None


def test_an_empty_sample_has_no_figure() -> None:
    assert estimate(Sample([], [])).n == 0
    assert math.isnan(estimate(Sample([], [])).value)


# ---- quality


def test_natural_end() -> None:
    assert ends_naturally("stop", 99, {100}, 0.05)
    assert not ends_naturally("stop", 100, {105, 100}, 0.9)  # the rail wrote it
    assert not ends_naturally("stop", 99, {100}, 0.049)
    assert not ends_naturally("length", 99, (), 0.9)
    assert ends_naturally("stop", 1000, (), 0.5)


def test_repetition_and_distinct() -> None:
    assert distinct([1, 2, 1, 2], 1) == 0.5
    assert distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)  # 12 21 12
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 of five
    assert repetition(range(100)) == 0.0
    assert repetition([7] * 100) == pytest.approx(1 - 1 / 97)
    assert repetition([1, 2]) == 0.0


# ---- arms


def test_what_each_arm_asks_for() -> None:
    assert [fields("prompt", mode, 50) for mode in MODES] == [{}, {}, {}]
    assert fields("limits", "equal_to", 50) == {"min_tokens": 49, "max_tokens": 50}
    assert fields("limits", "at_most", 50) == {"max_tokens": 50}
    assert fields("limits", "at_least", 50) == {"min_tokens": 49}
    assert fields("ramp", "at_least", 50) is None
    assert fields("greedy", "at_most", 50) == {
        "length_target": {"mode": "at_most", "tokens": 50, "tolerance": None, "policy": "greedy"}
    }
    assert fields("railed", "equal_to", 50) == {"length_target": {"mode": "equal_to", "tokens": 50}}
    assert fields("project:max_kl=0.4,scope=answer", "at_most", 50) == {
        "length_target": {"mode": "at_most", "tokens": 50, "tolerance": None, "policy": "project"}
        | {"max_kl": 0.4, "scope": "answer"}
    }
    assert fields("railed:best_of=4", "equal_to", 50) == {
        "length_target": {"mode": "equal_to", "tokens": 50, "best_of": 4}
    }


def test_arms_without_values_have_the_same_endings() -> None:
    plain = {"mode": "equal_to", "tokens": 50}
    assert fields("rails+endings", "equal_to", 50) == {"length_target": plain | {"policy": "rails"}}
    assert fields("ramp+endings", "equal_to", 50) == {
        "vllm_xargs": {"ramp_tokens": 50},
        "length_target": plain | {"policy": "rails"},
    }
    assert fields("ramp+endings", "at_least", 50) is None
    assert fields("ramp+endings", "equal_to", 50, WORDS) is None
    for arm in (f"{name}+endings" for name in ("rails", "limits", "ramp", "landing")):
        wish = LengthTarget.parse((fields(arm, "equal_to", 50) or {})["length_target"])
        assert wish.endings is None  # as many as railed
        assert not wish.wants_values


@pytest.mark.parametrize(
    ("arm", "mode", "chosen"),
    [
        ("railed", "equal_to", True),
        ("railed", "at_least", False),
        ("single", "equal_to", False),
        ("project", "equal_to", False),
        ("project:endings=4", "equal_to", True),
        ("single:best_of=4", "at_least", True),
        ("ramp+endings", "at_most", True),
        ("limits", "equal_to", False),
        ("countdown", "equal_to", False),
        ("an older one", "equal_to", False),
    ],
)
def test_arms_that_choose_by_their_own_yardstick_say_so(arm: str, mode: str, chosen: bool) -> None:
    assert bool(chosen_by(arm, mode)) == chosen


def test_where_a_rail_writes_the_end() -> None:
    assert lasts_of("railed", "equal_to", 100) == {110, 105}  # its own and its other endings'
    assert lasts_of("railed", "equal_to", 32) == {35}  # no room for nearer ones
    assert lasts_of("single", "equal_to", 100) == {110}
    assert lasts_of("railed", "at_most", 100) == {100}
    assert lasts_of("railed", "at_least", 100) == set()
    assert lasts_of("railed:tolerance=0.2,endings=1", "equal_to", 100) == {120}
    free = ("prompt", "limits", "ramp", "countdown", "greedy", "project")
    assert not any(lasts_of(arm, mode, 100) for arm in free for mode in MODES)
    assert lasts_of("rails", "equal_to", 100) == {110}
    assert lasts_of("ramp+endings", "equal_to", 100) == {110, 105}
    assert lasts_of("limits+endings", "equal_to", 100) == {100}
    assert lasts_of("ramp+endings", "at_least", 100) == set()


def test_arms_in_words() -> None:
    assert fields("prompt", "equal_to", 50, WORDS) == {}
    assert fields("limits", "equal_to", 50, WORDS) is None
    assert fields("ramp", "at_most", 50, WORDS) is None
    assert fields("railed", "at_most", 50, WORDS) == {
        "length_target": {"mode": "at_most", "words": 50}
    }
    assert lasts_of("single", "equal_to", 100, WORDS) == {110}
    assert lasts_of("railed", "at_most", 100, WORDS) == {100}


def test_ramp_rises_to_its_strength_at_the_target() -> None:
    assert boost(0, 80) == 0.0
    assert boost(80, 80) == STRENGTH
    assert boost(40, 80) < boost(60, 80) < boost(80, 80) < boost(90, 80)


# ---- from answers to the last line


def answer(arm: str, id: str, length: int, *, finish: str = "stop") -> dict[str, object]:
    return {
        **{"arm": arm, "mode": "equal_to", "target": 10, "language": "en", "kind": "qa", "id": id},
        **{"ids": list(range(length)), "length": length, "finish": finish, "text": "An end."},
        "sampled": 2 * length,
    }


def test_figures_by_hand() -> None:
    likelihood = {"nll": 1.0, "p_end": 0.5}
    rows = [
        judged(answer("prompt", "a", 20), likelihood),
        judged(answer("prompt", "b", 20, finish="length"), likelihood),
        judged(answer("railed", "a", 10), likelihood | {"nll": 1.5}),
        judged(answer("railed", "b", 11), likelihood | {"nll": 1.5}),  # the upper rail
    ]
    found = cells(rows)
    arms = summary(found)["arms"]
    assert arms["prompt"]["equal_to"]["ld"] == 100.0
    assert arms["prompt"]["equal_to"]["ls"] == pytest.approx(100 * math.exp(-2), abs=1e-3)
    assert arms["prompt"]["unforced_share"] == 50.0
    assert arms["prompt"]["ppl_ratio"] == 1.0
    assert arms["railed"]["equal_to"]["ld"] == 5.0
    assert arms["railed"]["equal_to"]["n"] == 2
    assert arms["railed"]["equal_to"]["tasks"] == 2
    assert arms["railed"]["equal_to"]["chosen_by"] == "end, length"
    assert arms["prompt"]["equal_to"]["chosen_by"] == ""
    (row,) = (r for r in tables(found)["By mode"] if r["arm"] == "railed")
    assert (row["chosen by"], row["tasks"], row["n"]) == ("end, length", 2, 2)
    assert arms["railed"]["unforced_share"] == 50.0
    assert arms["railed"]["sentence_share"] == 100.0
    assert arms["railed"]["cost"] == 2.0
    assert arms["railed"]["ppl_ratio"] == pytest.approx(math.exp(0.5), abs=1e-3)
    by_target = [cell for cell in found if cell.get("target") == 10]
    assert [cell["arm"] for cell in by_target] == ["prompt", "railed"]
    assert [row["arm"] for row in tables(found)["By language"]] == ["prompt", "railed"]


def test_words_are_counted_on_the_text_whatever_the_arm() -> None:
    rows = [answer("prompt", "a", 20), answer("railed", "a", 30)]
    rows[0]["text"], rows[1]["text"] = "one two three.", "十个字的一段中文。正好"
    found = cells([judged(row, {"nll": 1.0, "p_end": 0.5}, WORDS) for row in rows])
    whole = {cell["arm"]: cell["figures"] for cell in found if cell.keys() == {"arm", "figures"}}
    assert whole["prompt"]["length"].value == 3
    assert whole["prompt"]["ld"].value == 70.0
    assert whole["railed"]["length"].value == 10
    assert whole["railed"]["ls"].value == 100.0
    assert whole["railed"]["cost"].value == 2.0  # in tokens, as ever
    assert whole["railed"]["unforced_share"].value == 100.0


# ---- words from tokens


def test_the_error_of_words_by_hand(tmp_path: Path) -> None:
    """A token a character, and a prompt like the answer: each tells the other's words exactly."""
    prompt = "abc " * 5000  # the prior counts little
    own = [Answer("en", prompt, "abc " * 20, 81), Answer("en", prompt, "abcabc " * 20, 141)]
    figures = figures_of([*own, Answer("en", prompt, " ", 2)], Texts(tiny_tokenizer()))
    assert figures["n"] == 2
    assert figures["lifebench_ratio"] == 1.0
    words = figures["words"]
    assert words["tokens_each"] == 5.5
    assert words["error"] == pytest.approx(37.5, rel=0.01)  # none, and 35 for 20
    assert words["prior_error"] == pytest.approx(100 * (5.5 / 1.4 - 1))
    assert [row["unit"] for row in rows_of({"en": figures})] == ["words", "characters"]
    row = {"language": "cn", "request": "?", "text": "好", "length": 3, "finish": "length"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row))
    assert [*of_lifebench(tmp_path / "answers.jsonl")] == [Answer("lifebench cn", "?", "好", 4)]


def test_figures_without_scores() -> None:
    arms = summary(cells([judged(answer("prompt", "a", 20), None)]))["arms"]
    assert "ppl_ratio" not in arms["prompt"]
    assert "unforced_share" not in arms["prompt"]


def test_table() -> None:
    """Numbers stand to the right, also those with a unit or an interval."""
    rows = [{"arm": "a|b", "n": 1, "x": 0.12345, "e": "5 [4, 6]"}, {"arm": "3", "n": 2}]
    assert table(rows).splitlines() == [
        "| arm | n | x | e |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 1 | 0.123 | 5 [4, 6] |",
        "| 3 | 2 |  |  |",
    ]
