"""`lenvm distil`: exact values after candidates, for a lookahead head to learn."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import Parameter
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.candidates import Candidates, is_written, text_key, write_candidates
from trainer.checks import check, check_positive
from trainer.data import THINKING_END, Rollout, ending_at
from trainer.lookahead.exact import check_branches, exact_logits
from trainer.lookahead.served import ServedModel
from trainer.reading import Reading
from trainer.resume import fingerprint
from trainer.rollout_files import TokenizerOf, check_ids, read_rollouts
from value_server.contract.checkpoint import CONFIG_FILE, read_config
from value_server.model.value_model import ValueModel

Ids = NDArray[np.int64]
TEXTS_PER_FILE = 512


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which candidates are scored, and how many at once."""

    model: str | None = None
    """The served model, where it is not the checkpoint's base model."""
    candidates: int = 8
    """Likeliest next tokens of each position."""
    tokens_per_pass: int = 16384
    """Tokens in one forward pass, candidates included; on a CPU a text at a time is as fast."""
    seed: int = 0
    """Seed of the choice of positions."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check(self.candidates > 1, "candidates", self.candidates, "above 1")
        check_positive(tokens_per_pass=self.tokens_per_pass)

    def source(self, teacher: ValueModel, reading: Reading) -> str:
        """Hub name or folder of the served model."""
        return self.model or reading.base_model or teacher.lenvm.base_model

    def served(self, teacher: ValueModel, reading: Reading) -> ServedModel:
        """The model whose candidates are scored. Raises ValueError for one of other tokens."""
        place, source = next(teacher.backbone.parameters()), self.source(teacher, reading)
        model = ServedModel(source, place.dtype, place.device)
        same = TokenizerOf.load(source).fingerprint == teacher.lenvm.tokenizer_fingerprint
        check(same, "model", source, "one with the tokenizer of the value model")
        return model


def distil(
    teacher: Path,
    rollouts: Path,
    output: Path,
    *,
    share: float = 0.1,
    scoring: Scoring = Scoring(),
    reading: Reading = Reading(),
) -> None:
    """Write the values that TEACHER gives to likely next tokens of ROLLOUTS into OUTPUT.

    A run that was stopped goes on with the first file that is missing.

    Parameters
    ----------
    teacher
        Folder of a value model.
    rollouts
        Parquet file or folder of shards, of which finished completions are taken.
    output
        Folder to write, for `lenvm train --lookahead … --candidates OUTPUT`.
    share
        Share of the positions that are scored.
    """
    check(0 < share <= 1, "share", share, "above 0 and at most 1")
    scoring.check()
    reading.check()
    config = read_config(teacher)
    learnt = TokenizerOf(str(teacher), config.tokenizer_fingerprint)
    whole = read_rollouts(rollouts, learnt)
    check(not any(r.pictures for r in whole), "rollouts", str(rollouts), "without pictures")
    texts = [r for r in ending_at(whole, config.training.get(THINKING_END)) if r.finished]
    model = reading.load(teacher)
    check_branches(model)
    check_ids(whole, model.backbone.get_input_embeddings().num_embeddings, teacher)
    texts = [r for r in texts if len(r.prompt_ids) <= reading.max_length]
    check(bool(texts), "rollouts", str(rollouts), "with finished completions")
    settings: dict[str, Any] = {"gamma": model.lenvm.gamma, "share": share, **asdict(scoring)}
    settings |= {"max_length": reading.max_length, "dtype": reading.dtype}
    settings |= {"teacher": files_digest(teacher), "model": scoring.source(model, reading)}
    del settings["tokens_per_pass"]
    output.mkdir(parents=True, exist_ok=True)
    served = scoring.served(model, reading)
    bar = tqdm(total=len(texts), unit="text", disable=reading.only_json)
    for start in range(0, len(texts), TEXTS_PER_FILE):
        part = texts[start : start + TEXTS_PER_FILE]
        path = output / f"part-{start // TEXTS_PER_FILE:05d}.parquet"
        keys = [text_key(r.ids) for r in part]
        own = settings | {"texts": fingerprint(keys)}
        if not is_written(path, own):
            chosen = [chosen_positions(r, share, scoring.seed, reading.max_length) for r in part]
            found = score(model, served, part, chosen, scoring, reading.max_length)
            write_candidates(path, dict(zip(keys, found, strict=True)), own)
        bar.update(len(part))


def files_digest(checkpoint: Path) -> str:
    """Of its config and weights: no other checkpoint has the same."""
    digest = hashlib.sha256()
    for path in [checkpoint / CONFIG_FILE, *sorted(checkpoint.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def chosen_positions(rollout: Rollout, share: float, seed: int, max_length: int) -> Ids:
    """(N,) at random among the last of the prompt and all of the completion but its end."""
    first = len(rollout.prompt_ids) - 1
    last = min(len(rollout.prompt_ids) + len(rollout.completion_ids) - 1, max_length)
    key = int(text_key(rollout.ids), 16)
    chosen = np.random.default_rng([seed, key]).random(max(last - first, 0)) < share
    return first + chosen.nonzero()[0]


def score(
    teacher: ValueModel,
    served: ServedModel,
    rollouts: Sequence[Rollout],
    positions: Sequence[Ids],
    scoring: Scoring,
    max_length: int,
) -> list[Candidates]:
    """Of each text the candidates behind its (N,) positions; none where N is 0."""
    texts = [r.ids[:max_length] for r in rollouts]
    number = scoring.candidates
    found = [
        Candidates(at, np.zeros((0, number), np.int64), *np.zeros((2, 0, number), np.float32))
        for at in positions
    ]
    for members in passes(texts, positions, scoring):
        own, at = [texts[i] for i in members], [positions[i] for i in members]
        ids, p = zip(*served.candidates(own, at, number), strict=True)
        scored = zip(members, at, ids, p, exact_logits(teacher, own, at, ids), strict=True)
        for index, of_text, *arrays in scored:
            found[index] = Candidates(of_text, *(array.numpy() for array in arrays))
    return found


def passes(texts: Sequence[Ids], positions: Sequence[Ids], scoring: Scoring) -> Iterator[list[int]]:
    """Texts of like length together, as many as fit into a pass; those without positions not."""
    lengths = [
        len(text) + scoring.candidates * len(at) for text, at in zip(texts, positions, strict=True)
    ]
    left = [i for i in np.argsort(lengths, kind="stable").tolist() if len(positions[i])]
    while left:
        longest = lengths[left[-1]]
        size = max(scoring.tokens_per_pass // longest, 1)
        yield left[-size:]
        left = left[:-size]
