"""What the unguided model thinks of texts that were written under guidance.

Legend: P prompt tokens, L completion tokens, V vocabulary.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from trainer.rows import Rows
from value_server.model.value_model import default_dtype

BATCH_TOKENS = 2048  # padding included
EVEN = 0.7  # of a batch's longest text at least, so that little of it is padding


def score_rows(answers: Sequence[dict[str, Any]], model: str, rows: Rows) -> list[dict[str, Any]]:
    """For each answer: `nll`, mean nats of its tokens but the end (None where it has no other),
    and `p_end`, the probability of an end in place of its last token.

    model: hub name or folder of the model that is served. Scores that `rows` holds stay.
    """
    missing = [answer for answer in answers if answer["key"] not in rows]
    if missing:
        scorer = Scorer(model)
        done = len(answers) - len(missing)
        with tqdm(total=len(answers), initial=done, desc="scores", file=sys.stderr) as bar:
            for own in by_prompt(missing):
                for row in scorer.score(own):
                    rows.add(row)
                    bar.update()
    return [rows[answer["key"]] for answer in answers]


def by_prompt(answers: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Answers to the same prompt together."""
    found: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for answer in answers:
        found.setdefault(tuple(answer["prompt_ids"]), []).append(answer)
    return list(found.values())


def batches(answers: Sequence[dict[str, Any]], capacity: int) -> Iterator[list[dict[str, Any]]]:
    """Texts of like length together, at most `capacity` tokens with padding; at least one."""
    batch: list[dict[str, Any]] = []
    for answer in sorted(answers, key=_size, reverse=True):
        longest = _size(batch[0]) if batch else 0
        if longest * (len(batch) + 1) > capacity or _size(answer) < EVEN * longest:
            yield batch
            batch = []
        batch.append(answer)
    if batch:
        yield batch


def _size(answer: dict[str, Any]) -> int:
    return len(answer["ids"])


class Scorer:
    """A language model in transformers, in the precision that the device multiplies natively."""

    def __init__(self, model: str) -> None:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = default_dtype(place)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(place).eval()
        ends = self.model.generation_config.eos_token_id
        self.end_ids: list[int] = [ends] if isinstance(ends, int) else list(ends)

    @torch.inference_mode()
    def score(self, answers: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows of `score_rows`, of answers to one prompt, which is read once.

        Texts are padded on the right, which no earlier token sees.
        """
        *before, last = answers[0]["prompt_ids"]
        read = DynamicCache(config=self.model.config)
        if before:
            self._logits([before], read, keep=1)
        for batch in batches(answers, BATCH_TOKENS):
            cache = copy.deepcopy(read)
            if before:
                cache.batch_repeat_interleave(len(batch))
            logits = self._logits([[last, *answer["ids"]] for answer in batch], cache)
            for own, answer in zip(logits, batch, strict=True):
                yield {"key": answer["key"]} | self._figures(own, answer)

    def _logits(self, texts: Sequence[list[int]], cache: DynamicCache, keep: int = 0) -> Tensor:
        """(N, longest, V), of the last `keep` places alone if given; keys and values of the texts
        go into the cache."""
        padded = pad_sequence([torch.tensor(ids) for ids in texts], batch_first=True)
        ids = padded.to(self.model.device)
        logits: Tensor = self.model(ids, past_key_values=cache, logits_to_keep=keep).logits
        return logits

    def _figures(self, logits: Tensor, answer: dict[str, Any]) -> dict[str, float | None]:
        """logits: (L or more, V), row k before completion token k."""
        ids = torch.tensor(answer["ids"], device=logits.device)
        log_p = logits[: len(ids)].float().log_softmax(-1)
        nll = -log_p.gather(1, ids[:, None])[:, 0]
        text = nll[: len(ids) - (answer["finish"] == "stop")]
        return {
            "nll": text.mean().item() if len(text) else None,
            "p_end": log_p[-1, self.end_ids].exp().sum().item(),
        }
