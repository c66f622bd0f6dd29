"""Sample completions of prompts: the only labels a value model needs.

Every shard of prompts becomes one Parquet file, written whole or not at all, so that a run that
was stopped goes on with the first missing one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from trainer.checks import check, check_positive
from trainer.output import show
from trainer.plots import check_picture, plot_lengths
from trainer.rollout_files import ENGINE, read_rollouts
from trainer.rollouts.lengths import length_statistics, statistics_table
from trainer.rollouts.prompts import Prompt, Selection
from trainer.rollouts.samplers import Engine, Sampler, Sampling
from trainer.rollouts.shards import Shard, shards_of


def rollout(
    prompts: Path,
    output: Path,
    *,
    model: str,
    selection: Selection = Selection(),
    sampling: Sampling = Sampling(),
    engine: Engine = Engine(),
    shard_size: int = 64,
    plot: Path | None = None,
) -> None:
    """Sample completions of PROMPTS into Parquet shards in OUTPUT.

    Ends with a table of their lengths, and one JSON object as the last line.

    Parameters
    ----------
    prompts
        JSON lines, plain or gzip, with `prompt` and, optionally, `id` and `domain`; hub:NAME, a
        data set of the hub with the same columns; or one of opencodereasoning-2-python,
        wildchat, deepmath-103k, mathvista, which are read from the hub. In place of `prompt` a
        line may have OpenAI `messages`; pictures are paths or data: URLs there and in `images`.
    output
        Folder of the Parquet files; those that are there already stay as they are.
    model
        Hub name or folder of the model whose lengths are to be learnt; with a server the name
        that it serves it under.
    shard_size
        Prompts per file; also the unit of resuming.
    plot
        Picture of the lengths to write, as .png, .svg or .pdf.
    """
    check_positive(shard_size=shard_size)
    check_picture("plot", plot)
    for options in (selection, sampling, engine):
        options.check()
    settings = {"model": model, **asdict(sampling)}
    shards = list(shards_of(selection.read(prompts), output, shard_size, settings))
    check(bool(shards), "prompts", str(prompts), "a file with prompts")
    missing = [shard for shard in shards if not shard.is_there()]
    if missing:
        output.mkdir(parents=True, exist_ok=True)
        fill(missing, len(shards), engine.sampler(model), sampling)
    show_lengths(output, plot)


def fill(missing: Sequence[Shard], total: int, sampler: Sampler, sampling: Sampling) -> None:
    """Sample the shards that are not there, of `total`."""
    tokenizer = sampler.tokenizer()
    if tokenizer is None:
        tqdm.write(
            "the server does not tell its tokenizer; --tokenizer NAME lets training check it"
        )
    for shard in tqdm(missing, desc="shards", initial=total - len(missing), total=total):
        rows = sample_rows(sampler, shard.prompts, sampling)
        if left_out := {prompt.id for prompt in shard.prompts} - {r["prompt_id"] for r in rows}:
            model, count = shard.settings["model"], len(left_out)
            tqdm.write(f"{shard.path.name}: {count} prompts are too long for {model}, left out")
        shard.write(rows, tokenizer)


def sample_rows(
    sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling
) -> list[dict[str, Any]]:
    """Rows of a shard, a completion each; none of a prompt that is too long for the model."""
    return [
        {
            "prompt_id": prompt.id,
            "domain": prompt.domain,
            "prompt": prompt.text,
            "prompt_ids": sampled.prompt_ids,
            "completion_ids": ids,
            "finish_reason": reason,
            "token_source": ENGINE,
            "pictures": prompt.pictures,
        }
        for prompt, sampled in zip(prompts, sampler.sample(prompts, sampling), strict=True)
        if sampled
        for ids, reason in sampled.completions
    ]


def show_lengths(
    output: Path, plot: Path | None, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Print a table and a JSON line of the lengths in a folder of shards; draw them.

    more: what else the line tells.
    """
    rollouts = read_rollouts(output)
    statistics = length_statistics(rollouts)
    if plot:
        lengths: dict[str, list[int]] = {name: [] for name in sorted({r.domain for r in rollouts})}
        for sampled in rollouts:
            lengths[sampled.domain].append(len(sampled.completion_ids))
        plot_lengths(lengths, plot)
    show(statistics_table(statistics), statistics | dict(more), only_json=False)
