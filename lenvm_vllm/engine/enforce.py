"""What the rails do to a row's logits: ends held back, or forced, no limit of words or characters
passed, and no character cut.

A token at -inf (grammar, allowed tokens) stays there, and a row is never emptied. Where not all
can be kept the upper rail is: it goes first, so that a lower rail or an end that cannot come
leaves only what it allows.
"""

import torch
from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.candidates import eos_index
from lenvm_vllm.steering.constants import GOES_ON, NATURAL
from lenvm_vllm.text.characters import LONGEST
from lenvm_vllm.text.counter import Closed
from lenvm_vllm.text.letters import Letters

Tokens = dict[int, list[int]]  # of a row

_FIRST = 64  # tokens


def enforce_inplace(logits: Tensor, states: dict[int, RequestState], letters: Letters) -> Tokens:
    """logits: (batch, V). Returns of each row that is forced the tokens of which one must come."""
    held, broken, due = _rails_in(states, letters)
    due |= _limit_inplace(logits, {row: s for row, s in states.items() if s.is_limited}, due)
    _hold_inplace(logits, held)
    _hold_inplace(logits, broken)
    _force_inplace(logits, due)
    return due


def _rails_in(states: dict[int, RequestState], letters: Letters) -> tuple[Tokens, Tokens, Tokens]:
    """Ends that the next token must not be, parts of characters that it must not be, and tokens
    of which it must be one; no character is cut."""
    held, broken, due = {}, {}, {}
    characters = letters.characters
    for row, state in states.items():
        text = state.output_ids
        whole = not text or text[-1] not in characters.pieces
        if whole and (calm := state.calm) is not None:
            held[row] = calm
            continue
        room = state.text_left
        missing = characters.missing(text)
        held[row], due[row] = state.held, state.force(in_character=missing > 0)
        if missing and not due[row]:
            held[row] = [*held[row], *state.ends]
        if not due[row] and room is not None and room < LONGEST:
            broken[row] = characters.unfinished(text, room)
            due[row] = characters.continuing(text, room) if missing > room else []
        if not due[row] and state.has_last_word and letters.ends_sentence(text):
            due[row] = state.proper_ends
    held, broken, due = (
        {row: tokens for row, tokens in rows.items() if tokens} for rows in (held, broken, due)
    )
    return held, broken, due


def _limit_inplace(logits: Tensor, states: dict[int, RequestState], known: Tokens) -> Tokens:
    """Close all tokens but the ends with which a limit of words or characters would be passed.

    known: of rows that are forced anyway. Returns the ends of rows whose last word is whole and
    whose sentence the model would not end.
    """
    due: Tokens = {}
    alike: dict[Closed, list[int]] = {}  # most rows are far from their limits
    for row, state in states.items():
        assert state.counter is not None
        closed = state.counter.closed(state.room, logits.device)
        if row not in known and state.has_last_word:
            if (last := _closed_in_last_word(logits[row], state)) is None:
                due[row] = state.proper_ends
            closed = last or closed
        alike.setdefault(closed, []).append(row)
    for closed, rows in alike.items():
        ends = [[*states[row].ends, *states[row].proper_ends] for row in rows]
        _close_inplace(logits, rows, closed, ends)
    return due


def _closed_in_last_word(own: Tensor, state: RequestState) -> Closed | None:
    """A word that is begun is ended, and then its sentence is closed; by its next token the model
    tells where it is. None: only the end is left. own: (V,) logits of the row."""
    counter, on = state.counter, own.device
    assert counter is not None
    closed = counter.closed(state.room, on).mask[: len(own)]
    goes_on, closes = (mask[: len(own)] & ~closed for mask in counter.units.last_word(on))
    p = own.softmax(-1)
    ends = [end for end in state.ends if end < len(own)]
    if p[: len(closed)][goes_on].sum() > GOES_ON:
        return Closed(~goes_on)
    if p[: len(closed)][closes].sum() + p[ends].sum() > NATURAL:
        return Closed(~closes)
    return None


def _close_inplace(logits: Tensor, rows: list[int], closed: Closed, ends: list[list[int]]) -> None:
    """Close these tokens of `rows`, but not their ends, where another one is left."""
    if closed.few is not None and not closed.few_ids & {end for own in ends for end in own}:
        at = torch.tensor(rows, device=logits.device)[:, None]
        few = closed.few[closed.few < logits.shape[-1]]
        own = logits[at, few]
        logits[at, few] = -torch.inf
        empty = _are_empty(logits, at[:, 0])[:, None]
        logits[at, few] = torch.where(empty, own, -torch.inf)
        return
    own = logits[rows]  # a copy
    size = min(len(closed.mask), logits.shape[-1])
    railed = torch.full_like(own, -torch.inf)  # also what no text is known of
    railed[:, :size] = own[:, :size].masked_fill(closed.mask[:size], -torch.inf)
    _replace_inplace(logits, rows, own, railed, ends)


def _hold_inplace(logits: Tensor, held: Tokens) -> None:
    """Close these tokens, where another one is left."""
    if not held:
        return
    index, ids = eos_index(list(held.values()), logits.shape[-1])
    index, ids = index.to(logits.device), ids.to(logits.device)
    rows = torch.tensor(list(held), device=logits.device)
    own = logits[rows[index], ids]
    logits[rows[index], ids] = -torch.inf
    empty = _are_empty(logits, rows)[index]
    logits[rows[index], ids] = torch.where(empty, own, -torch.inf)


def _are_empty(logits: Tensor, rows: Tensor) -> Tensor:
    """(B,) bool: those of `rows` (B,) without a token. Most have one among the first; what a GPU
    finds there is not waited for."""
    if logits.device.type != "cpu":
        return logits[rows].amax(-1).isneginf()
    empty = logits[rows, :_FIRST].amax(-1).isneginf()
    if empty.any():
        empty[empty.clone()] = logits[rows[empty]].amax(-1).isneginf()
    return empty


def _force_inplace(logits: Tensor, due: Tokens) -> None:
    """Close all but these tokens, where one of them is open."""
    if due:
        own = logits[list(due)]  # a copy
        railed = torch.full_like(own, -torch.inf)
        _replace_inplace(logits, list(due), own, railed, list(due.values()))


def _replace_inplace(
    logits: Tensor, rows: list[int], own: Tensor, railed: Tensor, kept: list[list[int]]
) -> None:
    """`railed` (B, V) in place of `rows`, with the tokens `kept` of each as in `own` (B, V), which
    are those rows; a row that would be empty stays."""
    index, ids = (x.to(logits.device) for x in eos_index(kept, logits.shape[-1]))
    railed[index, ids] = own[index, ids]
    empty = railed.isneginf().all(-1, keepdim=True)
    logits[rows] = torch.where(empty, own, railed)
