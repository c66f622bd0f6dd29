"""A second opinion of texts: another model's, which had no part in writing them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evidence.likelihood import score_rows
from trainer.rows import Rows
from value_server.model.value_model import default_dtype

QUESTION = """\
Request:
{request}

Answer:
{text}

Does this answer come to a proper end, or does it break off? Reply with one word: ends or breaks."""
WORDS = ("ends", "breaks")
LONGEST = 4000  # characters of a request and of a text that are asked about, their last ones


def opinions(answers: Sequence[dict[str, Any]], model: str, folder: Path) -> list[dict[str, Any]]:
    """For each answer `nll` and `p_end` as of `score_rows`, here after the whole text, in the
    tokens of this model; and `ends`, whether it says that the answer comes to a proper end.

    model: hub name or folder of an instruct model. Those of it that `folder` holds stay.
    """
    name = Path(model).name
    scores = score_rows(_read_by(model, answers), model, Rows(folder / f"second-{name}.jsonl"))
    verdicts = _verdicts(answers, model, Rows(folder / f"second-verdicts-{name}.jsonl"))
    return [score | verdict for score, verdict in zip(scores, verdicts, strict=True)]


def _read_by(model: str, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers in this model's tokens, with its end behind each."""
    tokenizer, own = AutoTokenizer.from_pretrained(model), []
    for answer in answers:
        ids = tokenizer.encode(answer["text"], add_special_tokens=False)
        own.append(
            {
                "key": answer["key"],
                "prompt_ids": _asked(tokenizer, answer["request"]),
                "ids": [*ids, tokenizer.eos_token_id],
                "finish": "stop",
            }
        )
    return own


def _asked(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )


@torch.inference_mode()
def _verdicts(answers: Sequence[dict[str, Any]], name: str, rows: Rows) -> list[dict[str, Any]]:
    missing = [answer for answer in answers if answer["key"] not in rows]
    if missing:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=default_dtype(place)).to(place)
        tokenizer = AutoTokenizer.from_pretrained(name)
        words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS]
        for answer in tqdm(missing, "verdicts", file=sys.stderr):
            request, text = (answer[part][-LONGEST:] for part in ("request", "text"))
            ids = _asked(tokenizer, QUESTION.format(request=request, text=text))
            logits = model(torch.tensor([ids], device=place), logits_to_keep=1).logits[0, -1]
            ends, breaks = logits[words].tolist()
            rows.add({"key": answer["key"], "ends": ends > breaks})
    return [rows[answer["key"]] for answer in answers]
