"""The slots as a tree of tokens. Plain Python, no torch.

A slot holds the keys, the values and the logit of one token in one place of one text. The key
(slot of the token before, token) finds the slot of a token, so a slot stands for a whole prefix
and two texts that begin alike share their slots. The dictionary compares keys, not hashes: a
collision is a miss, never a wrong answer.

        A: the cat |sat on                the ── cat ─┬─ sat ── on
        B: the cat |ran         →                     └─ ran ─┬ (candidate: off)
                                                              └ (candidate: away)

Who uses a text owns its whole path from the root. A text that is only to be found again is held
by its end: what is before a slot stays as long as the slot does.
"""

from array import array
from collections.abc import Iterable, Sequence

ROOT = -1


class SlotTree:
    """`size` slots; those that nobody owns, and behind which nothing is held, are free at once.

    token, ready: of each slot; 1: its keys, values and logit are written.
    used: slots with an owner. created: slots given to a token that had none.
    """

    def __init__(self, slots: int) -> None:
        self.size = slots
        self.used = 0
        self.created = 0
        self.ready = bytearray(slots)
        self.token = array("i", bytes(4 * slots))
        self._parent = [ROOT] * slots
        self._owners = [0] * slots  # an owner counts each time it has the slot
        self._children = [0] * (slots + 1)  # the last is ROOT's
        self._ends = [0] * slots  # texts that are held by this slot
        self._child: dict[tuple[int, int], int] = {}
        self._free = list(range(slots - 1, -1, -1))

    @property
    def kept(self) -> int:
        """Slots without an owner that are not free."""
        return self.size - len(self._free) - self.used

    def _find(self, end: int, tokens: Iterable[int]) -> list[int]:
        """Slots of the text `tokens` behind the slot `end`, up to the first that has none."""
        found = []
        for token in tokens:
            slot = self._child.get((end, token))
            if slot is None:
                break
            found.append(slot)
            end = slot
        return found

    def _unowned(self, slots: Iterable[int]) -> int:
        return sum(not self._owners[slot] for slot in slots)

    def _own(self, end: int, tokens: Iterable[int], siblings: bool = False) -> list[int]:
        """Slots of the text `tokens` behind the slot `end`, or of texts of one token each, if they
        are `siblings`; each with one more owner. What has none gets a free one."""
        child, owners, free, slots = self._child, self._owners, self._free, []
        for token in tokens:
            slot = child.get((end, token))
            if slot is None:
                slot = child[end, token] = free.pop()
                self._parent[slot] = end
                self._children[end] += 1
                self.token[slot] = token
                self.ready[slot] = 0
                self.created += 1
            self.used += not owners[slot]
            owners[slot] += 1
            slots.append(slot)
            if not siblings:
                end = slot
        return slots

    def _own_again(self, slots: Iterable[int]) -> None:
        """One more owner of each."""
        for slot in slots:
            self.used += not self._owners[slot]
            self._owners[slot] += 1

    def _release(self, slots: Sequence[int]) -> None:
        for slot in reversed(slots):
            self._owners[slot] -= 1
            if not self._owners[slot]:
                self.used -= 1
                self._free_from(slot)

    def _hold(self, path: Sequence[int]) -> None:
        """Hold the text by its end; an empty one needs no hold."""
        if path:
            self._ends[path[-1]] += 1

    def _let_go(self, path: Sequence[int]) -> None:
        if path:
            self._ends[path[-1]] -= 1
            self._free_from(path[-1])

    def _free_from(self, slot: int) -> None:
        """Free the slot and what is before it in its text, as far as nobody needs it."""
        while slot != ROOT:
            if self._owners[slot] or self._children[slot] or self._ends[slot]:
                return
            parent = self._parent[slot]
            del self._child[parent, self.token[slot]]
            self._free.append(slot)
            self._children[parent] -= 1
            slot = parent
