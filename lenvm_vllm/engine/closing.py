"""How texts are led to the end of a sentence, a line or a code block, and end there."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from lenvm_vllm.engine.goals import landing_in_tokens
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.candidates import Candidates
from lenvm_vllm.steering.closers import likely_closers, with_more
from lenvm_vllm.steering.constants import FITS
from lenvm_vllm.text.sentences import Sentences
from value_server.contract.units import CHARACTERS


class Closing:
    """Finds the candidates that end a sentence, and the texts that are whole."""

    def __init__(self, sentences: Sentences | None, max_kl: float) -> None:
        """sentences: None of a tokenizer that cannot tell them.
        max_kl: of a request that has none of its own."""
        self._sentences, self._max_kl = sentences, max_kl
        self._ids = torch.tensor(sentences.ids if sentences else [], dtype=torch.long)
        self._is_end = _table(sentences.ids if sentences else [])
        self._is_break = _table(sentences.breaks if sentences else [])
        line = sentences.line if sentences else None
        self.lines = [] if line is None else [line]

    def widened(
        self,
        found: Candidates,
        logits: Tensor,
        states: Mapping[int, RequestState],
        closing: Tensor,
    ) -> Candidates:
        """With likely ends of sentences besides, in the rows that may be led to one.

        logits: (batch, V). states: of the B rows in order. closing: (B,) as of `Goals`.
        """
        ids, rows = self._ids[self._ids < logits.shape[-1]], list(states)
        lands = ((closing >= 0) & (closing <= 1)).nonzero()[:, 0].tolist()
        at = [i for i in lands if states[rows[i]].is_known and _leads_to_end(states[rows[i]])]
        if not at or not len(ids):
            return found
        rows = [rows[i] for i in at]
        led = [states[row] for row in rows]
        temperature = torch.tensor([s.temperature or 1.0 for s in led], dtype=torch.float64)
        mine = found.pick(torch.tensor(at)), temperature, ids.to(logits.device), closing[at]
        tokens, log_q = likely_closers(logits, rows, *mine)
        self._drop_others_inplace(tokens, log_q, led)
        return found if log_q.isneginf().all() else with_more(found, at, tokens, log_q)

    def _drop_others_inplace(
        self, tokens: Tensor, log_q: Tensor, states: Sequence[RequestState]
    ) -> None:
        """Of (L, M) tokens those that end no sentence of their texts, or all of a text."""
        assert self._sentences is not None
        likely = ~log_q.isneginf()
        closes = self._closes(tokens, likely, [state.written for state in states])
        for row, place in closes.nonzero().tolist():
            closes[row, place] = int(tokens[row, place]) not in states[row].ends
        log_q[~closes] = -torch.inf

    def _closes(self, tokens: Tensor, asked: Tensor, texts: Sequence[list[int]]) -> Tensor:
        """(B, K) bool: those of `tokens` (B, K) that end a sentence of their text; of `asked`
        (B, K) bool alone."""
        closes = torch.zeros_like(asked)
        at = asked.nonzero(as_tuple=True)
        pairs = zip(at[0].tolist(), tokens[at].tolist(), strict=True)
        found: list[bool] = []
        for row, own in groupby(pairs, itemgetter(0)):
            assert self._sentences is not None
            found += self._sentences.ends(texts[row], [token for _, token in own])
        closes[at] = torch.tensor(found, dtype=torch.bool)
        return closes

    def among(
        self, found: Candidates, states: Sequence[RequestState], heeded: Tensor, lands: Tensor
    ) -> Tensor:
        """(B, K) bool: those of texts that are led to the end of a sentence.

        heeded: (B,) bool, as of `Goals.heeds_sentences`. lands: (B,) bool, texts in their landing:
        before it lines may end, though no sentences.
        """
        # In a landing none does behind which another sentence would have to follow.
        leads = torch.tensor([_leads_to_end(state) for state in states])
        some = found.kept & (heeded & (leads | ~lands))[:, None]
        may = _in(self._is_end, found.ids) & some & found.own
        may &= lands[:, None] | ~_in(self._is_break, found.ids)
        return self._closes(found.ids, may, [s.written for s in states]) | (some & ~found.own)

    def behind_whole(
        self, states: Mapping[int, RequestState], landed: Tensor, logits: Tensor
    ) -> dict[int, list[int]]:
        """Tokens of which the next has to be one, in the rows in which a sentence or line has ended
        in the landing and no other one fits: the ends, or an empty line while a rail holds these.

        states: of B rows that have been asked about. landed: (B,) as of `Goals`.
        logits: (batch, V).
        """
        opened = zip(states.items(), (landed >= 0).tolist(), strict=True)
        found = {
            row: self._behind_whole(state, lands, logits[row])
            for (row, state), lands in opened
            if (lands or state.aim.mode == "equal_to")
            and state.valued is not None
            and state.is_known
        }
        return {row: tokens for row, tokens in found.items() if tokens}

    def _behind_whole(self, state: RequestState, opened: bool, own: Tensor) -> list[int]:
        """Of one row; empty where any token may come. opened: its landing. own: (V,) its logits."""
        aim = state.aim
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
        if self._sentences is None or not self._sentences.is_whole(state.written, own):
            return []
        tokens = self.lines if state.held else state.proper_ends
        tokens = [token for token in tokens if token < len(own) and own[token] > -torch.inf]
        return tokens if state.held or not self._fits(state) else []

    def _fits(self, state: RequestState) -> bool:
        """Whether another sentence does."""
        assert self._sentences is not None
        landing = landing_in_tokens(state)
        sentence = self._sentences.tokens_a_sentence(state.written)
        if landing.share(0) < 0:
            return landing.closes >= FITS * sentence
        near = landing.behind > 0 and landing.target < sentence / 2
        return not near and landing.closes >= sentence


def _leads_to_end(state: RequestState) -> bool:
    """Whether the end of the text may stand behind the next token, or behind empty lines."""
    if not state.is_railed:
        return True
    if state.counter is not None:
        return state.amount + (state.target.unit == CHARACTERS) >= state.bounds.first
    is_filled = state.aim.mode == "equal_to" and not state.has_grammar
    return is_filled or not state.rails.suppresses(state.generated + 1)


def _table(ids: Sequence[int]) -> Tensor:
    """(N,) bool, whether each token is one of `ids`; the last entry is for all behind them."""
    table = torch.zeros(max(ids, default=-1) + 2, dtype=torch.bool)
    table[list(ids)] = True
    return table


def _in(table: Tensor, tokens: Tensor) -> Tensor:
    """Bool: which of `tokens` are in the table."""
    return table[tokens.clamp(max=len(table) - 1)]
