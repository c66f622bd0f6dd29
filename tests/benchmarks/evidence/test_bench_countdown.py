"""The countdown arm: what is asked, what is taken out again, and what it is counted to cost."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import countdown
from benchmarks.evidence.arms import fields
from benchmarks.evidence.ends import SAMPLING, Plan, Prompt
from benchmarks.evidence.lifebench_table import judged
from benchmarks.evidence.measures import MODES
from tests.support.tiny import tiny_tokenizer
from value_server.contract.units import WORDS, count


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("<4> Cats <3> sleep <2> all <1> day. <0>", "Cats sleep all day."),
        ("<4>Cats<3>sleep<2>all<1>day.<0>", "Cats sleep all day."),
        ("<3> One\n\n<2> two\n<1> three", "One\n\ntwo\nthree"),
        ("<4>猫<3>在<2>睡<1>觉。<0>", "猫在睡觉。"),
        ("<2> 猫 <1> 狗", "猫狗"),
        ("<2>猫<1>cat", "猫 cat"),
        ("No markers, a < b and <b> and [3].", "No markers, a < b and <b> and [3]."),
        ("<3> <2> <1>", ""),
        ("", ""),
    ],
)
def test_only_the_words_are_left(written: str, words: str) -> None:
    assert countdown.without_markers(written) == words


@pytest.mark.parametrize("words", [1, 2, 30, 400])
@pytest.mark.parametrize(("word", "join"), [("word", " "), ("word", ""), ("词", ""), ("词", " ")])
def test_a_text_that_counts_right_has_its_words(words: int, word: str, join: str) -> None:
    written = join.join(f"<{k}>{join}{word}" for k in range(words, 0, -1)) + f"{join}<0>"
    assert count(countdown.without_markers(written), WORDS) == words


@pytest.mark.parametrize("language", ["en", "cn"])
def test_the_rules_own_example_has_four_words(language: str) -> None:
    said = countdown.rule(300, language, "equal_to")
    assert "<300>" in said
    example = said[said.rindex("<4>") :]
    assert count(countdown.without_markers(example), WORDS) == 4


def test_a_target_in_tokens_is_told_in_words() -> None:
    """141 tokens are an end and 100 words of plain English; of this prompt more is known."""
    assert countdown.words_of(141, "tokens", "?", None) == 100
    tokenizer = tiny_tokenizer()  # a token a character: 4 a word here
    assert countdown.words_of(401, "tokens", "abc " * 5000, tokenizer) == 100
    assert countdown.words_of(2, "tokens", "?", None) == 1
    assert countdown.words_of(141, WORDS, "?", tokenizer) == 141
    assert "at most 100 words" in countdown.rule(100, "en", "at_most")


def test_markers_have_room() -> None:
    assert countdown.limit(128, 1024) == 1024
    assert countdown.limit(129, 1024) is None  # as many as the context has


def test_it_has_no_means_for_at_least() -> None:
    assert [fields("countdown", mode, 50) is None for mode in MODES] == [False, False, True]


def test_the_prompt_and_the_sampling_are_those_of_the_other_arms() -> None:
    plan = Plan(data=(), arms=("prompt", "countdown"), modes=MODES, targets=(141,))
    jobs = list(plan.jobs([Prompt("x-1", "x", "en", "Why?")]))
    plain, counted = jobs[:2]
    assert [job.facts["arm"] for job in jobs] == ["prompt", "countdown"] * 2 + ["prompt"]
    assert plain.request == counted.request == "Why?"
    assert counted.messages[0]["content"].startswith("Why?\n\nWrite exactly 100 words.")
    assert {name: counted.body[name] for name in SAMPLING} == SAMPLING
    assert counted.body["stop"] == ["<0>"]
    assert counted.body["max_tokens"] == plain.body["max_tokens"] == 1024
    assert counted.key != plain.key


def row(text: str, finish: str) -> dict[str, Any]:
    facts = {"arm": "countdown", "mode": "equal_to", "target": 10, "language": "en", "kind": "x"}
    own = {"key": "k", "id": "1", **facts, "request": "Why?", "text": text, "finish": finish}
    return own | {"length": 77, "sampled": 77, "prompt_ids": [1] * 500, "ids": [2] * 77}


def test_the_text_is_measured_and_all_tokens_are_counted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    kept = countdown.measured(row("<2> So <1> it.", "stop"), tokenizer)
    assert kept["text"] == "So it."
    assert tokenizer.decode(kept["ids"], skip_special_tokens=True) == "So it."
    assert kept["ids"][-1] == tokenizer.eos_token_id
    assert (kept["length"], kept["sampled"], kept["written"]) == (7, 77, "<2> So <1> it.")
    prompt = tokenizer.decode(kept["prompt_ids"])
    assert "Why?" in prompt
    assert "Write" not in prompt
    own = judged(kept, {"nll": 1.0, "p_end": 0.5})
    assert (own["ld"], own["tokens"], own["sampled"]) == (30.0, 7, 77)
    assert own["unforced_share"] == 100.0


def test_a_text_that_was_cut_has_no_end() -> None:
    kept = countdown.measured(row("<2> So", "length"), tiny_tokenizer())
    assert kept["length"] == len(kept["ids"]) == 2
    nothing = countdown.measured(row("<2>", "length"), tiny_tokenizer())
    assert nothing["ids"] == [tiny_tokenizer().eos_token_id]  # something to score
