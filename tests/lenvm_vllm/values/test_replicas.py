"""Several value servers as one: whose a session is, and what each of them is told."""

import threading

from lenvm_vllm.values.client import Unreachable
from lenvm_vllm.values.patience import FEW
from lenvm_vllm.values.replicas import Replicas, rank
from tests.support.replicated import SECONDS, URLS, Server, ask, check, names_of, ours, soon, three
from value_server.contract import wire


def test_each_session_has_one_replica_and_gets_its_own_answer() -> None:
    replicas, servers = three()
    names = names_of(60)
    check(ask(replicas, names), names)
    assert sorted(n for server in servers.values() for n in server.held) == sorted(names)
    assert all(len(server.held) > 8 for server in servers.values())  # 20 expected, deviation 3.7
    for name in names:
        (url,) = (url for url, server in servers.items() if name in server.held)
        assert url == max(URLS, key=lambda url: rank(url, name))
    before = {url: set(server.held) for url, server in servers.items()}
    check(ask(replicas, names, start=2), names)
    assert {url: set(server.held) for url, server in servers.items()} == before


def test_a_lost_replica_moves_its_own_sessions_only() -> None:
    replicas, servers = three()
    names = names_of(60)
    ask(replicas, names)
    before = {url: set(server.held) for url, server in servers.items()}
    servers["http://b"].error = Unreachable("gone")
    told = ask(replicas, names, start=2)
    lost = [name for name in names if name not in told]
    assert set(lost) == before["http://b"]
    assert replicas.live == ["http://a", "http://c"]
    check(ask(replicas, lost), lost)
    for url in ("http://a", "http://c"):
        assert before[url] < set(servers[url].held)


def test_one_that_comes_back_gets_new_sessions_only() -> None:
    replicas, servers = three()
    lost, names = servers["http://b"], names_of(60)
    lost.error = Unreachable("gone")
    ask(replicas, names)
    ask(replicas, names)
    lost.error, lost.steps = None, []
    lost.searched.clear()
    replicas.model(ours)  # begins to look
    assert lost.searched.wait(SECONDS)
    while not any(lost.steps):
        replicas.model(ours)
        ask(replicas, [f"new{len(lost.steps)}{i}" for i in range(20)])
    assert not set(lost.held) & set(names)
    check(ask(replicas, names, start=2), names)


def test_all_are_asked_at_the_same_time() -> None:
    """Each answers only once both have been asked: one after the other would wait for ever."""
    both = threading.Barrier(2)

    class Meeting(Server):
        def step(self, request: wire.StepRequest) -> wire.StepReply:
            both.wait(SECONDS)
            return super().step(request)

    replicas = Replicas({"http://a": Meeting(), "http://b": Meeting()})
    replicas.model(ours, soon())
    names = names_of(20)
    check(ask(replicas, names), names)


def test_the_end_of_a_session_is_told_where_it_is() -> None:
    replicas, servers = three()
    names = names_of(30)
    ask(replicas, names)
    assert not replicas.has_closed
    for name in [*names, "never-seen"]:
        replicas.close(name)
    assert replicas.has_closed
    ask(replicas, ["new"])
    assert not replicas.has_closed
    assert [name for server in servers.values() for name in server.held] == ["new"]
    told = [name for server in servers.values() for step in server.steps for name in step.closed]
    assert sorted(told) == sorted(names)


def test_limits_are_those_that_all_keep() -> None:
    a, b = Server(max_sessions=7, max_position=50), Server(max_candidates=9, max_position=80)
    info = Replicas({"http://a": a, "http://b": b}).model(ours, soon())
    assert (info.max_sessions, info.max_candidates, info.max_position) == (7, 9, 50)


def test_replicas_of_different_gamma_tell_the_same_lengths() -> None:
    servers = {"http://a": Server(), "http://b": Server(gamma=0.999)}
    replicas = Replicas(servers)
    gamma = replicas.model(ours, soon()).gamma
    names = names_of(30)
    check(ask(replicas, names, gamma=gamma), names)
    assert all(server.held for server in servers.values())


def test_answers_without_any_values_tell_nothing_of_how_long_values_take() -> None:
    """Where no text has room they come at once. Steps then waited so shortly that hundreds went
    without values when there was room again."""
    replicas = Replicas({"http://a": Server()})
    replicas.model(ours, soon())
    patience = replicas._replicas[0].patience
    for _ in range(2 * FEW):
        assert ask(replicas, ["s"], start=9) == {}  # more than the server holds
    assert patience.seconds(1, 0.0, SECONDS) == SECONDS
    for start in range(0, 4 * FEW, 2):
        check(ask(replicas, ["s"], start), ["s"])
    assert patience.seconds(1, 0.0, SECONDS) < SECONDS
