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

    def __init__(self, sentences: Sentences | None) -> None:
        """sentences: None of a tokenizer that cannot tell them."""
        self._sentences = sentences
        self._ids = torch.tensor(sentences.ids if sentences else [], dtype=torch.long)
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
        """Of (L, M) tokens those that end no sentence of their texts."""
        assert self._sentences is not None
        for row, open_ in enumerate(~log_q.isneginf()):
            if open_.any():
                ends = self._sentences.ends(states[row].written, tokens[row].tolist())
                log_q[row] = log_q[row].masked_fill(~torch.tensor(ends), -torch.inf)

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

    def may_end(self, state: RequestState, landing: Landing[float], own: Tensor) -> bool:
        """Whether a text ends here: a sentence or line of it has ended in the landing, and no other
        one fits. own: (V,) logits of its row."""
        aim, exact = state.aim, landing.behind > 0
        early = aim.mode != "equal_to" and aim.fewest > state.generated + 1
        # A marker of several tokens would be left open: it is forced by a rail, or comes by itself.
        in_pieces = state.target.scope == "thinking" and len(state.markers.think_end) > 1
        by_value = state.valued and state.target.policy == "greedy"  # the paper's rule, as it is
        opened = landing.share(0) >= 0
        if not opened and not (exact and state.is_railed):
            return False
        if state.held or early or in_pieces or by_value:
            return False
        if self._sentences is None or not self._sentences.is_whole(state.written):
            return False
        ends = [token for token in state.proper_ends if token < len(own)]
        sentence = self._sentences.tokens_a_sentence(state.written)
        near = exact and opened and landing.target < sentence / 2
        fits = landing.closes >= sentence * (1 if opened else FITS)
        return (near or not fits) and bool((own[ends] > -torch.inf).any())
