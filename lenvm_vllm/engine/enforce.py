"""What the rails do to a row's logits: ends held back, or forced, no limit of words or characters
passed, and no character or code block cut.

A token at -inf (grammar, allowed tokens) stays there, and a row is never emptied. Where not all
can be kept the upper rail is: it goes first, so that a lower rail or an end that cannot come
leaves only what it allows.
"""

import torch
from torch import Tensor

from lenvm_vllm.engine.railed import NEAR
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.candidates import eos_index
from lenvm_vllm.steering.constants import CLOSES, GOES_ON, NATURAL
from lenvm_vllm.steering.devices import uploaded
from lenvm_vllm.text.blocks import Blocks
from lenvm_vllm.text.characters import LONGEST
from lenvm_vllm.text.counter import Closed
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.sentences import Sentences

Tokens = dict[int, list[int]]  # of a row

_FIRST = 64  # tokens
_NEAR_UNITS = 16  # words or characters before a rail, within which nothing opens


def enforce_inplace(logits: Tensor, states: dict[int, RequestState], letters: Letters) -> Tokens:
    """logits: (batch, V). Returns of each row that is forced the tokens of which one must come."""
    held, broken, due = _rails_in(logits, states, letters)
    due |= _limit_inplace(logits, {row: s for row, s in states.items() if s.is_limited}, due)
    _hold_inplace(logits, held)
    _hold_inplace(logits, broken)
    _force_inplace(logits, due)
    return due


def _rails_in(
    logits: Tensor, states: dict[int, RequestState], letters: Letters
) -> tuple[Tokens, Tokens, Tokens]:
    """Ends that the next token must not be, parts of characters that it must not be, and tokens
    of which it must be one; no character is cut, and no code block."""
    held, broken, due = {}, {}, {}
    characters = letters.characters
    for row, state in states.items():
        text = state.output_ids
        whole = not text or text[-1] not in characters.pieces
        if whole and (calm := state.calm) is not None:
            held[row] = calm
            continue
        missing = 0 if whole else characters.missing(text)
        block, closing = _block_of(logits[row], state, letters.sentences, missing > 0)
        room = state.text_left
        held[row], due[row] = state.held, state.force(missing > 0, closing)
        if missing and not due[row]:
            held[row] = [*held[row], *state.ends]
        free = None if room is None else room - len(block)
        if not due[row] and free is not None and free < LONGEST:
            broken[row] = characters.unfinished(text, free)
            due[row] = characters.continuing(text, free) if missing > free else []
        ends = not due[row] and state.has_last_word
        if ends and letters.ends_sentence(state.written, logits[row]):
            due[row] = state.proper_ends
        if not missing and letters.sentences is not None and _is_near(state):
            last = min(x for x in (room, state.room) if x is not None) < LONGEST
            late = letters.sentences.begun_too_late(state.written, last)
            broken[row] = [*broken.get(row, ()), *late]
    held, broken, due = (
        {row: tokens for row, tokens in rows.items() if tokens} for rows in (held, broken, due)
    )
    return held, broken, due


def _block_of(
    own: Tensor, state: RequestState, sentences: Sentences | None, in_character: bool
) -> tuple[tuple[int, ...], list[int]]:
    """Tokens that close the code block in which the text is, if it is in one and near a rail and
    can be closed, and the one of them that has to come now, if one has. What they take of words
    or characters is kept free for them.

    own: (V,) logits of its row.
    """
    left, last, counter = state.text_left, state.bounds.last, state.counter
    near = left is not None and left < NEAR
    if last is not None:  # not by `room`, which is found once a token, and from what is kept free
        near |= last - state.amount <= 4 * _NEAR_UNITS
    near &= state.counts and state.is_known and state.target.scope != "thinking"
    blocks = sentences.blocks if sentences is not None and near else None
    rest: tuple[int, ...] = ()
    if blocks is not None and blocks.is_open(state.written):
        rest = blocks.rest(state.written)
    fits = bool(rest) and _may_come(own, rest[0]) and (left is None or len(rest) <= left + 1)
    if fits and counter is not None and last is not None:
        fits = state.amount + counter.amount_of(rest) <= last
    block = blocks.closing if fits and blocks is not None else ()
    if in_character:
        return block, []
    if counter is not None:
        state.reserved = counter.amount_of(block) if block else 0
    closing = _closing(state, blocks) if block and blocks is not None else []
    return block, [token for token in closing if _may_come(own, token)]


def _may_come(own: Tensor, token: int) -> bool:
    return token < len(own) and bool(own[token] > -torch.inf)


def _is_near(state: RequestState) -> bool:
    """Whether a rail stands so near that nothing more may open."""
    left, room = state.text_left, state.room
    in_tokens = left is not None and left < NEAR
    return state.is_known and (in_tokens or (room is not None and room <= _NEAR_UNITS))


def _closing(state: RequestState, blocks: Blocks) -> list[int]:
    """The token with which an open block has to go on now, if it has to."""
    if state.room is not None and (state.end_is_due or state.has_last_word):
        return list(blocks.rest(state.written)[:1])
    left = state.text_left
    return [] if left is None else blocks.closing_in(left + 1)


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
        kept = {row: [*states[row].proper_ends, *known.get(row, ())] for row in rows}
        ends = [[*states[row].ends, *kept[row]] for row in rows]
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
    if p[: len(closed)][closes].sum() > CLOSES or p[ends].sum() > NATURAL:
        return Closed(~closes)
    return None


def _close_inplace(logits: Tensor, rows: list[int], closed: Closed, ends: list[list[int]]) -> None:
    """Close these tokens of `rows`, but not their ends, where another one is left."""
    if closed.few is not None and not closed.few_ids & {end for own in ends for end in own}:
        (at,) = uploaded(logits.device, torch.tensor(rows)[:, None])
        few = closed.few[closed.few < logits.shape[-1]]
        own = logits[at, few]
        logits[at, few] = -torch.inf
        empty = _are_empty(logits, at[:, 0])[:, None]
        logits[at, few] = torch.where(empty, own, -torch.inf)
        return
    (at,) = uploaded(logits.device, torch.tensor(rows))
    own = logits[at]  # a copy
    size = min(len(closed.mask), logits.shape[-1])
    railed = torch.full_like(own, -torch.inf)  # also what no text is known of
    railed[:, :size] = own[:, :size].masked_fill(closed.mask[:size], -torch.inf)
    _replace_inplace(logits, at, own, railed, ends)


def _hold_inplace(logits: Tensor, held: Tokens) -> None:
    """Close these tokens, where another one is left."""
    if not held:
        return
    index, ids = eos_index(list(held.values()), logits.shape[-1])
    rows, index, ids = uploaded(logits.device, torch.tensor(list(held)), index, ids)
    at = rows[index]
    own = logits[at, ids]
    logits[at, ids] = -torch.inf
    empty = _are_empty(logits, rows)[index]
    logits[at, ids] = torch.where(empty, own, -torch.inf)


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
        (at,) = uploaded(logits.device, torch.tensor(list(due)))
        own = logits[at]  # a copy
        railed = torch.full_like(own, -torch.inf)
        _replace_inplace(logits, at, own, railed, list(due.values()))


def _replace_inplace(
    logits: Tensor, rows: Tensor, own: Tensor, railed: Tensor, kept: list[list[int]]
) -> None:
    """`railed` (B, V) in place of `rows` (B,), with the tokens `kept` of each as in `own` (B, V),
    which are those rows; a row that would be empty stays."""
    index, ids = uploaded(logits.device, *eos_index(kept, logits.shape[-1]))
    railed[index, ids] = own[index, ids]
    empty = railed.isneginf().all(-1, keepdim=True)
    logits[rows] = torch.where(empty, own, railed)
