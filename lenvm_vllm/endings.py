"""Other endings: an answer that does not end well is written again from shortly before its end.

Only the way that a text ends tells whether its length was meant, so only that is sampled anew:
vLLM has the text before it in its prefix cache, and the value server in its own. A continuation
is a text completion whose prompt is the answer's tokens; `prefix_tokens` tells the plugin how
many of them count.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from lenvm_vllm.asgi import ask, compact, respond
from lenvm_vllm.best_of import SAMPLED, Ending
from lenvm_vllm.rails import rails_of
from lenvm_vllm.request import PREFIX, LengthTarget
from lenvm_vllm.sentences import SENTENCE

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

ROUND = 4  # endings that are sampled side by side
TAIL = 2 * SENTENCE  # tokens before the end from which the first of them begin
NARROW = 0.5  # of the tolerance is theirs: with several at hand the target may be met closer
ROOM = 4  # tokens of it that they keep
NEAR = 0.25  # of the tolerance, or a token, that a good ending may miss its target by
_CONTEXT = 8  # tokens before a text that may tell how it is decoded

# What a continuation takes over from its request, as it is.
_CARRIED = {
    *("model", "user", "priority", "seed", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "logit_bias", "allowed_token_ids", "vllm_xargs", "cache_salt"),
}
# What makes the prompt, or is seen to here.
_SEEN_TO = {
    *("messages", "prompt", "add_special_tokens", "add_generation_prompt", "documents"),
    *("continue_final_message", "chat_template", "chat_template_kwargs", "request_id"),
    *("max_tokens", "max_completion_tokens", "min_tokens", "n", "return_token_ids"),
}
_HARMLESS: tuple[Any, ...] = (None, False, 0, "", [], {}, {"type": "text"})  # in another field


def can_continue(request: dict[str, Any], target: LengthTarget, path: str) -> bool:
    """Whether the answer to this request can be continued as a text completion of its tokens.

    Not one of several answers, a stream, a greedy one, and none with pictures, tools, a grammar,
    stop strings or what else has to know of the text before the continuation.
    """
    others = {name: request[name] for name in request.keys() - _CARRIED - _SEEN_TO}
    return (
        path in (CHAT, TEXT)
        and target.mode != "tilt"
        and target.scope == "completion"
        and not target.prefix_tokens
        and all(value in _HARMLESS for value in others.values())
        and request.get("n") in (None, 1)
        and request.get("temperature") != 0
        and (_is_prompt(request.get("prompt")) if path == TEXT else _are_words(request))
    )


def _is_prompt(prompt: Any) -> bool:
    """Whether it is one, of words or of token ids."""
    one = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    return isinstance(prompt, str) or one


def _are_words(request: dict[str, Any]) -> bool:
    messages = request.get("messages")
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str)
        for message in messages
    )


def narrowed(target: LengthTarget) -> LengthTarget:
    """The target of other endings: rails that are nearer, and an upper one where there is none."""
    tolerance, tokens = target.tolerance, target.tokens
    if tolerance is None or tokens is None:  # no rails, or a range
        return target
    if target.mode == "at_least":  # the answer found no end by itself
        most = math.floor(tokens + max(ROOM, tolerance * tokens))
        limits = {"tokens": None, "min_tokens": tokens, "max_tokens": most}
        return target.model_copy(update=limits | {"mode": "range"})
    if target.mode == "equal_to":
        tolerance = min(tolerance, max(tolerance * NARROW, ROOM / tokens))
        return target.model_copy(update={"tolerance": tolerance})
    return target


@dataclass(frozen=True)
class Endings:
    """ASGI application: the answer of `app` with the best of up to `best_of` endings.

    More are sampled, ROUND at a time, only while none is natural and near the target; those of
    a later round begin a sentence earlier. Where that fails, the answer is what it was.

    max_model_len, tokenizer: of the served model.
    """

    app: Any
    target: LengthTarget
    best_of: int
    max_model_len: int
    tokenizer: Any

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = json.loads((await receive())["body"])
        logprobs = True if "messages" in request else 0
        asked = request | {"logprobs": logprobs, "return_token_ids": True}
        start, body, first = await ask(self.app, scope, asked, receive)
        if first is None:
            await respond(send, start, body)
            return
        draft = Draft.of(first, self.tokenizer)
        best, nearer = Ending.of(draft.choice).faults(self.target), narrowed(self.target)
        left = self.best_of - 1 if draft.is_all_text() else 0
        sampled = len(draft.ids)
        cut = min(sampled, self.target.limits[1]) - TAIL
        while left > 0 and not self._is_good(*best):
            cut = max(0, cut)
            wish = self._continuation(request, draft, cut, min(left, ROUND))
            _, _, found = await ask(self.app, _as_text(scope), wish, receive)
            if found is None:
                break
            sampled += found["usage"]["completion_tokens"]
            for choice in found["choices"]:
                ending = Ending.of(choice, cut)
                if ending.faults(nearer) < best:
                    best = ending.faults(nearer)
                    draft.end_with(choice, cut)
            left, cut = left - ROUND, cut - SENTENCE
        answer = draft.answer(with_ids=request.get("return_token_ids") is True)
        await respond(send, start, compact(answer), (SAMPLED, sampled))

    def _is_good(self, unnatural: bool, missed: int) -> bool:
        width = (self.target.tolerance or 0.0) * self.target.limits[1]
        return not unnatural and missed <= max(NEAR * width, min(1, width))

    def _continuation(
        self, request: dict[str, Any], draft: "Draft", cut: int, count: int
    ) -> dict[str, Any]:
        """The request for `count` other endings behind the draft's first `cut` tokens."""
        prompt = draft.prompt_ids + draft.ids[:cut]
        target = narrowed(self.target).model_copy(update={"prefix_tokens": cut})
        limits = [request.get(name) for name in ("max_completion_tokens", "max_tokens")]
        given = [limit - cut for limit in limits if limit is not None][:1]
        last = rails_of(target).last
        railed = [] if last is None else [last - cut]
        other = {k: v for k, v in request["vllm_xargs"].items() if not k.startswith(PREFIX)}
        return {name: request[name] for name in _CARRIED & request.keys()} | {
            "prompt": prompt,
            "n": count,
            "max_tokens": max(1, min([self.max_model_len - len(prompt), *given, *railed])),
            "min_tokens": max(0, (request.get("min_tokens") or 0) - cut),
            "logprobs": 0,
            "return_token_ids": True,
            "vllm_xargs": other | target.to_xargs(),
        }


@dataclass
class Draft:
    """An answer of one choice, whose end may yet change."""

    prompt_ids: list[int]
    ids: list[int]
    _answer: dict[str, Any]
    _tokenizer: Any

    @classmethod
    def of(cls, answer: dict[str, Any], tokenizer: Any) -> "Draft":
        """Of an answer with logprobs and token ids."""
        (choice,) = answer["choices"]
        prompt_ids = (answer if "message" in choice else choice)["prompt_token_ids"]
        return cls(prompt_ids, choice["token_ids"], answer, tokenizer)

    @property
    def choice(self) -> dict[str, Any]:
        choice: dict[str, Any] = self._answer["choices"][0]
        return choice

    def is_all_text(self) -> bool:
        """Whether its tokens are its text: no part of them went elsewhere, as a thinking does."""
        known = self.choice.get("message", self.choice)
        return self._text() == known.get("content", known.get("text"))

    def end_with(self, choice: dict[str, Any], cut: int) -> None:
        """Take another ending, behind the first `cut` tokens."""
        self.ids = self.ids[:cut] + choice["token_ids"]
        for name in ("finish_reason", "stop_reason"):
            self.choice[name] = choice[name]
        if "message" in self.choice:
            self.choice["message"]["content"] = self._text()
        else:
            self.choice["text"] = self._text()

    def answer(self, with_ids: bool) -> dict[str, Any]:
        """As the client gets it, without logprobs, `usage` counting what is returned."""
        self.choice.update(logprobs=None, token_ids=self.ids if with_ids else None)
        if not with_ids:
            (self._answer if "message" in self.choice else self.choice)["prompt_token_ids"] = None
        usage = self._answer["usage"]
        usage["completion_tokens"] = len(self.ids)
        usage["total_tokens"] = usage["prompt_tokens"] + len(self.ids)
        return self._answer

    def _text(self) -> str:
        """Decoded as vLLM does it, behind the prompt."""
        before = self.prompt_ids[-_CONTEXT:]
        skipped = len(self._decode(before))
        return self._decode([*before, *self.ids])[skipped:]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _as_text(scope: Any) -> Any:
    """The same request to the route of text completions."""
    path = scope["path"].rstrip("/").removesuffix(CHAT).removesuffix(TEXT) + TEXT
    return {**scope, "path": path, "raw_path": path.encode()}
