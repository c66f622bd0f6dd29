"""Several value servers as one: whose a session is, and who notices when one is lost."""

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lenvm_vllm.engine.guide import Guide
from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.client import CircuitOpen, Mismatch, TimedOut, Unreachable
from lenvm_vllm.values.replicas import Replicas, part_of, rank
from tests.support.fakes import EOS, INFO, V
from value_server.contract import wire
from value_server.contract.values import length_from_logit, logit_from_length

SECONDS = 30.0  # longer than anything here takes
URLS = ("http://a", "http://b", "http://c")


class Server:
    """Holds texts as a value server does; candidate x is x tokens from the end.

    error: what it raises instead, as long as it is set.
    """

    def __init__(self, **info: Any) -> None:
        self.info = msgspec.structs.replace(INFO, **info)
        self.error: Exception | None = None
        self.rests = False
        self.held: dict[str, int] = {}
        self.steps: list[wire.StepRequest] = []
        self.searched = threading.Event()

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        self.searched.set()
        return self._or_fail(self.info)

    def step(self, request: wire.StepRequest) -> tuple[NDArray[np.float32], list[int]]:
        self._or_fail(None)
        request = wire.decode_request(wire.encode(request))
        self.steps.append(request)
        for session in request.closed:
            self.held.pop(session, None)
        columns = zip(request.sessions, request.starts, request.token_counts, strict=True)
        unknown = []
        for row, (session, start, count) in enumerate(columns):
            if start > self.held.get(session, 0):
                unknown.append(row)
            else:
                self.held[session] = start + count
        lengths = torch.from_numpy(wire.unpack_ids(request.candidates).astype(np.float64))
        z = logit_from_length(lengths, self.info.gamma).float().numpy()
        owner = np.repeat(np.arange(len(request.sessions)), request.candidate_counts)
        return np.where(np.isin(owner, unknown), np.float32(np.nan), z), unknown

    def _or_fail(self, answer: Any) -> Any:
        if self.error is not None:
            raise self.error
        return answer


def ours() -> str:
    return "ours"


def three(**info: Any) -> tuple[Replicas, dict[str, Server]]:
    servers = {url: Server(**info) for url in URLS}
    replicas = Replicas(servers)
    replicas.model(ours)
    return replicas, servers


def step_of(names: list[str], start: int = 0, closed: list[str] | None = None) -> wire.StepRequest:
    """Each session brings two tokens; row i asks for i + 1 candidates, all of another length."""
    counts = list(range(1, len(names) + 1))
    return wire.StepRequest(
        sessions=names,
        starts=[start] * len(names),
        token_counts=[2] * len(names),
        tokens=wire.pack_ids(list(range(2 * len(names)))),
        candidate_counts=counts,
        candidates=wire.pack_ids(list(range(1, sum(counts) + 1))),
        closed=closed or [],
    )


def names_of(count: int) -> list[str]:
    return [f"s{i}" for i in range(count)]


def lengths_of(z: NDArray[np.float32], gamma: float = INFO.gamma) -> NDArray[np.float64]:
    return length_from_logit(torch.from_numpy(z.astype(np.float64)), gamma).numpy()


def test_each_session_has_one_replica_and_gets_its_own_answer() -> None:
    replicas, servers = three()
    names = names_of(60)
    z, unknown = replicas.step(step_of(names))
    assert unknown == []
    np.testing.assert_allclose(lengths_of(z), np.arange(1, len(z) + 1), rtol=1e-3)
    assert sorted(n for server in servers.values() for n in server.held) == sorted(names)
    assert all(len(server.held) > 8 for server in servers.values())  # 20 expected, deviation 3.7
    for name in names:
        (url,) = (url for url, server in servers.items() if name in server.held)
        assert url == max(URLS, key=lambda url: rank(url, name))
    before = {url: set(server.held) for url, server in servers.items()}
    _, unknown = replicas.step(step_of(names, start=2))
    assert unknown == []
    assert {url: set(server.held) for url, server in servers.items()} == before


def test_a_lost_replica_moves_its_own_sessions_only() -> None:
    replicas, servers = three()
    names = names_of(60)
    replicas.step(step_of(names))
    before = {url: set(server.held) for url, server in servers.items()}
    servers["http://b"].error = Unreachable("gone")
    z, unknown = replicas.step(step_of(names, start=2))
    assert {names[row] for row in unknown} == before["http://b"]
    assert np.isnan(z).sum() == sum(row + 1 for row in unknown)
    again = step_of([names[row] for row in unknown])
    z, unknown = replicas.step(again)
    assert unknown == []
    np.testing.assert_allclose(lengths_of(z), np.arange(1, len(z) + 1), rtol=1e-3)
    for url in ("http://a", "http://c"):
        assert before[url] < set(servers[url].held)


def test_one_that_comes_back_gets_new_sessions_only() -> None:
    replicas, servers = three()
    lost, names = servers["http://b"], names_of(60)
    lost.error = Unreachable("gone")
    replicas.step(step_of(names))
    replicas.step(step_of(names))
    lost.error, lost.steps = None, []
    lost.searched.clear()
    replicas.model(ours)  # begins to look
    assert lost.searched.wait(SECONDS)
    while not any(lost.steps):
        replicas.model(ours)
        replicas.step(step_of([f"new{len(lost.steps)}{i}" for i in range(20)]))
    assert not set(lost.held) & set(names)
    assert not replicas.step(step_of(names, start=2))[1]


def test_a_search_keeps_no_step_waiting() -> None:
    release = threading.Event()

    class Hanging(Server):
        def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
            if self.held:  # the second time
                assert release.wait(SECONDS)
            return super().model(fingerprint)

    servers = {"http://a": Server(), "http://b": Hanging()}
    replicas = Replicas(servers)
    replicas.model(ours)
    names = names_of(20)
    replicas.step(step_of(names))
    servers["http://b"].error = TimedOut("slow")
    _, unknown = replicas.step(step_of(names, start=2))
    assert unknown
    for _ in range(3):
        replicas.model(ours)
        mine = [name for name in names if name in servers["http://a"].held]
        assert replicas.step(step_of(mine, start=2))[1] == []
    release.set()


def test_all_are_asked_at_the_same_time() -> None:
    """Each answers only once both have been asked: one after the other would wait for ever."""
    both = threading.Barrier(2)

    class Meeting(Server):
        def step(self, request: wire.StepRequest) -> tuple[NDArray[np.float32], list[int]]:
            both.wait(SECONDS)
            return super().step(request)

    replicas = Replicas({"http://a": Meeting(), "http://b": Meeting()})
    replicas.model(ours)
    assert replicas.step(step_of(names_of(20)))[1] == []


def test_the_end_of_a_session_is_told_where_it_is() -> None:
    replicas, servers = three()
    names = names_of(30)
    replicas.step(step_of(names))
    replicas.step(step_of([], closed=[*names, "never-seen"]))
    assert not any(server.held for server in servers.values())
    told = [name for server in servers.values() for step in server.steps for name in step.closed]
    assert sorted(told) == sorted(names)


def test_nobody_answers() -> None:
    replicas, servers = three()
    for server in servers.values():
        server.error = Unreachable("gone")
    with pytest.raises(Unreachable):
        replicas.step(step_of(names_of(20)))
    for server in servers.values():
        server.rests = True
    with pytest.raises(CircuitOpen):
        replicas.model(ours)


def test_the_first_contact_tells_why_nobody_answers() -> None:
    server = Server()
    server.error = Mismatch("tokenizer_fingerprint: another")
    with pytest.raises(Mismatch, match="another"):
        Replicas({"http://a": server}).model(ours)


def test_limits_are_those_that_all_keep() -> None:
    a, b = Server(max_sessions=7, max_position=50), Server(max_candidates=9, max_position=80)
    info = Replicas({"http://a": a, "http://b": b}).model(ours)
    assert (info.max_sessions, info.max_candidates, info.max_position) == (7, 9, 50)


def test_replicas_of_different_gamma_tell_the_same_lengths() -> None:
    servers = {"http://a": Server(), "http://b": Server(gamma=0.999)}
    replicas = Replicas(servers)
    info = replicas.model(ours)
    z, _ = replicas.step(step_of(names_of(30)))
    assert all(server.held for server in servers.values())
    np.testing.assert_allclose(lengths_of(z, info.gamma), np.arange(1, len(z) + 1), rtol=1e-3)


def test_part_of_a_step() -> None:
    part = part_of(step_of(names_of(4)), [1, 3], ["x"])
    assert (part.sessions, part.token_counts, part.candidate_counts) == (
        ["s1", "s3"],
        [2, 2],
        [2, 4],
    )
    assert wire.unpack_ids(part.tokens).tolist() == [2, 3, 6, 7]
    assert wire.unpack_ids(part.candidates).tolist() == [2, 3, 7, 8, 9, 10]
    assert part.closed == ["x"]


def test_a_guided_step_survives_the_loss_of_its_replica() -> None:
    """All rows are steered in the very step in which a server goes."""
    replicas, servers = three()
    guide = Guide(Sessions(replicas, ours, Counters()), Settings())
    states = {
        row: RequestState(
            LengthTarget.parse({"tokens": 30, "tolerance": None}), [1, 2], [], eos_ids=[EOS]
        )
        for row in range(20)
    }
    for output in ([], [5], [5, 6]):
        for state in states.values():
            state.output_ids = list(output)
        writes = guide.plan(torch.zeros(20, V), states)
        assert writes is not None
        logits = torch.zeros(20, V)
        writes.apply_inplace(logits)
        assert (logits != 0).any(-1).all(), "a row without values"
        if output == []:
            servers["http://a"].error = Unreachable("gone")
        if output == [5]:
            servers["http://b"].error = TimedOut("slow")
    assert set(servers["http://c"].held) == {state.session for state in states.values()}


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("http://a:1", ("http://a:1",)),
        ("http://a:1, https://b:2 ,unix:/run/s", ("http://a:1", "https://b:2", "unix:/run/s")),
        ('["http://a:1", "http://b:2"]', ("http://a:1", "http://b:2")),
        (["http://a:1", "http://b:2"], ("http://a:1", "http://b:2")),
    ],
)
def test_urls(given: Any, urls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({"lenvm": {"url": given}}).url == urls
    if isinstance(given, str):
        monkeypatch.setenv("LENVM_URL", given)
        assert load_settings().url == urls


@pytest.mark.parametrize(
    "given", ["", "a:1", "http://a:1,", "http://a,http://a", [], "[3]", "[", 3]
)
def test_wrong_urls_are_named(given: Any) -> None:
    with pytest.raises(ValueError, match="url"):
        load_settings({"lenvm": {"url": given}})
