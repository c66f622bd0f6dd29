"""Sample completions of prompts: the only labels a value model needs.

Every shard of prompts becomes one Parquet file, written whole or not at all, so that a run that
was stopped goes on with the first missing one. A file remembers what it was sampled with.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from trainer.checks import check
from trainer.data import read_rollouts
from trainer.plots import check_picture, plot_lengths
from trainer.rollouts.lengths import length_statistics, statistics_table
from trainer.rollouts.prompts import Hub, Prompt, check_template, read_prompts
from trainer.rollouts.samplers import OfflineSampler, Sampler, Sampling, ServerSampler

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)
SETTINGS_KEY = b"lenvm"


def write_shard(rows: list[dict[str, Any]], path: Path, settings: dict[str, Any]) -> None:
    """Write a Parquet file so that it exists only when complete."""
    unfinished = path.with_suffix(".tmp")
    schema = SCHEMA.with_metadata({SETTINGS_KEY: json.dumps(settings).encode()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), unfinished)
    os.replace(unfinished, path)


def rollout(
    prompts: Path,
    output: Path,
    *,
    model: str,
    server: str | None = None,
    concurrency: int = 64,
    template: str | None = None,
    column: str = "prompt",
    hub: Hub = Hub(),
    n: int = 2,
    max_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    limit: int | None = None,
    shard_size: int = 64,
    max_model_len: int | None = None,
    dtype: str = "auto",
    seed: int = 0,
    plot: Path | None = None,
) -> None:
    """Sample completions of PROMPTS into Parquet shards in OUTPUT.

    Ends with a table of their lengths, and one JSON object as the last line.

    Parameters
    ----------
    prompts
        JSON lines, plain or gzip, with `prompt` and, optionally, `id` and `domain`; hub:NAME, a
        data set of the hub with the same columns; or one of opencodereasoning-2-python,
        wildchat, deepmath-103k, which are read from the hub.
    output
        Folder of the Parquet files; those that are there already stay as they are.
    model
        Hub name or folder of the model whose lengths are to be learnt; with a server the name
        that it serves it under.
    server
        URL of an OpenAI API that returns token ids, with its /v1, to sample from; by default
        vLLM is loaded. Its key comes from OPENAI_API_KEY.
    concurrency
        Requests that are open at a server at once.
    template
        Text around each {prompt}.
    column
        Column of a file or data set that holds the prompt, if another.
    n
        Completions per prompt.
    max_tokens
        Cuts a completion; training drops it or takes it as a lower bound.
    temperature
        Of the sampling whose lengths are to be learnt.
    top_p
        Of the same sampling.
    limit
        Use only the first so many prompts.
    shard_size
        Prompts per file; also the unit of resuming.
    max_model_len
        Tokens of prompt and completion that vLLM makes room for; by default the model's own.
    dtype
        Of the model's weights, as vLLM names it.
    seed
        Of vLLM's sampling.
    plot
        Picture of the lengths to write, as .png, .svg or .pdf.
    """
    for name, value in (("n", n), ("max_tokens", max_tokens), ("shard_size", shard_size)):
        check(value > 0, name, value, "above 0")
    check(limit is None or limit > 0, "limit", limit, "above 0")
    check(concurrency > 0, "concurrency", concurrency, "above 0")
    check(temperature >= 0, "temperature", temperature, "at least 0")
    check(0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")
    check_picture("plot", plot)
    if template is not None:
        check_template(template)
    sampling = Sampling(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    settings = {
        "model": model,
        **{"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens},
    }
    shards = [
        (output / f"part-{number:05d}.parquet", shard)
        for number, shard in enumerate(
            _shards(islice(read_prompts(prompts, template, column, hub), limit), shard_size)
        )
    ]
    check(bool(shards), "prompts", str(prompts), "a file with prompts")
    for path, shard in shards:
        if path.exists():
            check_shard(path, settings | {"prompts": _digest(shard)})
    missing = [(path, shard) for path, shard in shards if not path.exists()]
    if missing:
        output.mkdir(parents=True, exist_ok=True)
        sampler: Sampler
        if server:
            key = os.environ.get("OPENAI_API_KEY", "none")
            sampler = ServerSampler(server, model, api_key=key, concurrency=concurrency)
        else:
            sampler = OfflineSampler(
                model=model, max_model_len=max_model_len, dtype=dtype, seed=seed
            )
        done = len(shards) - len(missing)
        for path, shard in tqdm(missing, desc="shards", initial=done, total=len(shards)):
            rows = sample_rows(sampler, shard, sampling)
            if left_out := {prompt.id for prompt in shard} - {row["prompt_id"] for row in rows}:
                count = len(left_out)
                tqdm.write(f"{path.name}: {count} prompts are too long for {model}, left out")
            write_shard(rows, path, settings | {"prompts": _digest(shard)})
    summarise_lengths(output, plot)


def sample_rows(
    sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling
) -> list[dict[str, Any]]:
    """Rows of SCHEMA, a completion each; none of a prompt that is too long for the model."""
    return [
        {
            "prompt_id": prompt.id,
            "domain": prompt.domain,
            "prompt": prompt.text,
            "prompt_ids": sampled.prompt_ids,
            "completion_ids": ids,
            "finish_reason": reason,
        }
        for prompt, sampled in zip(prompts, sampler.sample(prompts, sampling), strict=True)
        if sampled
        for ids, reason in sampled.completions
    ]


def check_shard(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError naming the first setting that a file was sampled otherwise with."""
    metadata = pq.read_schema(path).metadata or {}
    recorded = json.loads(metadata.get(SETTINGS_KEY, b"{}"))
    for name, value in recorded.items():
        if settings[name] != value:
            raise ValueError(
                f"{name}: {path} was sampled with {value!r}, this run has {settings[name]!r}; "
                "another output folder starts anew"
            )


def summarise_lengths(output: Path, plot: Path | None) -> None:
    """Print a table and a JSON line of the lengths in a folder of shards; draw them."""
    rollouts = read_rollouts(output)
    statistics = length_statistics(rollouts)
    if plot:
        lengths: dict[str, list[int]] = {name: [] for name in statistics if name != "all"}
        for sampled in rollouts:
            lengths[sampled.domain].append(len(sampled.completion_ids))
        plot_lengths(lengths, plot)
    print(statistics_table(statistics))
    print(json.dumps(statistics))


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]


def _shards(prompts: Iterator[Prompt], size: int) -> Iterator[tuple[Prompt, ...]]:
    while shard := tuple(islice(prompts, size)):
        yield shard
