"""How texts are led to the end of a sentence, a line or a code block, and end there."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.candidates import Candidates
from lenvm_vllm.steering.closers import likely_closers, with_more
from lenvm_vllm.steering.constants import FITS
from lenvm_vllm.steering.landing import Landing
from lenvm_vllm.text.sentences import Sentences

Landings = Mapping[int, Landing[float]]  # of each row, from its next token


class Closing:
    """Finds the candidates that end a sentence, and the texts that are whole."""

    def __init__(self, sentences: Sentences | None, max_kl: float) -> None:
        """sentences: None of a tokenizer that cannot tell them.
        max_kl: of a request that has none of its own."""
        self._sentences, self._max_kl = sentences, max_kl
        self._ids = torch.tensor(sentences.ids if sentences else [], dtype=torch.long)
        line = sentences.line if sentences else None
        self.lines = [] if line is None else [line]
        self._breaks = torch.tensor(sentences.breaks if sentences else [], dtype=torch.long)

    def widened(
        self,
        found: Candidates,
        logits: Tensor,
        states: Mapping[int, RequestState],
        landings: Landings,
    ) -> Candidates:
        """With likely ends of sentences besides, in the rows that may be led to one.

        logits: (batch, V). states: of the B rows in order.
        """
        ids = self._ids[self._ids < logits.shape[-1]]
        leads = [self._leads(state, landings[row]) for row, state in states.items()]
        if not any(leads) or not len(ids):
            return found
        at = [i for i, led in enumerate(leads) if led]
        rows = [row for row, led in zip(states, leads, strict=True) if led]
        led = [states[row] for row in rows]
        temperature = torch.tensor([s.temperature or 1.0 for s in led], dtype=torch.float64)
        closing = torch.tensor([landings[row].share(1) for row in rows], dtype=torch.float64)
        mine = found.pick(torch.tensor(at)), temperature, ids.to(logits.device), closing
        tokens, log_q = likely_closers(logits, rows, *mine)
        self._drop_others_inplace(tokens, log_q, led)
        return found if log_q.isneginf().all() else with_more(found, at, tokens, log_q)

    def _leads(self, state: RequestState, landing: Landing[float]) -> bool:
        return 0 <= landing.share(1) <= 1 and state.is_known

    def _drop_others_inplace(
        self, tokens: Tensor, log_q: Tensor, states: Sequence[RequestState]
    ) -> None:
        """Of (L, M) tokens those that end no sentence of their texts, or all of a text."""
        assert self._sentences is not None
        for row, open_ in enumerate(~log_q.isneginf()):
            if open_.any():
                here, state = tokens[row].tolist(), states[row]
                ends = zip(here, self._sentences.ends(state.written, here), strict=True)
                closes = [ends_one and token not in state.ends for token, ends_one in ends]
                log_q[row] = log_q[row].masked_fill(~torch.tensor(closes), -torch.inf)

    def among(
        self, found: Candidates, states: Sequence[RequestState], heeded: Tensor, lands: Tensor
    ) -> Tensor:
        """(B, K) bool: those of texts that are led to the end of a sentence.

        heeded: (B,) bool, as of `Goals.heeds_sentences`. lands: (B,) bool, texts in their landing:
        before it lines may end, though no sentences.
        """
        some = found.kept & heeded[:, None]
        closes = torch.isin(found.ids, self._ids) & some & found.own
        closes &= lands[:, None] | ~torch.isin(found.ids, self._breaks)
        for row in closes.any(-1).nonzero()[:, 0].tolist():
            assert self._sentences is not None
            places = closes[row].nonzero()[:, 0]
            ends = self._sentences.ends(states[row].written, found.ids[row, places].tolist())
            closes[row, places] = torch.tensor(ends)
        return closes | (some & ~found.own)

    def behind_whole(self, state: RequestState, landing: Landing[float], own: Tensor) -> list[int]:
        """Tokens of which the next has to be one, where a sentence or line has ended in the landing
        and no other one fits: the ends, or an empty line while a rail holds these. Empty: any.

        own: (V,) logits of its row.
        """
        aim, opened = state.aim, landing.share(0) >= 0
        exact = aim.mode == "equal_to"
        early = not exact and aim.fewest > state.generated + 1
        # A marker of several tokens would be left open: it is forced by a rail, or comes by itself.
        in_pieces = state.target.scope == "thinking" and len(state.markers.think_end) > 1
        by_value = state.valued and state.target.policy == "greedy"  # the paper's rule, as it is
        max_kl = self._max_kl if state.target.max_kl is None else state.target.max_kl
        may_come = opened or (exact and state.is_railed and not state.held and max_kl > 0)
        # Empty lines are no words; of characters a line may be more than one. A grammar may not
        # have done what it wants, and a thinking has its end still to come.
        fills = exact and state.counter is None and not state.has_grammar and max_kl > 0
        fills = fills and state.in_text
        waits = bool(state.held) and not fills
        if not may_come or waits or early or in_pieces or by_value:
            return []
        if self._sentences is None or not self._sentences.is_whole(state.written):
            return []
        tokens = self.lines if state.held else state.proper_ends
        tokens = [token for token in tokens if token < len(own) and own[token] > -torch.inf]
        return tokens if state.held or not self._fits(state, landing) else []

    def _fits(self, state: RequestState, landing: Landing[float]) -> bool:
        """Whether another sentence does."""
        assert self._sentences is not None
        sentence = self._sentences.tokens_a_sentence(state.written)
        if landing.share(0) < 0:
            return landing.closes >= FITS * sentence
        near = landing.behind > 0 and landing.target < sentence / 2
        return not near and landing.closes >= sentence
