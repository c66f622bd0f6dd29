"""The value model on the slot cache: many sessions, one forward pass.

A slot keeps its token's logit z next to its keys and values, and its query (b and q) if the model
has a lookahead head, so a state that was scored once (a repeated request, the first candidates of
64 samples of one prompt) is never forwarded again.

Not thread-safe: one thread, the batcher's, owns it. Only `check` may be called from others.

Legend: Q queries of a pass, K candidates, T tokens, H hidden size, r rank of the lookahead head.
"""

import logging
import time
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from value_server.engine import selfcheck
from value_server.engine.attention import NAME, Kind, Pass, fastest, planned
from value_server.engine.cache import SlotCache
from value_server.engine.errors import ModelError, PassFailedError
from value_server.engine.heads import Heads
from value_server.engine.job import Job, JobResult, Row
from value_server.engine.limits import Limits
from value_server.engine.linear import compile_inplace, pack_inplace
from value_server.engine.memory import KVPool, on_device
from value_server.engine.pace import Pace
from value_server.engine.picturecheck import PictureCheck
from value_server.engine.scheduler import SHORT, is_done, missing, next_pass
from value_server.engine.session import Session
from value_server.engine.shares import Shares, written_by
from value_server.engine.showing import Placed, Showing
from value_server.engine.shown import Ids
from value_server.model.lookahead import Lookahead
from value_server.model.value_model import ValueModel

log = logging.getLogger(__name__)


class Engine:
    """Serves `model`, whose backbone it changes for good: slot attention, packed linear layers.

    weight_dtype: of the linear layers, see linear.py; by default that of the model.
    compiled: MLPs and norms go through torch.compile, and no layer is packed.
    attention: by default what is fastest on the device. graphs: see graphs.py; with "triton" only,
    and not with compiled.
    picture_bytes: of pictures' embeddings that are held.
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
        attention: Kind | None = None,
        graphs: bool = False,
        picture_bytes: int = 1 << 30,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model.eval()
        with selfcheck.named(model):
            self._plain = selfcheck.plain(model)
            self._picture_check = PictureCheck(model, model.sight) if model.sight else None
            self.max_position = selfcheck.max_position(model)
        self.lookahead: Lookahead | None = getattr(model, "lookahead", None)
        self.lookahead_rank = self.lookahead.rank if self.lookahead else 0
        model.backbone.set_attn_implementation(NAME)
        first = next(model.backbone.parameters())
        self.device = first.device
        self.attention = attention or fastest(self.device)
        self.graphs = graphs and not compiled  # the two have not been tried together
        heads = getattr(model.config, "num_attention_heads", 1)
        self._per_key = heads // (getattr(model.config, "num_key_value_heads", None) or heads)
        if compiled:
            compile_inplace(model.backbone)
        else:
            pack_inplace(model.backbone, weight_dtype or first.dtype)
        self.vocab_size = int(model.backbone.get_input_embeddings().weight.shape[0])
        self.pace = Pace(pass_tokens, prefill_tokens)
        self.cache = SlotCache(slots, max_sessions, session_ttl, now, client_sessions, client_slots)
        self.showing = Showing(model.sight, self.cache, picture_bytes) if model.sight else None
        self.max_candidates, largest = max_candidates, self.cache.largest
        limits = (self.vocab_size, max_candidates, self.max_position, largest, bool(self.showing))
        self.limits = Limits(*limits)
        self.pool = KVPool(slots)
        # Tokens and candidates that went through the model, or were answered from slots.
        self.forwarded = self.saved = 0
        self._windows: dict[int, int | None] = {}  # see attention.Pass
        self._heads = Heads(slots, self.lookahead_rank)
        self._token = np.frombuffer(self.cache.token, dtype=np.int32)
        self._ready = np.frombuffer(self.cache.ready, dtype=np.uint8)

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse the rows that no state of the server could answer."""
        self.limits.check(rows)

    def admit(self, job: Job) -> None:
        """Give the rows of the job their slots; those that have no room are settled without."""
        for name in job.closed:
            job.found += self.cache.close(name)
        created, asked = self.cache.created, 0
        for row in job.rows:
            if row.refused or row.dropped:
                continue
            placed = self.showing.place(row, job.texts) if self.showing else row
            if placed is None:
                continue
            row.session = self.cache.update(
                row.name, row.start, placed.tokens, placed.candidates, job.client, not job.texts
            )
            told = row.start + len(placed.tokens)
            row.held = told if row.session else min(row.start, self.cache.held(row.name))
            asked += len(placed.tokens) + len(placed.candidates) if row.session else 0
            if self.showing and row.session and isinstance(placed, Placed):
                self.showing.keep(row, placed.shown)
        self.saved += asked - (self.cache.created - created)

    def release(self, job: Job) -> None:
        """The job is over, well or not: its sessions may be idle again, those of texts go."""
        for row in job.rows:
            if job.texts:
                self.cache.close(row.name)
            elif row.session:
                self.cache.unpin(row.session)

    def leave(self, job: Job) -> None:
        """Nobody waits for the job: of its candidates none is computed any more."""
        for row in job.rows:
            if row.session and not row.settled:
                self.cache.drop_candidates(row.session)

    def drop(self, job: Job, names: set[str]) -> None:
        """Another job asks for these sessions: compute nothing of them for this one."""
        for row in job.rows:
            if row.name in names and not row.dropped:
                row.dropped = True
                if row.session:
                    self.cache.unpin(row.session)
                    row.session = None

    def settle(self, job: Job) -> bool:
        """Give the rows that are done their values; whether all rows of the job are settled."""
        done, left = [], 0
        for row in job.rows:
            session = row.session
            if session is None or row.z is not None:
                continue
            if session.lost:
                row.held, row.session = 0, None
            elif is_done(self.cache, session):
                if not row.lacks:
                    session.hold = None  # all of its pictures are computed
                done.append((row, session))
            else:
                left += 1
        for row in self._heads.read(done, job.texts) if done else ():
            self.refuse(row, "the model gave a logit that is not a finite number")
        return not left

    def only_prefills(self, job: Job) -> bool:
        """Whether all that is left of the job are texts that need more than a pass: those who have
        their values do not wait for them."""
        most = max(SHORT, self.pace.limits().prefill)
        left = (row.session for row in job.rows if row.session and not row.settled)
        return all(missing(self.cache, session) > most for session in left)

    def refuse(self, row: Row, why: str) -> None:
        """The row never gets values, and its text goes."""
        row.refused, row.held, row.session = ModelError(why), 0, None
        self.cache.close(row.name, keep=False)
        self.cache.forget_kept()  # a slot of it may be part of one

    def advance(self, jobs: Sequence[Job]) -> int:
        """One forward pass for all jobs; returns its Q.

        Raises PassFailedError. No slot then counts as computed that is not, and the pass may be
        repeated.
        """
        waiting = chain.from_iterable(job.rows for job in jobs)
        rows = next_pass(self.cache, waiting, self.pace.limits())
        if not rows:
            return 0
        written = written_by(rows)
        try:
            self._heads.write(written, self._forward(rows, self._token[written], written))
        except Exception as error:
            raise PassFailedError(rows, len(written), error) from error
        self._ready[written] = 1
        self.forwarded += len(written)
        return len(written)

    def works(self) -> bool:
        """Whether a pass of a single token works, in a slot that no text has."""
        session = Session("", "", 0, path=array("i", [self.pool.spare]))
        row = Row("", 0, [], session=session, end=1)
        try:
            self._forward([row], np.zeros(1), row.slots(0))
        except Exception as error:  # as many as a pass has
            log.warning("value engine: a pass of one token failed: %r", error)
            return False
        return True

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Row], tokens: NDArray[Any], written: Ids) -> NDArray[Any]:
        """(Q, 1) float32 z of a pass, or (Q, 2 + r) z, b and q, whose keys and values go into the
        slots `written`."""
        if self.showing and tokens.min() < 0:
            embed = self.model.backbone.get_input_embeddings()
            inputs = self.showing.inputs(rows, tokens, embed, self.device)
            known = self._pass(rows, on_device(written, self.device), "gathered")
            heads = self._heads_from(known, inputs)
        else:
            heads = self._read_text(rows, tokens, written)
        numbers: NDArray[Any] = heads.cpu().numpy()
        return numbers

    def _read_text(self, rows: Sequence[Row], tokens: NDArray[Any], written: Ids) -> Tensor:
        shares = Shares.of(rows)
        positions = shares.positions
        if self.graphs and self.attention == "triton":
            heads = self._graphs.run(shares, self._per_key, tokens, positions, written)
            if heads is not None:
                return heads
        given = np.stack([tokens, positions, written]).astype(np.int64)
        ids, places, slots = on_device(given, self.device)
        return self._heads_of(ids[None], places[None], self._pass(rows, slots, self.attention))

    def _pass(self, rows: Sequence[Row], written: Tensor, kind: Kind) -> Pass:
        parts = planned(rows, self.pool.padding, self.device, kind, self._per_key)
        return Pass(self.pool, written, parts, self._windows)

    def _heads_of(self, tokens: Tensor, positions: Tensor, known: Pass) -> Tensor:
        """(1, Q) each → what `_forward` returns, on the device."""
        return self._heads_from(known, {"input_ids": tokens, "position_ids": positions})

    def _heads_from(self, known: Pass, inputs: dict[str, Any]) -> Tensor:
        output = self.model.backbone(**inputs, use_cache=False, lenvm_pass=known)
        hidden = output.last_hidden_state[0]
        heads = self.model.head(hidden)[:, None]
        if self.lookahead:
            heads = torch.cat([heads, self.lookahead(hidden)], dim=1)
        return heads.float()

    @cached_property
    def _graphs(self) -> Any:
        from value_server.engine.graphs import Graphs  # which needs Triton

        return Graphs(self._heads_of, self.pool, self._windows, self.device)

    def run(self, job: Job) -> JobResult:
        """Serve one job alone. Rows that have no room have no values."""
        self.check(job.rows)
        self.admit(job)
        try:
            while not self.settle(job):
                self.advance([job])
            return job.answer()
        finally:
            self.release(job)

    def warm_up(self) -> None:
        """Allocate the pool and prove that the model runs. Raises whatever goes wrong.

        CheckpointError names an architecture whose scores are not those of plain transformers.
        """
        name = "warm-up"
        with selfcheck.named(self.model):
            selfcheck.check(self, name, self._plain, self._windows)
            if self._picture_check:
                self._picture_check.run(self, name)
        length = min(self.pace.limits().prefill, self.max_position - 1, self.cache.largest // 2)
        text = selfcheck.text(self.model)[:1]
        for candidates in ([0], [0, 1][: self.max_candidates]):
            row = Row(name, 0, text * length, candidates, self.lookahead_rank)
            for error in self.run(Job([row])).refused.values():
                raise error
        self.cache.close(name, keep=False)
        self.forwarded = self.saved = 0
        self.cache.prefix_tokens = self.cache.prefix_hits = 0
