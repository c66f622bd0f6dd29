"""The folder of saved steps: what a run that was stopped leaves to the next.

settings.json tells what the run was started with; checkpoint-N holds the trained weights,
optimizer, schedule and random state after step N, trainer_state.json written last.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

SETTINGS_FILE = "settings.json"


def open_steps(folder: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """The last whole step in `folder`, None if there is nothing to go on from.

    Without `resume` the folder is emptied. Raises ValueError naming the first setting that
    differs from those of the saved steps; then nothing was touched.
    """
    record = folder / SETTINGS_FILE
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    last = last_step(folder)
    if last:
        saved = json.loads(record.read_text()) if record.exists() else {}
        for name in settings | saved:
            before, now = saved.get(name), settings.get(name)
            if before != now:
                raise ValueError(
                    f"{name}: the steps in {folder} were made with {before!r}, this run has "
                    f"{now!r}; without resume it starts anew"
                )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=2) + "\n")
    return last


def last_step(folder: Path) -> Path | None:
    """The newest step that was written whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
