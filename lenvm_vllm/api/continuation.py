"""An answer that is continued from before its end: a text completion whose prompt is its tokens.

`prefix_tokens` tells the plugin how many of them count.
"""

from dataclasses import replace
from typing import Any

from lenvm_vllm.api.asgi import Upstream
from lenvm_vllm.api.fields import CARRIED, allow_endings
from lenvm_vllm.api.outcome import Outcome
from lenvm_vllm.api.routes import CHAT, TEXT, whole
from lenvm_vllm.target.rails import rails_of
from lenvm_vllm.target.request import PREFIX, LengthTarget
from lenvm_vllm.text.tokenizer import decoded
from value_server.contract.units import CHARACTERS, UNITS, WORDS, count

NARROW = 0.5  # of the tolerance is theirs: with several at hand the target may be met closer
ROOM = {UNITS[0]: 4, WORDS: 3, CHARACTERS: 16}  # of it that they keep, in the target's unit
_CONTEXT = 8  # tokens before a text that may tell how it is decoded


def can_continue(request: dict[str, Any], target: LengthTarget) -> bool:
    """Whether the answer to this request can be continued as a text completion of its tokens.

    Not one of several answers, a greedy one, and none with a field that has to know of the text
    before the continuation (`fields.py`).
    """
    return (
        target.mode in ("equal_to", "at_most", "range")
        and target.scope == "completion"
        and not target.prefix_tokens
        and allow_endings(request)
        and request.get("n") in (None, 1)
        and request.get("temperature") != 0
    )


def narrowed(target: LengthTarget) -> LengthTarget:
    """The target of other endings, whose rails are nearer."""
    tolerance = target.tolerance
    if target.mode != "equal_to" or tolerance is None:
        return target
    nearer = min(tolerance, max(tolerance * NARROW, ROOM[target.unit] / target.limits[0]))
    return target.model_copy(update={"tolerance": nearer})


class Draft:
    """An answer of one choice, with the best of its ends so far.

    endings, sampled: how many endings it had, and the tokens of all of them. streamed: the client
    has its first `kept` tokens already, as `kept_text`.
    """

    streamed, kept, kept_text = False, 0, ""

    def __init__(self, answer: dict[str, Any], outcome: Outcome, tokenizer: Any) -> None:
        """An answer without token ids is one whose tokens are not known, and stays."""
        (self._choice,) = answer["choices"]
        asked = answer if "message" in self._choice else self._choice
        self.prompt_ids: list[int] = asked.get("prompt_token_ids") or []
        self.ids: list[int] = self._choice.get("token_ids") or []
        self.outcome, self.sampled, self.endings = outcome, outcome.length, 1
        self._usage = answer["usage"]
        self._tokenizer = tokenizer

    def is_all_text(self) -> bool:
        """Whether its tokens are its text: no part of them went elsewhere, as a thinking does."""
        known = self._choice.get("message", self._choice)
        text = known.get("content", known.get("text"))
        return bool(self.prompt_ids and self.ids) and self.text_with(len(self.ids), []) == text

    @property
    def finish_reason(self) -> str:
        return str(self._choice["finish_reason"])

    def can_end_with(self, outcome: Outcome) -> bool:
        """Whether the text of that outcome goes on from what the client has."""
        return outcome.text.startswith(self.kept_text)

    def end_with(self, cut: int, ids: list[int], outcome: Outcome) -> None:
        """Take another ending, behind the first `cut` tokens; `usage` counts what is returned."""
        before, step = self.outcome.step, outcome.step
        if before is not None and step is not None:
            steered = min(cut, before.steered) + step.steered
            step = replace(step, steps=cut + step.steps, steered=steered)
        self.ids = self.ids[:cut] + ids
        self.outcome = replace(outcome, step=step)
        reason = "length" if outcome.limited else "stop"
        self._choice.update(finish_reason=reason, token_ids=self.ids)
        if "stop_reason" in self._choice:
            self._choice["stop_reason"] = None
        if "message" in self._choice:
            self._choice["message"]["content"] = outcome.text
        else:
            self._choice["text"] = outcome.text
        self._usage["completion_tokens"] = len(self.ids)
        self._usage["total_tokens"] = self._usage["prompt_tokens"] + len(self.ids)

    def text_with(self, cut: int, ids: list[int]) -> str:
        """Its first `cut` tokens and others behind them, decoded behind the prompt."""
        before = self.prompt_ids[-_CONTEXT:]
        skipped = len(decoded(self._tokenizer, before))
        return decoded(self._tokenizer, [*before, *self.ids[:cut], *ids])[skipped:]


def continuation(
    request: dict[str, Any], target: LengthTarget, draft: Draft, cut: int, n: int, wall: int
) -> dict[str, Any]:
    """The request for `n` other endings behind the draft's first `cut` tokens.

    wall: the most tokens of the completion.
    """
    amount = cut if target.unit == UNITS[0] else count(draft.text_with(cut, []), target.unit)
    # Behind the target a nearer rail leaves no room, or little.
    goal = narrowed(target) if amount < target.limits[1] else target
    goal = goal.model_copy(update={"prefix_tokens": cut})
    most = min(wall, rails_of(goal).last or wall)
    least, seed = whole(request, "min_tokens") or 0, whole(request, "seed")
    other = {k: v for k, v in request["vllm_xargs"].items() if not k.startswith(PREFIX)}
    wish = {name: request[name] for name in CARRIED & request.keys()} | {
        "prompt": draft.prompt_ids + draft.ids[:cut],
        "n": n,
        "max_tokens": max(1, most - cut),
        "min_tokens": max(0, least - cut),
        "return_token_ids": True,
        "vllm_xargs": other | goal.to_xargs(),
    }
    if seed is not None:  # with the same one, the same ending again
        wish["seed"] = seed + draft.endings
    return wish


def for_text(vllm: Upstream) -> Upstream:
    """The same request to the route of text completions; /invocations is that, too."""
    path = vllm.scope["path"].rstrip("/")
    if path.endswith(CHAT):
        path = path.removesuffix(CHAT) + TEXT
    scope = {**vllm.scope, "path": path, "raw_path": path.encode()}
    return Upstream(vllm.app, scope, vllm.receive)
