"""The guide: what it tells the value server, which rows it steers, and where its texts end.

Legend: B guided rows, V vocabulary. Token 0 is the end; token x says that x more tokens are to
come, which makes a perfect value model easy: the length of candidate x is x.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from lenvm_vllm.engine.guide import Guide, cut_of
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.host.sampling import OwnSampling
from lenvm_vllm.settings import Settings
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.values.client import TimedOut, ValueServerError
from value_server.contract import wire
from value_server.contract.values import logit_from_length

V = 400
EOS = 0
GAMMA = 0.99
NO_LIMIT = 1e6
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377)
quick = settings(deadline=None, max_examples=40)
INFO = wire.ModelInfo(
    gamma=GAMMA,
    base_model="toy",
    tokenizer_fingerprint="f" * 64,
    vocab_size=V,
    max_position=1000,
    max_sessions=100,
    max_candidates=64,
)


class Server:
    """Keeps texts as the real server does and knows the length of every candidate.

    failures: raised by the next steps, None for one that works. unheld: sessions that it
    never holds. backwards: name unknown rows last first.
    """

    def __init__(self, **info: Any) -> None:
        self.info = msgspec.structs.replace(INFO, **info)
        self.texts: dict[str, list[int]] = {}
        self.requests: list[wire.StepRequest] = []
        self.closed: list[str] = []
        self.failures: list[Exception | None] = []
        self.unheld: set[str] = set()
        self.backwards = False
        self.fingerprint: str | None = None

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        self.fingerprint = fingerprint()
        return self.info

    def step(self, request: wire.StepRequest) -> tuple[NDArray[np.float32], list[int]]:
        request = wire.decode_request(wire.encode(request))
        self.requests.append(request)
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        self.closed += request.closed
        for session in request.closed:
            self.texts.pop(session, None)
        unknown = [row for row, tell in enumerate(told(request)) if not self.take(*tell)]
        lengths = wire.unpack_ids(request.candidates).astype(np.float64)
        z = logit_from_length(torch.from_numpy(lengths), GAMMA).float().numpy()
        z[
            np.isin(np.repeat(np.arange(len(request.sessions)), request.candidate_counts), unknown)
        ] = np.nan
        return z, unknown[::-1] if self.backwards else unknown

    def take(self, session: str, start: int, tokens: list[int]) -> bool:
        if session in self.unheld or start > len(self.texts.get(session, [])):
            return False
        self.texts[session] = self.texts.get(session, [])[:start] + tokens
        return True


def told(request: wire.StepRequest) -> list[tuple[str, int, list[int]]]:
    """(session, start, tokens) of each row."""
    tokens = iter(wire.unpack_ids(request.tokens).tolist())
    return [
        (session, start, [next(tokens) for _ in range(count)])
        for session, start, count in zip(
            request.sessions, request.starts, request.token_counts, strict=True
        )
    ]


def asked(request: wire.StepRequest) -> list[list[int]]:
    """The candidates of each row."""
    ids = iter(wire.unpack_ids(request.candidates).tolist())
    return [[next(ids) for _ in range(count)] for count in request.candidate_counts]


def guide_of(server: Server, **fields: Any) -> Guide:
    return Guide(server, Settings(**fields), lambda: "ours")


def request(
    target: Any = 30, prompt: list[int] | None = None, output: Any = (), **fields: Any
) -> RequestState:
    """A request without rails."""
    wanted = {"tokens": target} if isinstance(target, int) else target
    wanted = {"tolerance": None} | wanted
    return RequestState(
        target=LengthTarget.parse(wanted),
        prompt_ids=[7, 50] if prompt is None else prompt,
        output_ids=list(output),
        **({"eos_ids": [EOS]} | fields),
    )


def flat_logits(rows: int, tokens: Any = (EOS, 10, 20, 40, 80)) -> Tensor:
    logits = torch.full((rows, V), -math.inf)
    logits[:, list(tokens)] = 0.0
    return logits


def steered(guide: Guide, logits: Tensor, states: dict[int, RequestState]) -> Tensor:
    logits = logits.clone()
    if (writes := guide.plan(logits, states)) is not None:
        writes.apply_inplace(logits)
    return logits


def guided_rows(guide: Guide, logits: Tensor, states: dict[int, RequestState]) -> list[int]:
    """The rows that come out different."""
    after = steered(guide, logits, states)
    return [row for row in range(len(logits)) if not torch.equal(after[row], logits[row])]


# ---- texts that end where they should


def toy_logits(state: RequestState, rng: random.Random) -> Tensor:
    """(V,) The next token says mostly one less; it may change its mind, and end at any time."""
    wants = [*state.prompt_ids, *state.output_ids][-1]
    weights = {length: math.exp(rng.random()) for length in LENGTHS}
    weights[max(1, wants - 1)] = 20.0
    total = sum(weights.values())
    weights[EOS] = total * (19.0 if wants == 1 else 0.05)
    logits = torch.full((V,), -math.inf)
    logits[list(weights)] = torch.tensor(list(weights.values())).log()
    return logits * (state.temperature or 1.0)


def sample(logits: Tensor, temperature: float, rng: random.Random) -> int:
    """As vLLM does, `logits` (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.double() / temperature, dim=-1).tolist()
    return rng.choices(range(V), p)[0]


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
                guide.close(state)
    raise AssertionError("a text does not end")


def texts(mode: str, policy: str, targets: Any = (1, 2, 32)) -> list[RequestState]:
    target = {"mode": mode, "policy": policy, "max_kl": NO_LIMIT}
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
    assert asked(server.requests[0]) == [[10, 20], [10, 20, 40, 80]]
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


@pytest.mark.parametrize("policy", ["project", "greedy"])
def test_perfect_values_keep_one_sided_targets(policy: str) -> None:
    at_most, at_least = texts("at_most", policy), texts("at_least", policy)
    write(guide_of(Server()), [*at_most, *at_least])
    assert all(len(s.output_ids) <= s.target.tokens for s in at_most)
    assert all(len(s.output_ids) >= s.target.tokens for s in at_least)


def test_without_values_the_toy_lands_elsewhere() -> None:
    states = [request(32) for _ in range(20)]
    server = Server()
    server.unheld = {state.session for state in states}
    write(guide_of(server), states)
    assert sum(len(state.output_ids) == 32 for state in states) < 5


# ---- what the server is told


def test_one_call_carries_all_rows() -> None:
    server = Server()
    guide = guide_of(server)
    states = {4: request(prompt=[1, 2, 3]), 1: request(prompt=[9])}
    assert guided_rows(guide, flat_logits(5), states) == [1, 4]
    assert server.fingerprint == "ours"
    states[4].output_ids.append(80)
    states[1].output_ids += [40, 20]  # speculative decoding emits several
    steered(guide, flat_logits(5), states)
    first, second = server.requests
    names = [states[4].session, states[1].session]
    assert told(first) == [(names[0], 0, [1, 2, 3]), (names[1], 0, [9])]
    assert told(second) == [(names[0], 3, [80]), (names[1], 1, [40, 20])]
    assert [sorted(ids) for ids in asked(second)] == [[10, 20, 40, 80]] * 2  # the end is known


def test_no_rows_no_call() -> None:
    server = Server()
    assert guide_of(server).plan(flat_logits(2), {}) is None
    assert not server.requests
    assert server.fingerprint is None


def test_a_row_without_a_choice_tells_its_tokens_with_its_next_one() -> None:
    server = Server()
    guide, states = guide_of(server), {0: request(), 1: request()}
    assert guided_rows(guide, torch.cat([flat_logits(1), flat_logits(1, [10])]), states) == [0]
    states[1].output_ids.append(10)
    assert guided_rows(guide, flat_logits(2), states) == [0, 1]
    first, second = server.requests
    assert [len(ids) for ids in asked(first)] == [4]
    assert told(second)[1] == (states[1].session, 0, [*(states[1].prompt_ids or []), 10])


def test_a_row_whose_values_could_change_nothing_is_not_scored() -> None:
    """One candidate has nearly all probability, so its value would be that of all."""
    server = Server()
    logits = flat_logits(1, [10, 11])
    logits[0, 10] += 5.0
    assert guide_of(server).plan(logits, {0: request()}) is None
    assert not server.requests
    assert guided_rows(guide_of(server), logits, {0: request({"tokens": 5, "policy": "greedy"})})


@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_forgotten_is_told_again_in_the_same_step(backwards: bool) -> None:
    """Row 0 and 3 have different candidates: mixed up, they would be steered by the other's."""
    logits = torch.cat([flat_logits(3), flat_logits(1, [EOS, 11, 31, 300])])
    results = []
    for forget in (False, True):
        server = Server()
        server.backwards = backwards
        guide = guide_of(server)
        states = {row: request(prompt=[row + 1]) for row in range(4)}
        steered(guide, logits, states)
        for state in states.values():
            state.output_ids.append(80)
        if forget:
            server.texts.pop(states[0].session)
            server.texts.pop(states[3].session)
        results.append(steered(guide, logits, states))
        assert len(server.requests) == (3 if forget else 2)
        assert all(state.sent == 2 for state in states.values())
    again = sorted(told(server.requests[-1]))
    assert again == sorted((states[row].session, 0, [row + 1, 80]) for row in (0, 3))
    assert torch.equal(*results)


def test_unknown_twice_is_unguided_in_this_step_only() -> None:
    server = Server()
    guide = guide_of(server)
    states = {0: request(), 1: request()}
    server.unheld = {states[1].session}
    assert guided_rows(guide, flat_logits(2), states) == [0]
    assert len(server.requests) == 2
    assert [state.sent for state in states.values()] == [2, 0]
    server.unheld.clear()
    assert guided_rows(guide, flat_logits(2), states) == [0, 1]
    assert told(server.requests[-1])[1] == (states[1].session, 0, [7, 50])


def test_all_unknown_twice_is_no_change() -> None:
    server = Server()
    states = {0: request()}
    server.unheld = {states[0].session}
    assert guide_of(server).plan(flat_logits(1), states) is None


# ---- rows that are left alone


def test_a_token_not_known_yet_leaves_the_row_alone() -> None:
    """Asynchronous scheduling: -1 stands for a token that is still on its way."""
    server = Server()
    guide = guide_of(server)
    states = {0: request(), 1: request()}
    steered(guide, flat_logits(2), states)
    states[0].output_ids.append(-1)
    states[1].output_ids.append(40)
    assert guided_rows(guide, flat_logits(2), states) == [1]
    states[0].output_ids[:] = [80, 40]
    assert guided_rows(guide, flat_logits(2), states) == [0, 1]
    assert told(server.requests[-1])[0] == (states[0].session, 2, [80, 40])
    assert all(-1 not in tokens for r in server.requests for _, _, tokens in told(r))


@pytest.mark.parametrize(
    ("state", "guided"),
    [
        (request(prompt=[7] * 8), True),
        (request(prompt=[7] * 9), False),
        (request(prompt=[7] * 8, output=[80]), False),
        (request(prompt=[99]), True),
        (request(prompt=[100]), False),
        (request(prompt=[7], output=[100]), False),
        (request(prompt=[]), True),
    ],
)
def test_what_the_model_cannot_read_is_left_alone(state: RequestState, guided: bool) -> None:
    server = Server(vocab_size=100, max_position=9)
    assert guided_rows(guide_of(server), flat_logits(1), {0: state}) == [0] * guided
    assert len(server.requests) == guided


def test_without_prompt_ids_the_row_is_left_alone() -> None:
    """A prompt of embeddings."""
    state = request()
    state.prompt_ids = None
    server = Server()
    assert guide_of(server).plan(flat_logits(1), {0: state}) is None
    assert not server.requests


def test_tokens_that_the_model_does_not_know_are_no_candidates() -> None:
    server = Server(vocab_size=50)
    after = steered(guide_of(server), flat_logits(1), {0: request(prompt=[7])})
    assert [sorted(ids) for ids in asked(server.requests[0])] == [[10, 20, 40]]
    assert after[0, 80] == -math.inf
    assert after[0, 20].isfinite()


def test_more_rows_than_the_server_takes() -> None:
    server = Server(max_sessions=2)
    states = {row: request() for row in range(4)}
    assert guided_rows(guide_of(server), flat_logits(4), states) == [0, 1]
    assert len(server.requests) == 1


@pytest.mark.parametrize(("ours", "theirs"), [(3, 64), (64, 3)])
def test_more_candidates_than_either_side_takes(ours: int, theirs: int) -> None:
    server = Server(max_candidates=theirs)
    logits = flat_logits(1) + torch.arange(V) / V
    steered(guide_of(server, max_candidates=ours), logits, {0: request()})
    assert asked(server.requests[0]) == [[80, 40, 20]]


def test_a_value_that_is_none_leaves_the_row_alone() -> None:
    class Broken(Server):
        def step(self, request: wire.StepRequest) -> tuple[NDArray[np.float32], list[int]]:
            z, unknown = super().step(request)
            z[1] = np.nan
            return z, unknown

    states = {0: request(), 1: request()}
    assert guided_rows(guide_of(Broken()), flat_logits(2), states) == [1]


# ---- sessions that are over


def test_closed_sessions_are_told_with_the_next_step() -> None:
    server = Server()
    guide = guide_of(server)
    gone, stays, never = request(), request(), request()
    steered(guide, flat_logits(2), {0: gone, 1: stays})
    guide.close(gone)
    guide.close(never)  # the server has not heard of it
    steered(guide, flat_logits(1), {0: stays})
    steered(guide, flat_logits(1), {0: stays})
    assert [r.closed for r in server.requests] == [[], [gone.session], []]


@pytest.mark.parametrize("left", [{}, {0: request(output=[-1])}])
def test_closed_sessions_are_told_also_when_no_row_is_guided(left: Any) -> None:
    server = Server()
    guide = guide_of(server)
    gone = request()
    steered(guide, flat_logits(1), {0: gone})
    guide.close(gone)
    for _ in range(2):
        assert guide.plan(flat_logits(1), left) is None
    assert [(r.sessions, r.closed) for r in server.requests[1:]] == [([], [gone.session])]
    assert not server.texts


@pytest.mark.parametrize("error", [TimedOut("slow"), RuntimeError("bug")])
def test_an_error_loses_nothing(error: Exception) -> None:
    server = Server()
    guide = guide_of(server)
    gone, state = request(), request(prompt=[1, 2])
    steered(guide, flat_logits(2), {0: gone, 1: state})
    state.output_ids.append(80)
    guide.close(gone)
    server.failures = [error]
    with pytest.raises(type(error)):
        guide.plan(flat_logits(1), {0: state})
    assert state.sent == 2
    state.output_ids.append(40)
    assert guided_rows(guide, flat_logits(1), {0: state}) == [0]
    assert server.requests[-1].closed == [gone.session]
    assert told(server.requests[-1]) == [(state.session, 2, [80, 40])]


def test_an_error_while_telling_again_loses_nothing() -> None:
    server = Server()
    guide = guide_of(server)
    states = {0: request(prompt=[1]), 1: request(prompt=[2])}
    steered(guide, flat_logits(2), states)
    server.texts.pop(states[1].session)
    for state in states.values():
        state.output_ids.append(80)
    server.failures = [None, TimedOut("slow")]
    with pytest.raises(ValueServerError):
        guide.plan(flat_logits(2), states)
    assert guided_rows(guide, flat_logits(2), states) == [0, 1]
    assert [(start, tokens) for _, start, tokens in told(server.requests[-1])] == [
        (2, []),
        (0, [2, 80]),
    ]


@quick
@given(
    st.lists(
        st.sampled_from(["open", "close", "forget", "fail", "fail again", "late", "step"]),
        max_size=25,
    ),
    st.randoms(use_true_random=False),
)
def test_after_any_history_the_server_holds_the_texts(history: list[str], rng: Any) -> None:
    """As it would if every step told it everything, and the ended ones are closed once."""
    server = Server()
    guide = guide_of(server)
    states: list[RequestState] = []
    ended: list[RequestState] = []
    for event in [*history, "step"]:
        if event == "open":
            states.append(request(prompt=[rng.randrange(1, V) for _ in range(rng.randrange(4))]))
        elif event == "close" and states:
            ended.append(states.pop(rng.randrange(len(states))))
            guide.close(ended[-1])
        elif event == "forget" and server.texts:
            server.texts.pop(rng.choice(list(server.texts)))
        elif event == "late" and states:
            rng.choice(states).output_ids.append(-1)
        else:
            server.failures = {"fail": [TimedOut("")], "fail again": [None, TimedOut("")]}.get(
                event, []
            )
            rows = dict(enumerate(rng.sample(states, len(states))))
            logits = flat_logits(len(states))
            known = [state for state in states if -1 not in state.output_ids]
            try:
                guided = guided_rows(guide, logits, rows)
            except TimedOut:
                pass
            else:
                assert [rows[row] for row in guided] == [s for s in rows.values() if s in known]
                for state in known:
                    assert server.texts[state.session] == state.prompt_ids + state.output_ids
            server.failures = []
            for state in states:
                state.output_ids[:] = [t if t >= 0 else 80 for t in state.output_ids] + [40]
    assert sorted(server.closed) == sorted(state.session for state in ended if state.sent)


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
        ids = (20,)

        def ends(self, text: Any, token: int) -> bool:
            return len(text) == 28 and token == 20  # there, and not in any text

    guide = Guide(Server(), Settings(), lambda: "ours", Ends())  # type: ignore[arg-type]
    early, late = (
        steered(guide, logits, {0: request(30, output=[50] * out)})[0].softmax(-1)
        for out in (5, 28)
    )
    assert early[20] / early[21] < 1.5
    assert late[20] / late[21] > 20
