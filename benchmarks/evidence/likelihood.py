"""What the unguided model thinks of texts that were written under guidance.

Legend: P prompt tokens, L completion tokens, V vocabulary.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from trainer.rows import Rows
from value_server.model.value_model import default_dtype

BATCH_TOKENS = 2048  # padding included


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
            for batch in batches(missing, BATCH_TOKENS):
                for row in scorer.score(batch):
                    rows.add(row)
                    bar.update()
    return [rows[answer["key"]] for answer in answers]


def batches(answers: Sequence[dict[str, Any]], capacity: int) -> Iterator[list[dict[str, Any]]]:
    """Texts of like length together, at most `capacity` tokens with padding; at least one."""
    batch: list[dict[str, Any]] = []
    for answer in sorted(answers, key=_size, reverse=True):
        if batch and _size(batch[0]) * (len(batch) + 1) > capacity:
            yield batch
            batch = []
        batch.append(answer)
    if batch:
        yield batch


def _size(answer: dict[str, Any]) -> int:
    return len(answer["prompt_ids"]) + len(answer["ids"])


class Scorer:
    """A language model in transformers, in the precision that the device multiplies natively."""

    def __init__(self, model: str) -> None:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = default_dtype(place)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(place).eval()
        ends = self.model.generation_config.eos_token_id
        self.end_ids: list[int] = [ends] if isinstance(ends, int) else list(ends)

    @torch.inference_mode()
    def score(self, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of `score_rows`. Texts are padded on the right, which no earlier token sees."""
        texts = [torch.tensor(a["prompt_ids"] + a["ids"]) for a in answers]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        logits = self.model(padded.to(self.model.device), use_cache=False).logits
        return [
            {"key": a["key"]} | self._figures(logits[i, len(a["prompt_ids"]) - 1 :], a)
            for i, a in enumerate(answers)
        ]

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
