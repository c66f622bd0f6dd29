"""The field `best_of`: whole answers are sampled side by side, and those that end best are
returned."""

from typing import Any

from lenvm_vllm.api.answers import Answers, Sampled
from lenvm_vllm.api.asgi import Upstream
from lenvm_vllm.api.outcome import Outcome, Report
from lenvm_vllm.api.texts import texts_of


class WholeAnswers(Answers):
    """The best, or the best `n`, of `best_of` answers to each prompt."""

    async def sample(self, vllm: Upstream, request: dict[str, Any], report: Report) -> Sampled:
        several = self.target.best_of
        reply = await vllm.ask(request | {"n": several})
        if reply.answer is None:
            return Sampled(reply)
        sampled = reply.answer["usage"]["completion_tokens"]
        outcomes = self._choose(reply.answer, request.get("n") or 1, report)
        return Sampled(reply, outcomes, sampled, several)

    def _choose(self, answer: dict[str, Any], returned: int, report: Report) -> list[Outcome]:
        """Leave the best of each prompt's choices in the answer; their outcomes.

        `usage` counts what is returned, so that it still tells how long an answer is.
        """
        several = self.target.best_of
        answer["choices"].sort(key=lambda choice: choice["index"])
        known = [(text.body, report.outcome(text)) for text in texts_of(answer)]
        chosen = []
        for at in range(0, len(known), several):
            best_first = sorted(known[at : at + several], key=lambda p: p[1].faults(self.target))
            chosen += best_first[:returned]
        answer["choices"] = [body | {"index": at} for at, (body, _) in enumerate(chosen)]
        usage, tokens = answer["usage"], sum(outcome.length for _, outcome in chosen)
        usage["total_tokens"] += tokens - usage["completion_tokens"]
        usage["completion_tokens"] = tokens
        return [outcome for _, outcome in chosen]
