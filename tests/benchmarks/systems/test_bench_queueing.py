"""The simulated queue: against examples by hand and a naive simulation, a step at a time."""

import numpy as np
import pytest

from benchmarks.systems.queueing import ARMS, NEIGHBOURS, Engine, Texts, figures, simulated

NOTHING = np.zeros(2)


def naive(
    engine: Engine, arrivals: list[float], lengths: list[int], places: list[float], cost: float
) -> list[float]:
    """One step at a time."""
    new, waiting, running = set(range(len(arrivals))), set(), {}
    ready = [arrival + cost * (not engine.shared) for arrival in arrivals]
    clock, done = 0.0, {}
    while new or waiting or running:
        if not waiting and not running:
            clock = max(clock, min(ready[i] for i in new))
        while there := [i for i in new if ready[i] <= clock]:
            first = min(there, key=lambda i: arrivals[i])
            new.remove(first)
            waiting.add(first)
            clock += cost * engine.shared
        while waiting and len(running) < engine.slots:
            best = min(waiting, key=lambda i: (places[i], i))
            waiting.remove(best)
            running[best] = lengths[best]
        clock += engine.step_s(len(running))
        running = {i: left - 1 for i, left in running.items()}
        done |= {i: clock for i, left in running.items() if not left}
        running = {i: left for i, left in running.items() if left}
    return [done[i] - arrivals[i] for i in range(len(arrivals))]


def engine(slots: int = 1, **more: object) -> Engine:
    return Engine(slots=slots, at=(1,), step_ms=(1000.0,), **more)  # type: ignore[arg-type]


def test_the_shortest_goes_first_and_nobody_who_runs_is_displaced() -> None:
    """The first one runs, 4 s; then either the second, of 10 s, or the third, of 1 s."""
    arrivals, lengths = np.array([0.0, 1.0, 2.0]), np.array([4, 10, 1])
    none = np.zeros(3)
    first = engine().latencies(arrivals, lengths, arrivals, none)
    assert first.tolist() == [4.0, 13.0, 13.0]
    shortest = engine().latencies(arrivals, lengths, lengths.astype(float), none)
    assert shortest.tolist() == [4.0, 14.0, 3.0]


def test_what_is_asked_delays_the_request_and_holds_up_the_engine() -> None:
    arrivals, lengths = np.array([0.0, 2.5]), np.array([4, 1])
    cost = np.array([0.5, 0.5])
    alone = engine(2, shared=False).latencies(arrivals, lengths, NOTHING, cost)
    assert alone.tolist() == [4.5, 2.0]  # from 0.5; ready at 3.0, in the step from 3.5
    both = engine(2).latencies(arrivals, lengths, NOTHING, cost)
    assert both.tolist() == [5.0, 1.5]  # it stands still from 0 and from 2.5, half a second each


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_as_the_naive_simulation(seed: int, shared: bool) -> None:
    chance = np.random.default_rng(seed)
    own = Engine(slots=3, at=(1, 3), step_ms=(30.0, 50.0), shared=shared)
    arrivals = np.cumsum(chance.exponential(0.4, 60))
    lengths, places = chance.integers(1, 40, 60), chance.random(60)
    cost = float(chance.choice([0.0, 0.02]))
    found = own.latencies(arrivals, lengths, places, np.full(60, cost))
    assert found == pytest.approx(naive(own, [*arrivals], [*lengths], [*places], cost))


def texts(count: int = 200) -> Texts:
    """Two completions a prompt, as long as half or twice what was predicted of it."""
    names = np.array([str(i // 2) for i in range(count)])
    forecasts = np.repeat(np.geomspace(10, 1000, count // 2), 2)
    lengths = np.rint(forecasts * np.tile([0.5, 2.0], count // 2)).astype(np.int64)
    return Texts(names, np.full(count, 30.0), lengths, forecasts)


def test_quantiles_are_of_other_prompts_like_it() -> None:
    own = texts()
    low, high = own.quantiles(0.5), own.quantiles(0.9)
    middle = slice(NEIGHBOURS, -NEIGHBOURS)
    assert (high >= low).all()
    assert (low[middle] > 0.4 * own.forecasts[middle]).all()
    assert (np.abs(high / own.forecasts - 2)[middle] < 0.5).all()
    changed = Texts(own.prompts, own.prompt_tokens, own.lengths.copy(), own.forecasts)
    changed.lengths[:2] = 10**6  # of one prompt: its own forecast is not of them
    assert changed.quantiles(0.9)[:2].tolist() == high[:2].tolist()


def test_order_by_length_shortens_the_mean_and_is_told_with_intervals() -> None:
    own, busy = texts(), Engine()
    scores = {arm: own.scores(arm) for arm in ARMS}
    costs = np.full(4, 0.01)
    runs = [simulated(own.lengths, scores, costs, busy, 1.1, 300, seed) for seed in range(5)]
    rows = {row["arm"]: row for row in figures(runs, 1.1)}
    assert rows["fcfs"]["mean ratio"].value == 1.0
    assert rows["oracle"]["mean ratio"].value < rows["forecast"]["mean ratio"].high
    assert rows["forecast"]["mean ratio"].high < 1
    assert (rows["forecast"]["runs"], rows["forecast"]["n"]) == (5, 1500)
    assert rows["forecast"]["mean ratio"].low < rows["forecast"]["mean ratio"].value


def test_a_full_engine_has_a_load_of_one() -> None:
    own = Engine(slots=8)
    assert own.rate(1.0, 100.0) == pytest.approx(8 / (0.046 * 100))
    with pytest.raises(ValueError, match="step_ms"):
        Engine(at=(1,), step_ms=(1.0, 2.0)).check()
