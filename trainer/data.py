"""Rollouts and the training examples made from them.

Legend: P prompt tokens, R completion tokens (end-of-sequence included), L tokens of an example or
a pack.
A label is r, the tokens still to come after a position; NO_LABEL marks a position without loss.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from trainer.candidates import Candidates, count, text_key
from value_server.contract.values import value_from_length
from value_server.model.pictures import Picture

NO_LABEL = -100.0
NOTHING, FILLER = -1, {"labels": NO_LABEL}  # a pack of a token that counts nothing; else 0 in it
THINKING_END = "thinking_end_id"  # of a checkpoint's facts, where texts end at that token


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion. `finished` is False where max_tokens cut it.

    prompt_ids, completion_ids: (P,), (R,) of any width; those that were read share one buffer.
    conversation: what it is one turn of, if any; its turns contain each other.
    prompt: its text, empty where the file has none.
    weight: what a token of it counts for in training.
    pictures: of its prompt, in the order of their placeholder tokens.
    """

    prompt_id: str
    domain: str
    prompt_ids: NDArray[np.integer[Any]]
    completion_ids: NDArray[np.integer[Any]]
    finished: bool
    conversation: str = ""
    prompt: str = ""
    weight: float = 1.0
    pictures: tuple[Picture, ...] = ()

    @property
    def ids(self) -> NDArray[np.int64]:
        """(P+R,) of the whole text."""
        return np.concatenate([self.prompt_ids, self.completion_ids], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Example:
    """The first `length` tokens of a rollout as they are learnt, (L,).

    All is made when it is asked for, so that an example takes hardly more memory than the token
    ids that its rollout shares. candidates: its next tokens at some positions, if any.
    """

    rollout: Rollout
    length: int
    candidates: Candidates | None = None

    @property
    def input_ids(self) -> NDArray[np.int64]:
        """(L,) token ids."""
        return self.rollout.ids[: self.length]

    @property
    def labels(self) -> NDArray[np.float32]:
        """(L,): last prompt token → R, k-th completion token → R - k.

        The end of sequence itself carries no loss: r = 0 is known. A cut completion has at least
        one more token to come, so its bounds are one higher. What lies beyond `length` is left
        out; the labels before stay true.
        """
        labels = np.full(self.length, NO_LABEL, dtype=np.float32)
        first = len(self.rollout.prompt_ids) - 1
        place = labels[first : first + len(self.rollout.completion_ids) + self.is_cut]
        longest = len(self.rollout.completion_ids) + self.is_cut
        place[:] = np.arange(longest, longest - len(place), -1)
        return labels

    @property
    def is_cut(self) -> bool:
        """Whether a label is a lower bound of r."""
        return not self.rollout.finished

    @property
    def prompt_id(self) -> str:
        """The rollout's."""
        return self.rollout.prompt_id

    @property
    def text_key(self) -> str:
        """Of the whole text, beyond `length`, too."""
        return text_key(self.rollout.ids)

    def weights(self, trajectory_mean: bool, prompt_weight: float = 1.0) -> NDArray[np.float32]:
        """(L,) what each label counts for: 1, or 1 for all labels of a text together.

        The first, at the prompt's end, counts for `prompt_weight` of the others; all for the
        rollout's own weight.
        """
        labelled = (self.labels != NO_LABEL).astype(np.float32)
        labelled[labelled.argmax()] *= prompt_weight
        own: NDArray[np.float32] = labelled * np.float32(self.rollout.weight)
        return own / max(labelled.sum(), 1) if trajectory_mean else own

    @property
    def has_labels(self) -> bool:
        """False where the prompt alone fills `max_length`."""
        return self.length >= len(self.rollout.prompt_ids)


def split(rollouts: Sequence[Rollout], holdout: float) -> tuple[list[Rollout], list[Rollout]]:
    """(train, held out), by a hash of the prompt id, or of the conversation: what holds the same
    prompt stays together."""
    parts: tuple[list[Rollout], list[Rollout]] = ([], [])
    for rollout in rollouts:
        together = rollout.conversation or rollout.prompt_id
        digest = hashlib.sha256(together.encode()).digest()
        parts[int.from_bytes(digest[:4], "big") < holdout * 2**32].append(rollout)
    return parts


def ending_at(rollouts: Sequence[Rollout], end: int | None) -> list[Rollout]:
    """Each as far as its first token `end`, if one is given, where it then has finished.

    Left out is what finished without one: a text without a thinking.
    """
    if end is None:
        return list(rollouts)
    found = []
    for rollout in rollouts:
        places = np.flatnonzero(rollout.completion_ids == end)
        if len(places):
            part = rollout.completion_ids[: int(places[0]) + 1]
            found.append(replace(rollout, completion_ids=part, finished=True))
        elif not rollout.finished:
            found.append(rollout)
    return found


def finished_lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """Tokens of each completion that was not cut."""
    return [len(r.completion_ids) for r in rollouts if r.finished]


def make_example(rollout: Rollout, max_length: int) -> Example:
    """Of one rollout, as far as `max_length` goes."""
    return Example(rollout, min(len(rollout.prompt_ids) + len(rollout.completion_ids), max_length))


def prompt_example(rollout: Rollout, max_length: int) -> Example:
    """The prompt of a rollout alone, whose last token has the label."""
    return Example(rollout, min(len(rollout.prompt_ids), max_length))


def known_values(rollout: Rollout, gamma: float, max_length: int) -> NDArray[np.float64]:
    """(K,) u = 1 - gamma^r from the last prompt token on; of a cut completion lower bounds.

    Without the end-of-sequence token, and empty where the prompt alone passes `max_length`.
    """
    labels = make_example(rollout, max_length).labels
    labels = labels[labels != NO_LABEL].astype(np.float64)
    u: NDArray[np.float64] = value_from_length(torch.from_numpy(labels), gamma).numpy()
    return u


def pack(
    lengths: Sequence[int], capacity: int, seed: int, groups: Sequence[str] | None = None
) -> list[list[int]]:
    """Indices in packs of at most `capacity` tokens: shuffled, then first fit over open packs.

    With `groups` these are shuffled as wholes, and what belongs together is packed in a row.
    """
    order = list(range(len(lengths)))
    chance = random.Random(seed)
    if groups is None:
        chance.shuffle(order)
    else:
        places = {group: chance.random() for group in dict.fromkeys(groups)}
        order.sort(key=lambda index: (places[groups[index]], groups[index]))
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), open packs only
    for index in order:
        for slot, (left, number) in enumerate(room):
            if lengths[index] <= left:
                packs[number].append(index)
                room[slot] = (left - lengths[index], number)
                break
        else:
            packs.append([index])
            room.append((capacity - lengths[index], len(packs) - 1))
            room = room[-64:] if groups is None else room[-1:]
    return packs


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Packs of whole examples, each of at most `capacity` tokens; without `packing` of one each.

    An item: input_ids, position_ids (from 0 in each text: that separates them), labels (float),
    weights, is_cut, all (L,). Where examples have candidates, also their ids, exact logits z
    and shares, (L, K); the shares of a position without candidates are 0.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        capacity: int,
        seed: int,
        *,
        grouped: bool = False,
        trajectory_mean: bool = False,
        prompt_weight: float = 1.0,
        packing: bool = True,
    ) -> None:
        self.examples = examples
        self.weighting = (trajectory_mean, prompt_weight)
        groups = [e.prompt_id for e in examples] if grouped else None
        room = capacity if packing else 0  # in which nothing fits beside a text
        self.packs = pack([e.length for e in examples], room, seed, groups)
        own = [e.candidates for e in examples]
        self.scored = count(own)  # positions
        weight = sum(float(e.weights(*self.weighting).sum()) for e in examples)
        self.per_scored = weight / max(self.scored, 1)
        self.candidates = max((c.ids.shape[1] for c in own if c is not None), default=0)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == NOTHING:
            first = self[0].items()
            return {name: torch.full_like(t[:1], FILLER.get(name, 0)) for name, t in first}
        members = [self.examples[i] for i in self.packs[index]]
        sizes = [e.length for e in members]
        is_cut = [np.full(n, e.is_cut) for n, e in zip(sizes, members, strict=True)]
        weights = [e.weights(*self.weighting) for e in members]
        item = {
            "input_ids": torch.from_numpy(np.concatenate([e.input_ids for e in members])),
            "position_ids": torch.cat([torch.arange(n) for n in sizes]),
            "labels": torch.from_numpy(np.concatenate([e.labels for e in members])),
            "weights": torch.from_numpy(np.concatenate(weights)),
            "is_cut": torch.from_numpy(np.concatenate(is_cut)),
        }
        return item | self._candidates(members, sum(sizes))

    def _candidates(self, members: Sequence[Example], length: int) -> dict[str, Tensor]:
        """The part of an item that candidates need."""
        if not self.scored:
            return {}
        ids = torch.zeros(length, self.candidates, dtype=torch.int64)
        z, shares = torch.zeros(2, length, self.candidates)
        start = 0
        for e in members:
            if (c := e.candidates) is not None:
                at = start + torch.from_numpy(c.positions)
                ids[at], z[at] = torch.from_numpy(c.ids), torch.from_numpy(c.z)
                shares[at] = torch.from_numpy(c.shares)
            start += e.length
        return {"candidate_ids": ids, "candidate_z": z, "candidate_shares": shares}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A row for each pack, (B, L): padded to the longest with tokens that each stand alone."""
    return {
        name: pad_sequence(
            [item[name] for item in items],
            batch_first=True,
            padding_value=FILLER.get(name, 0),
        )
        for name in items[0]
    }
