"""`lenvm …` in several processes on CPUs, as its launchers start it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "trainer" / "configs"
BIN = Path(sys.executable).parent
CPUS = "num_processes: 2\nuse_cpu: true"


def torchrun(module: str = "trainer") -> list[str]:
    """The start of a command of two processes that each keep the whole model."""
    return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", module]


def sharded(folder: Path) -> list[str]:
    """The start of a command that shards with the repository's config; a copy is in `folder`."""
    config = folder / "fsdp2.yaml"
    config.write_text((CONFIGS / "fsdp2.yaml").read_text().replace("num_processes: 8", CPUS))
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", str(config)]
    return [*launcher, "--main_process_port", "0", "-m", "tests.support.sharded"]


def launch(command: list[str], *options: object, **env: str) -> subprocess.CompletedProcess:
    """With so many options, to its end."""
    return subprocess.run(
        [*command, *map(str, options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env,
        capture_output=True,
        text=True,
    )
