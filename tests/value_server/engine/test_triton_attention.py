"""Attention in Triton against the gathering one: in Triton's interpreter, or on a GPU.

Triton decides at its import how it runs, so where there is no GPU a process of its own does it.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.seeing import Seer, digests
from tests.support.tiny import tiny_lookahead
from value_server.engine.attention import planned
from value_server.engine.cache import SlotCache
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row

CUDA, INTERPRETED = torch.cuda.is_available(), "TRITON_INTERPRET" in os.environ
DEVICE = torch.device("cuda" if CUDA and not INTERPRETED else "cpu")
runs = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="runs in a process of its own")

pytest.importorskip("triton")
from value_server.engine.triton_attention import SHARED, blocks_of  # noqa: E402

RANK = 3


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes 30 ms for each."""
    if INTERPRETED:
        monkeypatch.setattr("value_server.engine.triton_attention.PROGRAMS", 32)


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="runs here")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def rows_of(shapes: list[tuple[int, int, int]], shared: int = 0) -> tuple[list[Row], int]:
    """Rows of (tokens, new ones among them, candidates), whose texts begin with the same `shared`
    tokens and lie scattered over the slots; and how many slots there are."""
    total = sum(tokens + candidates for tokens, _, candidates in shapes) + 64
    cache = SlotCache(total, 512, 1.0, lambda: 0.0)
    random.Random(0).shuffle(cache._free)
    rows, first = [], 0
    for number, (tokens, new, candidates) in enumerate(shapes):
        begun = min(shared, tokens - new)
        text = [*range(begun), *(1000 * (number + 1) + i for i in range(tokens - begun))]
        session = cache.update(f"s{number}", 0, text, range(candidates))
        assert session is not None
        row = Row("", 0, [], session=session, begin=tokens - new, end=tokens, first=first)
        row.scored = session.candidates
        rows.append(row)
        first += row.queries
    return rows, total


DECODE = [(n, 1, 0) for n in (1, 2, 63, 64, 65, 200)]
STEPS = [(n, 1, 8) for n in (1, 30, 64, 129)] + [(40, 0, 5)]
MIXED = [(90, 90, 3), (150, 40, 0), (77, 1, 15), (1, 1, 0), (128, 17, 1), (33, 0, 1)]
CASES = {"decode": DECODE, "steps": STEPS, "mixed": MIXED, "alone": [(300, 1, 2)]}


def attention(
    rows: list[Row], slots: int, heads: tuple[int, int], dim: int, window: int | None, dtype: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """By Triton in `dtype`, and gathered in float32, on the same numbers; both (Q, heads, D)."""
    torch.manual_seed(0)
    key_heads, per_key = heads
    queries = rows[-1].place.stop
    draw = [torch.randn(key_heads, slots + 2, dim).to(DEVICE, dtype) for _ in range(2)]
    query = torch.randn(1, queries, key_heads * per_key, dim).to(DEVICE, dtype).transpose(1, 2)[0]
    found = []
    for kind, kept in (("triton", dtype), ("gathered", torch.float32)):
        given = [t.to(kept) for t in (query, *draw)]
        out = given[0].new_full((queries, key_heads * per_key, dim), float("nan"))
        for part in planned(rows, slots, DEVICE, kind, per_key):
            part.attend(*given, out, dim**-0.5, window)
        found.append(out.float())
    return found[0], found[1]


def check(case: str, heads: tuple[int, int], dim: int, window: int | None, shared: int = 0) -> None:
    rows, slots = rows_of(CASES[case], shared)
    found, expected = attention(rows, slots, heads, dim, window, torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@runs
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 7, 70])
def test_triton_is_the_gathering_one(case: str, window: int | None) -> None:
    check(case, (2, 3), 64, window)


@runs
@pytest.mark.parametrize("heads", [(2, 1), (1, 7), (1, 20)], ids=str)
def test_heads(heads: tuple[int, int]) -> None:
    check("steps", heads, 32, None, shared=20)


@runs
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_sizes_of_heads(dim: int) -> None:
    check("decode", (1, 2), dim, None)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["decode", "alone"])
def test_half_types_are_close(case: str, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16")
    rows, slots = rows_of(CASES[case])
    found, expected = attention(rows, slots, (2, 3), 64, None, dtype)
    assert (found - expected).abs().mean() < 1e-3
    assert (found - expected).norm() < 4e-3 * expected.norm()  # what rounding the output costs


@runs
def test_many_rows_are_not_shared_out() -> None:
    rows, slots = rows_of([(5 + i % 60, 1, 0) for i in range(40)])
    found, expected = attention(rows, slots, (2, 1), 16, None, torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@runs
def test_values_of_an_engine_depend_neither_on_it_nor_on_graphs() -> None:
    """Random histories: texts that go on, are rewound, and share their beginnings; values of
    candidates, and queries behind texts."""
    draw = random.Random(0)
    engines = [
        Engine(tiny_lookahead(RANK).to(DEVICE), slots=200, pass_tokens=16, **options)
        for options in ({"attention": "gathered"}, {"attention": "triton", "graphs": True})
    ]
    texts: dict[str, list[int]] = {}
    for _ in range(40 if DEVICE.type == "cuda" else 4):
        rows = []
        for name in draw.sample("abc", 2):
            text = texts.get(name, [])
            start = draw.choice([0, len(text), len(text) // 2])
            new = [draw.randrange(3) for _ in range(draw.choice([1, 2, 12]))]
            texts[name] = (text[:start] + new)[:20]
            start = min(start, 19)
            rank = draw.choice([0, RANK])
            rows.append((name, start, texts[name][start:], draw.sample(range(9), 3), rank))
        jobs = [Job([Row(*row) for row in rows]) for _ in engines]
        z = [engine.run(job).logits for engine, job in zip(engines, jobs, strict=True)]
        queries = [np.concatenate([row.lookahead for row in job.rows]) for job in jobs]
        assert np.isfinite(z[0]).all()
        assert np.isfinite(queries[0]).all()
        np.testing.assert_allclose(z[0], z[1], atol=1e-4)
        np.testing.assert_allclose(queries[0], queries[1], atol=1e-4)
    assert engines[1]._graphs._graphs


@runs
def test_behind_a_picture_as_everywhere(tmp_path: Path) -> None:
    """Its own pass gathers; positions behind it are less than places."""
    found = []
    for options in ({"attention": "gathered"}, {"attention": "triton", "graphs": True}):
        seer = Seer.of("qwen3-vl", tmp_path)
        seer.value.to(DEVICE)
        engine, text = Engine(seer.value, slots=200, **options), seer.text([0])
        seer.show(engine, [0])
        rows = [Row("a", 0, text, [1, 2], pictures=digests([0]))]
        rows += [Row("a", len(text) + n, [5], [1, 2]) for n in range(3)]
        for row in rows:
            engine.run(Job([row]))
        found.append([row.logits for row in rows])
    np.testing.assert_allclose(found[1], found[0], atol=2e-3)
    assert np.ptp(found[0]) > 0.05


@runs
def test_where_a_graph_fails_passes_go_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("no capture")

    monkeypatch.setattr("value_server.engine.graphs.Graphs._captured", fails)
    engine = Engine(tiny_lookahead(RANK).to(DEVICE), slots=200, attention="triton", graphs=True)
    for start in range(3):
        assert np.isfinite(engine.run(Job([Row("a", start, [start], [0])])).logits).all()
    assert not engine._graphs._works


@pytest.mark.parametrize(
    ("lines", "slot_bytes", "shared", "blocks"),
    [
        (16, 512, SHARED, (128, 2)),  # a step of one query, heads of 128 numbers in bfloat16
        (64, 512, SHARED, (64, 3)),
        (16, 1024, SHARED, (64, 3)),
        (16, 2048, SHARED, (64, 1)),
        (16, 512, 99 << 10, (64, 2)),  # a smaller card
        (16, 4096, 48 << 10, (64, 1)),
    ],
)
def test_what_is_staged_fits_into_shared_memory(
    lines: int, slot_bytes: int, shared: int, blocks: tuple[int, int]
) -> None:
    assert blocks_of(lines, slot_bytes, shared) == blocks
