"""The folder of saved steps: what a run that was stopped leaves to the next.

settings.json tells what the run was started with; checkpoint-N holds the trained weights,
optimizer, schedule and random state after step N, trainer_state.json written last.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from trainer.resume import ANEW, SETTINGS_FILE, check_same, keep_settings

FOUND = ("baselines",)  # of the settings: computed of the data, and no weight hangs from it


def open_steps(folder: Path, settings: Mapping[str, Any], resume: bool) -> Path | None:
    """The last whole step in `folder`, None if there is nothing to go on from.

    Without `resume` the folder is emptied. Raises ValueError naming the first setting that
    differs from those of the saved steps; then nothing was touched.
    """
    if not resume or last_step(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
    elif not (folder / SETTINGS_FILE).exists():  # nobody knows what they were made with
        check_same(folder, {}, settings, ANEW)
    keep_settings(folder, settings, ANEW, FOUND)
    return last_step(folder)


def last_step(folder: Path) -> Path | None:
    """The newest step that was written whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
