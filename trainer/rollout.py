"""Sample completions of prompts with vLLM: the only labels a value model needs.

Prompts: JSON lines (plain or gzip) with `prompt` and, optionally, `id` and `domain`. Every
shard of prompts becomes one Parquet file, written whole or not at all, so that a run that was
stopped goes on with the first missing one.
"""

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

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


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    domain: str
    text: str


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Rows of a JSONL file. Raises ValueError naming the line and the missing field."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number + 1}: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError(f"{path}: line {number + 1}: prompt: missing or not a text")
            yield Prompt(str(row.get("id", number)), str(row.get("domain", "")), row["prompt"])


def write_shard(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a Parquet file so that it exists only when complete."""
    unfinished = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), unfinished)
    os.replace(unfinished, path)


def rollout(
    prompts: Path,
    output: Path,
    *,
    model: str,
    n: int = 2,
    max_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    limit: int | None = None,
    shard_size: int = 64,
    max_model_len: int | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> None:
    """Sample completions of PROMPTS (JSONL) into Parquet shards in OUTPUT.

    Parameters
    ----------
    prompts
        JSON lines, plain or gzip, with `prompt` and, optionally, `id` and `domain`.
    output
        Folder of the Parquet files; those that are there already stay as they are.
    model
        Hub name or folder of the model whose lengths are to be learnt.
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
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: {shard_size}, must be above 0")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit}, must be above 0")
    shards = [
        (output / f"part-{number:05d}.parquet", shard)
        for number, shard in enumerate(_shards(islice(read_prompts(prompts), limit), shard_size))
    ]
    missing = [(path, shard) for path, shard in shards if not path.exists()]
    if not missing:
        return
    output.mkdir(parents=True, exist_ok=True)
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, max_model_len=max_model_len, dtype=dtype, seed=seed)
    sampling = SamplingParams(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    for path, shard in tqdm(missing, desc="shards", initial=len(shards) - len(missing)):
        chats = [[{"role": "user", "content": prompt.text}] for prompt in shard]
        outputs = llm.chat(chats, sampling, use_tqdm=False)
        rows = [
            {
                "prompt_id": prompt.id,
                "domain": prompt.domain,
                "prompt": prompt.text,
                "prompt_ids": list(output.prompt_token_ids),
                "completion_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            for prompt, output in zip(shard, outputs, strict=True)
            for completion in output.outputs
        ]
        write_shard(rows, path)


def _shards(prompts: Iterator[Prompt], size: int) -> Iterator[tuple[Prompt, ...]]:
    while shard := tuple(islice(prompts, size)):
        yield shard
