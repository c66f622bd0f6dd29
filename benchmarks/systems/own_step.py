"""What does the plugin itself cost in a step, beside the wait for values?

    python -m benchmarks.systems.own_step

The real logits processor under Model Runner V1's interface, with the small model's tokenizer and
logits, on the CPU and in one thread. The value server is a function that answers at once, whose
time is taken off. Rows are of all kinds of targets, in tokens, words and characters, at all places
of a text that the model wrote; one that ends makes room for a new one. `passes` is what reading
all logits once and writing them once costs: no way of steering has less.

The last line is one JSON object: of each number of rows the median and the 99th percentile of a
step, and the mean of each of its parts, in milliseconds.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import count, cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cyclopts import App
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.provenance import end
from benchmarks.systems.timing import Watch, times_ms
from lenvm_vllm.commands.demo import MODEL
from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.host.names import BatchUpdate, SamplingParams
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.metrics import FOLDER
from lenvm_vllm.telemetry.progress import KEY
from lenvm_vllm.text.tokenizer import tokenizer_of
from lenvm_vllm.values.lookahead import Keys
from lenvm_vllm.values.replicas import Replicas
from trainer.output import table
from value_server.contract import wire

app = App(help=__doc__)

LENGTH = 200  # tokens of a text, or so
WORDS = LENGTH // 5 * 4
TARGETS = (
    {"tokens": LENGTH},
    {"mode": "at_most", "tokens": LENGTH},
    {"mode": "range", "min_tokens": LENGTH - 40, "max_tokens": LENGTH},
    {"mode": "at_least", "tokens": LENGTH},
    {"mode": "tilt", "beta": -5.0},
    {"words": WORDS},
    {"mode": "at_most", "words": WORDS},
    {"mode": "at_most", "characters": 4 * LENGTH},
)
MAX_TOKENS = LENGTH * 5 // 4
PROMPT = list(range(1000, 1200))
QUESTION = "Explain how a bicycle stays upright."
# part → what does it, see Watch
PARTS = {
    "telling": (
        "lenvm_vllm.engine.telling.end_probabilities",
        "lenvm_vllm.engine.telling.tell",
    ),
    "rails": ("lenvm_vllm.engine.rows.enforce_inplace",),
    "candidates": ("lenvm_vllm.engine.guide.cut_candidates",),
    "asking": ("lenvm_vllm.engine.sessions.Sessions.values",),
    "steering": ("lenvm_vllm.engine.guide.Guide._steer",),
    "wait": ("lenvm_vllm.values.replicas.Call.is_there",),
    "writes": ("lenvm_vllm.steering.candidates.Writes.apply_inplace",),
}


class Values:
    """A value server that needs no time: what is to come behind a token is told by its id."""

    rests = False

    def __init__(self, vocabulary: int, rank: int) -> None:
        """rank: of its lookahead head; 0: it has none."""
        self._random = np.random.default_rng(0)
        self._info = wire.ModelInfo(
            gamma=0.997,
            base_model="none",
            tokenizer_fingerprint="",
            vocab_size=vocabulary,
            max_position=8192,
            max_sessions=1024,
            max_candidates=64,
            lookahead_rank=rank,
        )

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        return self._info

    def keys(self, info: wire.ModelInfo) -> Keys:
        size = info.vocab_size, info.lookahead_rank
        keys = wire.pack_keys(self._random.standard_normal(size) / info.lookahead_rank**0.5)
        return Keys(wire.LookaheadKeys(model_id="", rank=info.lookahead_rank, keys=keys))

    def step(self, request: wire.StepRequest) -> wire.StepReply:
        ids = wire.unpack_ids(request.candidates)
        z = (ids * 7919 % 1000 / 500 - 1).astype(np.float32)
        counts = zip(request.starts, request.token_counts, strict=True)
        held, rank = [a + b for a, b in counts], request.lookahead_rank
        queries = self._random.standard_normal((len(held), 1 + rank)) if rank else np.empty(0)
        packed = wire.pack_logits(queries.astype(np.float32))
        return wire.StepReply(logits=wire.pack_logits(z), queries=packed, held=held)


class Batch:
    """B texts that grow by a token a step."""

    def __init__(self, rows: int, rank: int) -> None:
        self.watch = Watch()
        model = SimpleNamespace(
            **dict.fromkeys(("skip_tokenizer_init", "trust_remote_code"), False),
            **{"tokenizer": str(MODEL), "tokenizer_mode": "auto", "tokenizer_revision": None},
            **{"runner_type": "generate", "hf_config": None, "max_model_len": 8192},
        )
        parallel = {"enable_batch_sharded_sampling": False, "pipeline_parallel_size": 1}
        config = SimpleNamespace(
            additional_config={},
            model_config=model,
            parallel_config=SimpleNamespace(**parallel),
            reasoning_config=None,
            speculative_config=None,
            use_v2_model_runner=False,
        )
        tokenizer = tokenizer_of(config)
        self._end, size = tokenizer.eos_token_id, len(tokenizer)
        self._story, self._logits = written(tokenizer)
        self._served = LenvmLogitsProcessor(
            *(config, torch.device("cpu"), False),
            client=Replicas({"http://values": Values(size, rank)}),
        )
        self._keys, self._targets = count(1), cycle(TARGETS)
        self._texts: list[list[int]] = [[] for _ in range(rows)]
        self._new = [self._opened(row, row * LENGTH // rows) for row in range(rows)]

    def _opened(self, row: int, length: int) -> Any:
        """A request in `row` whose text has `length` tokens."""
        target = LengthTarget.parse(next(self._targets))
        xargs = target.to_xargs() | {KEY: f"{next(self._keys):032x}"}
        params = SamplingParams(extra_args=xargs, max_tokens=MAX_TOKENS, temperature=0.8)
        params.update_from_generation_config({}, self._end)
        self._texts[row] = [self._next(place) for place in range(length)]
        return row, params, PROMPT, self._texts[row]

    def _next(self, place: int) -> int:
        return self._story[place % len(self._story)]

    def step(self) -> float:
        """Seconds of the plugin."""
        places = [len(text) % len(self._story) for text in self._texts]
        logits = self._logits[places]
        new, self._new = self._new, []
        self.watch.seconds.pop("wait", None)
        before = sum(self.watch.seconds.values())
        with self.watch.part("rest"):
            self._served.update_state(self._changes(new))
            self._served.apply(logits)
        self._go_on(logits)
        spent = sum(self.watch.seconds.values()) - before
        return spent - self.watch.seconds.get("wait", 0.0)

    def _changes(self, new: list[Any]) -> Any:
        if not new:
            return None
        removed = [row for row, *_ in new]
        return BatchUpdate(batch_size=len(self._texts), removed=removed, added=new, moved=[])

    def _go_on(self, logits: Tensor) -> None:
        """As sampled before, where that may still come."""
        before = [self._next(len(text)) for text in self._texts]
        closed = logits[torch.arange(len(logits)), before].isneginf().tolist()
        for row, token in enumerate(before):
            best = int(logits[row].argmax()) if closed[row] else token
            self._texts[row].append(best)
            if best == self._end or len(self._texts[row]) >= MAX_TOKENS:
                self._new.append(self._opened(row, 0))


@cache
def written(tokenizer: Any) -> tuple[list[int], Tensor]:
    """LENGTH tokens of the small model, and its logits (LENGTH, V) at each."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(0)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    wrote = model.generate(
        prompt,
        **{"min_new_tokens": LENGTH, "max_new_tokens": LENGTH, "do_sample": True},
        **{"output_logits": True, "return_dict_in_generate": True},
    )
    return wrote.sequences[0, prompt.shape[1] :].tolist(), torch.cat(wrote.logits)


def measured(rows: int, steps: int, warm: int, rank: int) -> dict[str, float]:
    """Milliseconds of a step."""
    batch = Batch(rows, rank)
    with batch.watch.over(PARTS):
        for _ in range(warm):
            batch.step()
        batch.watch.seconds.clear()
        times = [1e3 * batch.step() for _ in range(steps)]
    parts = {name: 1e3 * s / steps for name, s in batch.watch.seconds.items() if name != "wait"}
    whole = {"median": statistics.median(times), "p99": float(np.percentile(times, 99))}
    return whole | {name: parts.get(name, 0.0) for name in (*PARTS, "rest") if name != "wait"}


def passes_ms(rows: int, vocabulary: int = 49152) -> float:
    """All logits read once, and written once."""
    logits = torch.randn(rows, vocabulary)

    def both() -> None:
        logits.amax(-1)
        logits.fill_(0.0)

    return statistics.median(times_ms(both, 20))


@app.default
def main(
    rows: tuple[int, ...] = (8, 32, 256), steps: int = 100, warm: int = 20, rank: int = 0
) -> None:
    """rows: guided ones of a batch. rank: of the value model's lookahead head; 0: it has none."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        found = {b: measured(b, steps, warm, rank) | {"passes": passes_ms(b)} for b in rows}
    print(table([{"rows": b} | of for b, of in found.items()]), file=sys.stderr)
    end({f"own_ms_{b}": of for b, of in found.items()})


if __name__ == "__main__":
    app()
