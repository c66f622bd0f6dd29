"""The folder of saved steps: what a run that was stopped leaves to the next.

settings.json tells what the run was started with; checkpoint-N holds the trained weights,
optimizer, schedule and random state after step N, trainer_state.json written last.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from trainer.resume import ANEW, SETTINGS_FILE, check_same, keep_settings

STATES = f"checkpoint-*/{TRAINER_STATE_NAME}"
DAMAGED = (SafetensorError, UnpicklingError)
FOUND = ("baselines",)  # of the settings: computed of the data, and no weight hangs from it


def open_steps(folder: Path, settings: Mapping[str, Any], resume: bool) -> Path | None:
    """The last whole step in `folder`, None if there is nothing to go on from.

    Without `resume` the folder is emptied. Raises ValueError naming the first setting that
    differs from those of the saved steps; then nothing was touched.
    """
    if not resume or last_step(folder) is None:
        clear(folder)
    elif not (folder / SETTINGS_FILE).exists():  # nobody knows what they were made with
        check_same(folder, {}, settings, ANEW)
    keep_settings(folder, settings, ANEW, FOUND)
    return last_step(folder)


def last_step(folder: Path) -> Path | None:
    """The newest step that was written whole."""
    whole = [path.parent for path in folder.glob(STATES) if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_whole(state: Path) -> bool:
    """Not where a run was killed in the middle of it."""
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def clear(folder: Path) -> None:
    """Delete it; a run that is killed meanwhile leaves no step that seems whole."""
    for state in folder.glob(STATES):
        state.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def reading(step: str | None) -> Iterator[None]:
    """What does not load of a step, as of a damaged disk, is a ValueError that names it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, EOFError, *DAMAGED) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"{step}: does not load: {why}; {ANEW} starts anew") from error
