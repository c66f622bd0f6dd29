"""The guide: where its texts end, and how it steers rows. Values are perfect (`toy.py`)."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm_vllm.engine.goals import cut_of
from lenvm_vllm.engine.guide import Guide
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.host.sampling import OwnSampling
from lenvm_vllm.settings import Settings
from tests.support.toy import (
    EOS,
    NO_LIMIT,
    Server,
    V,
    asked,
    flat_logits,
    guide_of,
    guided_rows,
    request,
    sample,
    steered,
    told,
    toy_logits,
)

quick = settings(deadline=None, max_examples=40)


def write(guide: Guide, states: list[RequestState], seed: int = 0) -> int:
    """All texts to their ends, in one batch that shrinks; the steps it took."""
    rng = random.Random(seed)
    for step in range(1000):
        running = [state for state in states if state.output_ids[-1:] != [EOS]]
        if not running:
            return step
        logits = torch.stack([toy_logits(state, rng) for state in running])
        logits = steered(guide, logits, dict(enumerate(running)))
        for state, row in zip(running, logits, strict=True):
            state.output_ids.append(sample(row, state.temperature, rng))
            if state.output_ids[-1] == EOS:
                guide.sessions.close(state)
    raise AssertionError("a text does not end")


def texts(
    mode: str, policy: str = "project", targets: Any = (1, 2, 32), tolerance: float | None = None
) -> list[RequestState]:
    target = {"mode": mode, "policy": policy, "max_kl": NO_LIMIT, "tolerance": tolerance}
    return [
        request(target | {"tokens": tokens}, temperature=temperature)
        for tokens in targets
        for temperature in (0.0, 0.7, 1.0, 1.0)
    ]


def test_only_the_likely_candidates_are_scored_and_no_token_is_lost() -> None:
    logits = flat_logits(2, (10, 20, 40, 80))
    logits[:, 10], logits[:, 20] = 3.0, 2.0  # 0.67, 0.25, 0.03, 0.03 and an end of 0.03
    logits[:, EOS] = 0.0
    server = Server()
    states = {0: request(50), 1: request({"tokens": 50, "policy": "greedy"})}
    after = steered(guide_of(server, scored_mass=0.9), logits, states)
    assert [sorted(ids) for ids in asked(server.requests[0])] == [[10, 20], [10, 20, 40, 80]]
    # Neither likelier nor less likely among themselves: they count with the mean.
    assert after[0, 40] == after[0, 80] > -math.inf
    assert after[0, 20] - after[0, 10] > logits[0, 20] - logits[0, 10]


@pytest.mark.parametrize("policy", ["project", "greedy"])
def test_perfect_values_land_on_the_token(policy: str) -> None:
    """A count that is off by one lands one token away, as the end comes by luck rarely. Each
    step is one call, and no token is told twice."""
    server = Server()
    states = texts("equal_to", policy, (1, 2, 32, 200))
    steps = write(guide_of(server, scored_mass=1.0), states)
    assert [len(s.output_ids) for s in states] == [s.target.tokens for s in states]
    assert len(server.requests) == steps == 200
    rows = [row for message in server.requests for row in told(message)]
    for state in states:
        pieces = [tokens for session, _, tokens in rows if session == state.session]
        assert pieces == [state.prompt_ids, *([token] for token in state.output_ids[:-1])]


def test_perfect_values_keep_one_sided_targets() -> None:
    at_most, at_least = texts("at_most"), texts("at_least", tolerance=0.1)
    write(guide_of(Server()), [*at_most, *at_least])
    assert all(len(s.output_ids) <= s.target.tokens for s in at_most)
    assert all(len(s.output_ids) >= s.target.tokens for s in at_least)


def test_without_rails_a_text_may_end_below_its_limit() -> None:
    """A rule that bars it would make a perfect score of any value model."""
    for tolerance, some_are_short in ((None, True), (0.1, False)):
        at_least = texts("at_least", targets=(32,) * 20, tolerance=tolerance)
        write(guide_of(Server()), at_least)
        assert any(len(s.output_ids) < s.target.tokens for s in at_least) is some_are_short


def test_the_papers_rule_ends_at_most_at_once_and_at_least_never() -> None:
    at_most = texts("at_most", "greedy", (200,))
    write(guide_of(Server()), at_most)
    assert {len(s.output_ids) for s in at_most} == {1}
    with pytest.raises(AssertionError, match="a text does not end"):
        write(guide_of(Server()), texts("at_least", "greedy", (2,))[:1])


def test_without_values_the_toy_lands_elsewhere() -> None:
    """In its landing, 30 to 35 tokens, but not on the token, and in no other."""
    states = [request(32) for _ in range(40)]
    server = Server()
    server.unheld = {state.session for state in states}
    write(guide_of(server), states)
    lengths = [len(state.output_ids) for state in states]
    assert lengths.count(32) < 20
    assert all(30 <= length <= 36 for length in lengths)


# ---- the result


@quick
@given(st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_neither_order_nor_place_of_rows_matters(seed: int, rng: Any) -> None:
    """Nor the rows between them; those stay as they are, to the bit."""
    torch.manual_seed(seed)
    logits = 2 * torch.randn(6, V)
    logits[5, 3] = math.nan
    kinds = [
        {"tokens": 40},
        {"tokens": 40, "policy": "greedy"},
        {"mode": "at_most", "tokens": 5},
        {"mode": "at_least", "tokens": 90},
        {"mode": "tilt", "beta": -20.0},
    ]

    def states(rows: list[int]) -> dict[int, RequestState]:
        """Request i in row rows[i], in any order."""
        pairs = [
            (row, request(kind, temperature=0.5 + row_kind / 2))
            for row_kind, (row, kind) in enumerate(zip(rows, kinds, strict=True))
        ]
        return dict(rng.sample(pairs, len(pairs)))

    straight = steered(guide_of(Server()), logits, states([0, 1, 2, 3, 4]))
    places = rng.sample(range(6), 6)
    moved = torch.empty_like(logits)
    moved[places] = logits
    moved = steered(guide_of(Server()), moved, states(places[:5]))
    torch.testing.assert_close(moved[places[:5]], straight[:5], atol=1e-5, rtol=1e-6)
    unguided = moved[places[5]].view(torch.int32)
    assert torch.equal(unguided, logits[5].view(torch.int32))


def test_the_trust_region_is_the_requests_or_the_settings() -> None:
    logits = flat_logits(2, [10, 20, 40, 80])
    bound, free = request({"tokens": 11, "max_kl": 0.0}), request({"tokens": 11})
    after = steered(guide_of(Server(), max_kl=NO_LIMIT), logits, {0: bound, 1: free})
    p = torch.softmax(after.double(), dim=-1)[:, [10, 20, 40, 80]]
    assert p[0].tolist() == pytest.approx([0.25] * 4, abs=1e-6)
    assert p[1].tolist() == pytest.approx([1, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("target", "own", "expected"),
    [
        (30, {}, (1.0, 15, 0.999, 0.0)),
        (30, {"temperature": 0.0}, (1.0, 15, 0.999, 0.0)),
        (30, {"temperature": 0.6, "top_k": 40}, (0.6, 40, 0.999, 0.0)),
        (30, {"top_p": 0.9}, (1.0, 15, 0.9, 0.0)),
        (30, {"min_p": 0.1}, (1.0, 15, 0.999, 0.1)),
        ({"mode": "tilt", "beta": 2.0}, {}, (1.0, 0, 1.0, 0.01)),
        ({"mode": "tilt", "beta": 2.0}, {"top_k": 3}, (1.0, 3, 1.0, 0.0)),
        ({"mode": "tilt", "beta": 2.0}, {"top_p": 0.9}, (1.0, 0, 0.9, 0.0)),
        ({"mode": "tilt", "beta": 2.0}, {"min_p": 0.2}, (1.0, 0, 1.0, 0.2)),
    ],
)
def test_the_cut_is_the_requests_or_the_settings(target: Any, own: Any, expected: Any) -> None:
    temperature = own.pop("temperature", 1.0)
    own = OwnSampling(**own)
    state = request(target, eos_ids=[EOS, 5], temperature=temperature, own=own)
    cut = cut_of(state, Settings())
    assert (cut.temperature, cut.top_k, cut.top_p, cut.min_p) == expected
    assert cut.eos_ids == [EOS, 5]


def test_tokens_that_end_a_sentence_are_led_to_in_the_landing() -> None:
    """Of equals in length, 20 and 21 tokens, the one that ends a sentence: 28 of 30 are out."""
    logits = flat_logits(1, (EOS, 20, 21))
    logits[:, EOS] = -6.0

    class Ends:
        ids, breaks, line = (20,), (), None

        def ends(self, text: Any, tokens: Any) -> list[bool]:
            return [len(text) == 28 and token == 20 for token in tokens]  # there, and not elsewhere

        def is_whole(self, text: Any, own: Any) -> bool:
            return False

    guide = guide_of(Server(), Ends())
    early, late = (
        steered(guide, logits, {0: request(30, output=[50] * out)})[0].softmax(-1)
        for out in (5, 28)
    )
    assert early[20] / early[21] < 1.5
    assert late[20] / late[21] > 20


# ---- the candidates


def test_a_row_whose_values_could_change_nothing_is_not_scored() -> None:
    """One candidate has nearly all probability, so its value would be that of all."""
    server = Server()
    logits = flat_logits(1, [10, 11])
    logits[0, 10] += 5.0
    assert guide_of(server).plan(logits, {0: request()}) is None
    assert not server.requests
    assert guided_rows(guide_of(server), logits, {0: request({"tokens": 5, "policy": "greedy"})})


def test_tokens_that_the_model_does_not_know_are_no_candidates() -> None:
    server = Server(vocab_size=50)
    after = steered(guide_of(server), flat_logits(1), {0: request(prompt=[7])})
    assert [sorted(ids) for ids in asked(server.requests[0])] == [[10, 20, 40]]
    assert after[0, 80] == -math.inf
    assert after[0, 20].isfinite()


@pytest.mark.parametrize(("ours", "theirs"), [(3, 64), (64, 3)])
@pytest.mark.parametrize("policy", ["project", "greedy"])
def test_more_candidates_than_either_side_takes(ours: int, theirs: int, policy: str) -> None:
    server = Server(max_candidates=theirs)
    logits = flat_logits(1) + torch.arange(V) / V
    state = request({"tokens": 30, "policy": policy})
    steered(guide_of(server, max_candidates=ours), logits, {0: state})
    assert asked(server.requests[0]) == [[80, 40, 20]]
