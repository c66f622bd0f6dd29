"""What does the engine reach of what a device could do?

    python -m benchmarks.systems.device --shapes 1.5B 0.5B 135M

Backbones of real shapes with random weights, so nothing is fetched. A step of a session is one new
token and K candidates behind a prefix of P tokens: K = 8 is an exact step, K = 0 what lookahead
asks. Each is measured in several modes of the engine, one after the other on the same slots.

Roof: the larger of bytes (weights of the linear layers, keys and values of all prefixes) over the
copy bandwidth and FLOPs of the linear layers over the rate of matrix products, both measured in
this run. `share` is roof over step.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any, Literal

import torch
from cyclopts import App, Parameter
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from benchmarks.provenance import end
from benchmarks.systems.scoring import Ours
from benchmarks.systems.timing import times_ms
from trainer.output import table
from value_server.contract.checkpoint import LenvmConfig
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row
from value_server.engine.line import HEADROOM
from value_server.model.value_model import ValueHead, ValueModel

app = App(help=__doc__, default_parameter=Parameter(consume_multiple=True))
EMITTED = 7  # none of the candidates
Mode = Literal["gathered", "triton", "graphs"]
MODES: tuple[Mode, ...] = ("gathered", "triton", "graphs")


def sizes(hidden: int, inner: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 8192,
    }


SHAPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "tiny": (LlamaConfig, LlamaModel, sizes(64, 128, 2, 4, 2) | {"vocab_size": 2048}),
    # SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-1.5B
    "135M": (LlamaConfig, LlamaModel, sizes(576, 1536, 30, 9, 3) | {"vocab_size": 49152}),
    "0.5B": (Qwen2Config, Qwen2Model, sizes(896, 4864, 24, 14, 2) | {"vocab_size": 151936}),
    "1.5B": (Qwen2Config, Qwen2Model, sizes(1536, 8960, 28, 12, 2) | {"vocab_size": 151936}),
}


@dataclass(frozen=True)
class Machine:
    """bytes_per_s: of a copy, read and written; flops_per_s: of a product in the model's type."""

    name: str
    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        on_gpu = device.type == "cuda"
        size, side = (1 << 30, 8192) if on_gpu else (1 << 26, 1024)
        a = torch.randint(255, (size,), dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
        copy_s = median(times_ms(partial(b.copy_, a), 10, 3)) / 1e3
        m = torch.randn(side, side, device=device, dtype=dtype)
        product_s = median(times_ms(partial(torch.matmul, m, m), 10, 3)) / 1e3
        name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
        return cls(name, 2 * size / copy_s, 2 * side**3 / product_s)


class Steps(Ours):
    """Sessions that emit what was no candidate."""

    def step(self) -> None:
        rows = [Row(name, self.length, [EMITTED], self.candidates) for name in self.names]
        self.engine.run(Job(rows))
        self.length += 1

    def close(self) -> None:
        """What was emitted is not to be found again."""
        for name in self.names:
            self.engine.cache.close(name, keep=False)


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> ValueModel:
    config_of, model_of, options = SHAPES[shape]
    torch.manual_seed(0)
    with device:
        backbone = model_of(config_of(**options)).to(dtype)
        head = ValueHead(options["hidden_size"])
    layers = options["num_hidden_layers"]
    facts = LenvmConfig(
        gamma=0.99, base_model=shape, weights="head", num_layers=layers, tokenizer_fingerprint=""
    )
    return ValueModel(backbone, head, facts)


def build(
    shape: str, dtype: torch.dtype, device: torch.device, compiled: bool, slots: int, most: int
) -> tuple[Engine, int]:
    """An engine with something in its slots, and the parameters of its linear layers."""
    model = random_model(shape, dtype, device)
    linears = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)]
    parameters = sum(m.weight.numel() for m in linears)
    engine = Engine(
        model, slots=slots, max_sessions=most + 8, pass_tokens=16 * most + 512, compiled=compiled
    )
    engine.warm_up()
    for pools in engine.pool._layers.values():
        for pool in pools:
            pool[:, : engine.pool.padding].normal_()
    return engine, parameters


def set_mode(engine: Engine, mode: Mode) -> None:
    engine.attention = "gathered" if mode == "gathered" else "triton"
    engine.graphs = mode == "graphs"


def measure(
    engine: Engine,
    parameters: int,
    machine: Machine,
    points: Sequence[tuple[int, int, int]],
    modes: Sequence[Mode],
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row for each point (sessions, prefix, candidates) and mode; times in ms, medians."""
    itemsize = next(engine.model.backbone.parameters()).element_size()
    for sessions, prefix, candidates in points:
        steps = Steps(engine, sessions, prefix, candidates)
        queries = sessions * (1 + candidates)
        read = parameters * itemsize + sessions * prefix * engine.pool.bytes_per_slot
        flops = 2.0 * parameters * queries
        roof = 1e3 * max(read / machine.bytes_per_s, flops / machine.flops_per_s)
        for mode in modes:
            set_mode(engine, mode)
            row: dict[str, Any] = {
                "sessions": sessions,
                "prefix": prefix,
                "candidates": candidates,
                "mode": mode,
            }
            try:
                times = times_ms(steps.step, repeats, 3)
            except Exception as error:
                yield row | {"failed": f"{type(error).__name__}: {error}"[:200]}
                continue
            step = median(times)
            row |= {"step": round(step, 3), "best": round(min(times), 3), "roof": round(roof, 3)}
            yield row | {"share": round(roof / step, 3)}
        steps.close()


@app.default
@torch.inference_mode()
def main(
    *,
    shapes: list[str],
    sessions: tuple[int, ...] = (1, 8, 32, 256),
    prefixes: tuple[int, ...] = (512, 4096),
    candidates: tuple[int, ...] = (8, 0),
    modes: tuple[Mode, ...] = MODES,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    compiled: bool = False,
    repeats: int = 20,
) -> None:
    """Measure, print a line for each step as it comes and a table, and end with one JSON line.

    Parameters
    ----------
    shapes
        Of the backbone: tiny, 135M, 0.5B, 1.5B.
    sessions, prefixes, candidates
        All combinations are measured.
    modes
        Attention gathered or in Triton, and that in CUDA graphs.
    dtype
        Of the backbone.
    device
        Where it runs.
    compiled
        MLPs and norms through torch.compile.
    repeats
        Steps of each combination and mode, after three more.
    """
    kind, place = getattr(torch, dtype), torch.device(device)
    machine = Machine.measured(place, kind)
    print(json.dumps(vars(machine)), flush=True)
    points = list(product(sessions, prefixes, candidates))
    most = max(s * (p + (3 + repeats) * len(modes) + k + 16) for s, p, k in points)
    slots = most * HEADROOM // (HEADROOM - 1) + 1024  # or the last sessions would wait in the line
    rows = []
    for shape in shapes:
        engine, parameters = build(shape, kind, place, compiled, slots, max(sessions))
        for row in measure(engine, parameters, machine, points, modes, repeats):
            rows.append({"shape": shape} | row)
            print(json.dumps(rows[-1]), flush=True)
        del engine
        gc.collect()
    print(f"\n{machine.name}, {dtype}{', compiled' if compiled else ''}\n\n{table(rows)}\n")
    end({"machine": vars(machine), "compiled": compiled, "steps": rows})


if __name__ == "__main__":
    app()
