"""The value model on the slot cache: many sessions, one forward pass.

A slot keeps its token's logit z next to its keys and values, so a state that was scored once (a
repeated request, the first candidates of 64 samples of one prompt) is never forwarded again.

Not thread-safe: one thread, the batcher's, owns it. Only `check` may be called from others.

Legend: Q queries of a pass, K candidates, T tokens, H hidden size.
"""

import time
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from value_server.engine import selfcheck
from value_server.engine.attention import NAME, Pass, groups_of
from value_server.engine.cache import CacheFullError, SlotCache
from value_server.engine.errors import BusyError, ModelError, RequestError
from value_server.engine.job import Job, JobResult, Row
from value_server.engine.linear import compile_inplace, pack_inplace
from value_server.engine.memory import KVPool, on_device
from value_server.engine.scheduler import is_done, next_pass
from value_server.model.value_model import ValueModel


class Engine:
    """Serves `model`, whose backbone it changes for good: slot attention, packed linear layers.

    weight_dtype: of the linear layers, see linear.py; by default that of the model.
    compiled: MLPs and norms go through torch.compile, and no layer is packed.
    """

    def __init__(
        self,
        model: ValueModel,
        *,
        slots: int = 65536,
        max_sessions: int = 256,
        max_candidates: int = 64,
        session_ttl: float = 600.0,
        client_sessions: int | None = None,
        client_slots: int | None = None,
        pass_tokens: int = 2048,
        prefill_tokens: int = 512,
        weight_dtype: torch.dtype | None = None,
        compiled: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model.eval()
        with selfcheck.named(model):
            self._plain = selfcheck.plain(model)
            self.max_position = selfcheck.max_position(model)
        self.gamma = model.lenvm.gamma
        model.backbone.set_attn_implementation(NAME)
        first = next(model.parameters())
        self.device = first.device
        if compiled:
            compile_inplace(model.backbone)
        else:
            pack_inplace(model.backbone, weight_dtype or first.dtype)
        self.vocab_size = int(model.backbone.get_input_embeddings().weight.shape[0])
        self.max_candidates = max_candidates
        self.pass_tokens = pass_tokens
        self.prefill_tokens = prefill_tokens
        self.cache = SlotCache(slots, max_sessions, session_ttl, now, client_sessions, client_slots)
        self.pool = KVPool(slots)
        self.forwarded = 0  # tokens and candidates that went through the model
        self.saved = 0  # the same, answered from slots that were there
        self._windows: dict[int, int | None] = {}  # see attention.Pass
        self._z = np.zeros(slots, dtype=np.float32)
        self._token = np.frombuffer(self.cache.token, dtype=np.int32)
        self._ready = np.frombuffer(self.cache.ready, dtype=np.uint8)

    def check(self, rows: Sequence[Row]) -> None:
        """Raises RequestError for what no state of the server could answer."""
        self._check_ids("tokens", [row.tokens for row in rows])
        self._check_ids("candidates", [row.candidates for row in rows])
        for row in rows:
            if len(row.candidates) > self.max_candidates:
                raise RequestError(
                    f"candidate_counts: {len(row.candidates)} candidates for one session, "
                    f"at most {self.max_candidates}",
                    "candidate_counts",
                )
            length = row.start + len(row.tokens) + bool(row.candidates)
            if length > self.max_position:
                raise RequestError(
                    f"tokens: the text would be {length} tokens long with a candidate, "
                    f"the model has {self.max_position} positions",
                    "tokens",
                )

    def _check_ids(self, name: str, rows: Sequence[Sequence[int]]) -> None:
        ids = list(chain.from_iterable(rows))
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise RequestError(
                f"{name}: id {wrong} is outside the vocabulary of {self.vocab_size}", name
            )

    def admit(self, job: Job) -> None:
        """Give the job its slots. Raises BusyError; the job may be admitted again later."""
        for name in job.closed:
            job.found += self.cache.close(name)
        created = self.cache.created
        for row in job.rows:
            row.session = None
        try:
            for row in job.rows:
                row.session = self.cache.update(
                    row.name, row.start, row.tokens, row.candidates, job.client
                )
        except Exception as error:
            self.release(job)
            if isinstance(error, CacheFullError):
                raise BusyError(f"{error}: try again") from error
            raise
        asked = sum(len(row.tokens) + len(row.candidates) for row in job.rows if row.session)
        self.saved += asked - (self.cache.created - created)

    def release(self, job: Job) -> None:
        """The job is over, well or not: its sessions may be evicted again."""
        for row in job.rows:
            if row.session:
                self.cache.unpin(row.session)

    def is_done(self, job: Job) -> bool:
        """Whether `result` has everything."""
        return all(is_done(self.cache, row.session) for row in job.rows if row.session)

    @torch.inference_mode()
    def advance(self, jobs: Sequence[Job]) -> int:
        """One forward pass for all jobs; returns its Q.

        Whatever it raises, no slot counts as computed that is not, and the pass may be repeated.
        """
        waiting = chain.from_iterable(job.rows for job in jobs)
        rows = next_pass(self.cache, waiting, self.pass_tokens, self.prefill_tokens)
        if not rows:
            return 0
        written = np.concatenate([row.slots(row.begin) for row in rows])
        positions = np.concatenate([row.positions for row in rows])
        ids = self._token[written].astype(np.int64)
        groups = groups_of(rows, self.pool.padding, self.device)
        output = self.model.backbone(
            input_ids=on_device(ids, self.device)[None],  # (1, Q)
            position_ids=on_device(positions, self.device)[None],
            use_cache=False,
            lenvm_pass=Pass(self.pool, on_device(written, self.device), groups, self._windows),
        )
        z = self.model.head(output.last_hidden_state[0])  # (Q, H) → (Q,)
        self._z[written] = z.float().cpu().numpy()
        self._ready[written] = 1
        self.forwarded += len(written)
        return len(written)

    def result(self, job: Job) -> JobResult:
        """The logits of a finished job.

        Raises ModelError if one is not a finite number; the sessions of the job are then gone.
        """
        logits = [np.empty(0, dtype=np.float32)]
        texts = []
        for row in job.rows:
            if row.session is None:
                logits.append(np.full(len(row.candidates), np.nan, dtype=np.float32))
                continue
            logits.append(self._logits(row.session.candidates, job))
            if job.texts:
                texts.append(self._logits(row.session.path, job))
        unknown = [index for index, row in enumerate(job.rows) if row.session is None]
        return JobResult(np.concatenate(logits), unknown, texts)

    def _logits(self, slots: Sequence[int], job: Job) -> NDArray[np.float32]:
        z: NDArray[np.float32] = self._z[np.array(slots, dtype=np.int64)]
        if not np.isfinite(z).all():
            for row in job.rows:
                self.cache.close(row.name, keep=False)
            self.cache.forget_kept()  # the slot may be part of one
            raise ModelError("the model gave a logit that is not a finite number")
        return z

    def run(self, job: Job) -> JobResult:
        """Serve one job alone."""
        self.check(job.rows)
        self.admit(job)
        try:
            while not self.is_done(job):
                self.advance([job])
            return self.result(job)
        finally:
            self.release(job)

    def warm_up(self) -> None:
        """Allocate the pool and prove that the model runs. Raises whatever goes wrong.

        CheckpointError names an architecture whose scores are not those of plain transformers.
        """
        name = "warm-up"
        with selfcheck.named(self.model):
            self._check_backbone(name)
        length = min(self.prefill_tokens, self.max_position - 1, self.cache.size // 2)
        for candidates in ([0], [0, 1][: self.max_candidates]):
            self.run(Job([Row(name, 0, [0] * length, candidates)]))
        self.cache.close(name, keep=False)
        self.forwarded = self.saved = 0
        self.cache.prefix_tokens = self.cache.prefix_hits = 0

    def _check_backbone(self, session: str) -> None:
        ids, first = selfcheck.text(self.vocab_size), selfcheck.FIRST
        hidden: list[Tensor] = []
        hook = self.model.head.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
        try:
            self.run(Job([Row(session, 0, ids[:first])]))
            candidates = selfcheck.CANDIDATES[: self.max_candidates]
            self.run(Job([Row(session, first, ids[first:], candidates)]))
        finally:
            hook.remove()
        selfcheck.compare(self.model, self._plain, torch.cat(hidden), self._windows)
