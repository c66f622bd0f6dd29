"""`lenvm import-logs`: rollouts from production logs instead of from prompts.

Every log becomes one Parquet file, written whole or not at all.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.checks import check
from trainer.columns import SCHEMA, schema_of
from trainer.output import table
from trainer.plots import check_picture
from trainer.resume import check_same
from trainer.rollouts.encoding import ChatEncoder
from trainer.rollouts.logs import read_requests
from trainer.rollouts.reader import COUNTS, SHARES, Reader, figures_of
from trainer.rollouts.rollout import show_lengths
from trainer.rollouts.shards import SETTINGS_KEY
from trainer.rollouts.turns import Turns, Which, check_turns, load_redact, source_of

LOGS = (".jsonl", ".jsonl.gz")
COUNTS_KEY = b"lenvm.import"
ROWS = 2048  # of a row group
OFF = 0.05  # of the tokens that a server counted: more than that is worth a warning


def import_logs(
    logs: Path,
    output: Path,
    *,
    model: str,
    requests: Path | None = None,
    chat_template: Path | None = None,
    turns: Which = "all",
    redact: str | None = None,
    skip_bad: bool = False,
    plot: Path | None = None,
) -> None:
    """Make rollouts in OUTPUT of the answers in LOGS, with their token ids or encoded.

    Logs hold what people wrote, and so do rollouts: they can be decoded. Ends with tables of what
    was read and of the lengths, and one JSON object as the last line.

    Parameters
    ----------
    logs
        JSON lines, plain or gzip, or a folder of them: chats, requests with responses, output of
        batches, answers of vLLM with token ids.
    output
        Folder of the Parquet files, one for each log; those that are there already stay as they
        are.
    model
        Hub name or folder of the model that answered: its tokenizer and chat template.
    requests
        Input file of a batch, whose requests are joined to its answers by custom_id.
    chat_template
        File with the chat template, where the server has another one than the model's.
    turns
        All assistant turns of a conversation, or the last one only: for logs whose earlier turns
        are not the model's own.
    redact
        module:function that takes the messages of a conversation and returns them without personal
        data, or None to leave it out.
    skip_bad
        Leave out lines that cannot be read, and count them; by default the first one ends it all.
    plot
        Picture of the lengths to write, as .png, .svg or .pdf.
    """
    check_turns(turns)
    check_picture("plot", plot)
    files = files_for(log_files(logs, requests), output)
    hook = load_redact(redact) if redact else None
    encoder = ChatEncoder(model, chat_template.read_text() if chat_template else None)
    bodies = read_requests(requests) if requests else None
    reader = Reader(encoder, bodies, partial(Turns, turns, hook, told=set()), skip_bad)
    settings = {"model": model, "turns": turns, "redact": redact, "skip_bad": skip_bad}
    settings |= {"chat_template": digest_of(chat_template), "requests": digest_of(requests)}
    settings["redact_source"] = digest_of(source_of(redact)) if redact else None
    fill(files, settings, reader)
    show_import([*files], output, plot)


def fill(files: Mapping[Path, Path], settings: Mapping[str, Any], reader: Reader) -> None:
    """Write what is not there, of logs by what is made of them; all are looked through before."""
    settings_of = {path: {**settings, "log": digest_of(log)} for path, log in files.items()}
    missing = [path for path, own in settings_of.items() if not is_there(path, own)]
    for log in files.values() if missing else ():
        reader.check(log)
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, files[path], settings_of[path], reader)


def log_files(logs: Path, requests: Path | None) -> list[Path]:
    """Raises ValueError where there are none."""
    found = [logs]
    if logs.is_dir():
        found = [path for path in sorted(logs.iterdir()) if path.name.endswith(LOGS)]
        found = [p for p in found if requests is None or p.resolve() != requests.resolve()]
    check(bool(found), "logs", str(logs), f"a file, or a folder with files {', '.join(LOGS)}")
    return found


def files_for(logs: list[Path], output: Path) -> dict[Path, Path]:
    """What is made of each log. Raises ValueError where two would be one."""
    found: dict[Path, Path] = {}
    for log in logs:
        path = output / f"{log.name.removesuffix('.gz').removesuffix('.jsonl')}.parquet"
        check(path not in found, "logs", [str(found.get(path)), str(log)], "of different names")
        found[path] = log
    return found


def digest_of(path: Path | None) -> str | None:
    """Of a file's content."""
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def is_there(path: Path, settings: Mapping[str, Any]) -> bool:
    """Raises ValueError naming the first setting that the file was made otherwise with."""
    if not path.exists():
        return False
    found = (schema_of(path).metadata or {}).get(SETTINGS_KEY, b"{}")
    check_same(path, json.loads(found), settings)
    return True


def write(path: Path, log: Path, settings: Mapping[str, Any], reader: Reader) -> None:
    """A file of rollouts that exists only when complete."""
    counts: Counter[str] = Counter()
    metadata = {SETTINGS_KEY: json.dumps(settings).encode(), **reader.encoder.whose.metadata()}
    unfinished = path.with_suffix(".tmp")
    try:
        with pq.ParquetWriter(unfinished, SCHEMA.with_metadata(metadata)) as file:
            rows = []
            for row in reader.rows(log, counts):
                rows.append(row)
                if len(rows) == ROWS:
                    file.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                    rows = []
            file.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
            file.add_key_value_metadata({COUNTS_KEY: json.dumps(counts).encode()})
        check_ids(log, reader.encoder.whose.model, counts)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_ids(log: Path, model: str, counts: Mapping[str, int]) -> None:
    """Raises ValueError where the ids of a log are not those of the model's tokenizer.

    Servers may trim every text (stop strings, reasoning); but then most are a part of their ids'.
    """
    compared, held = counts.get("engine_compared", 0), counts.get("engine_held", 0)
    if compared > 2 * held and not counts.get("engine_exact"):
        raise ValueError(
            f"model: {model!r} makes other texts than {log} has of the token ids of "
            f"{compared - held} of {compared} answers that have both"
        )


def show_import(files: list[Path], output: Path, plot: Path | None) -> None:
    """What was read of the logs, with warnings; then the lengths."""
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(json.loads(pq.read_metadata(file).metadata[COUNTS_KEY]))
    figures = figures_of(counts)
    meant = COUNTS | {name: text for name, (text, _) in SHARES.items()}
    print(table([{"of the logs": meant[name], "": value} for name, value in figures.items()]))
    ratio = figures.get("our_tokens")
    if ratio is not None and abs(ratio - 1) > OFF:
        print(
            f"warning: encoded answers have {ratio:.2f} times the tokens that the server counted: "
            "reasoning that is not logged, or another model's tokenizer",
            file=sys.stderr,
        )
    check(counts["turns"] > 0, "logs", str(output), "with answers")
    show_lengths(output, plot, {"import": figures})
