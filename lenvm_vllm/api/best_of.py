"""`best_of`: whole answers are sampled side by side, and those that end best are returned."""

from dataclasses import dataclass
from typing import Any

from lenvm_vllm.api.answers import Answers, Sampled
from lenvm_vllm.api.asgi import ask
from lenvm_vllm.api.outcome import Outcome
from lenvm_vllm.api.texts import texts_of


@dataclass(frozen=True)
class WholeAnswers(Answers):
    """The best, or the best `n`, of `best_of` answers to each prompt."""

    best_of: int = 1

    async def sample(self, scope: Any, receive: Any, request: dict[str, Any], key: str) -> Sampled:
        asked = request | {"n": self.best_of}
        start, body, answer = await ask(self.app, scope, asked, receive)
        if answer is None:
            return Sampled(start, body, None)
        sampled = answer["usage"]["completion_tokens"]
        outcomes = self._choose(answer, request.get("n") or 1, key)
        return Sampled(start, body, answer, sampled, self.best_of, dict(enumerate(outcomes)))

    def _choose(self, answer: dict[str, Any], returned: int, key: str) -> list[Outcome]:
        """Leave the best of each prompt's choices in the answer; their outcomes.

        `usage` counts what is returned, so that it still tells how long an answer is.
        """
        answer["choices"].sort(key=lambda choice: choice["index"])
        known = [(text.body, text.outcome(self.known, key)) for text in texts_of(answer)]
        prompts = [known[at : at + self.best_of] for at in range(0, len(known), self.best_of)]
        chosen = [
            pair
            for pairs in prompts
            for pair in sorted(pairs, key=lambda pair: pair[1].faults(self.target))[:returned]
        ]
        answer["choices"] = [body | {"index": at} for at, (body, _) in enumerate(chosen)]
        usage, tokens = answer["usage"], sum(outcome.length for _, outcome in chosen)
        usage["total_tokens"] += tokens - usage["completion_tokens"]
        usage["completion_tokens"] = tokens
        return [outcome for _, outcome in chosen]
