"""A container engine: the one that answers, or one of our own for the length of a block.

Our own is Debian's, with socket and data in a folder that is the caller's to remove. Afterwards
bridge and firewall rules are what they were. Compose and buildx come from the next release of
Debian, since this one has neither; they are unpacked, not installed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.containers.shell import CommandError, run, say, works

COMMANDS = {"dockerd": "docker.io", "debootstrap": "debootstrap", "iptables": "iptables"}
COMMANDS |= {"ip": "iproute2"}  # each with its package
ROOM_GB = 12
PLUGINS = ("docker-compose", "docker-buildx")
PLUGINS_RELEASE = "trixie"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
BRIDGE = "172.17.0.1/16"
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
LINKS = Path("/sys/class/net")


class NoEngineError(Exception):
    """No container engine answers, and none can be installed."""


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which `docker` reaches an engine. Raises NoEngineError.

    folder: an empty one, on a disk with room.
    """
    env: dict[str, str] = {}
    if not _answers(env):
        _check_host()
        _check_room(folder)
        _install([package for command, package in COMMANDS.items() if not shutil.which(command)])
    if not works("docker", "compose", "version") or not works("docker", "buildx", "version"):
        _check_host()
        env["DOCKER_CONFIG"] = str(_plugins(folder / "config"))
    if _answers(env):
        say("an engine answers: taking that one")
        yield env
        return
    with _network_as_it_was(), _daemon(folder) as socket:
        yield env | {"DOCKER_HOST": socket}


def mirror() -> str:
    """Address of the Debian archive that this machine's apt uses. Raises NoEngineError."""
    release = _os_release()["VERSION_CODENAME"]
    wanted = ("Identifier: Packages", "Origin: Debian", f"Codename: {release}", "Component: main")
    try:
        found = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted).split()
        return found[0]
    except (CommandError, IndexError) as error:
        raise NoEngineError(f"apt knows no Debian archive of {release}") from error


def _answers(env: Mapping[str, str]) -> bool:
    return works("docker", "info", "--format", "{{.ServerVersion}}", env=env)


def _os_release() -> dict[str, str]:
    text = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name: value.strip('"') for name, value in pairs}


def _check_host() -> None:
    if os.geteuid() != 0:
        raise NoEngineError("no container engine answers, and only root can install one")
    if _os_release().get("ID") != "debian":
        raise NoEngineError("no container engine answers, and this is no Debian to install one on")


def _check_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < ROOM_GB:
        raise NoEngineError(f"{folder}: {free:.0f} GB free, {ROOM_GB} needed")


def _install(packages: list[str]) -> None:
    say(f"apt-get update; install {' '.join(packages) or 'nothing more'}")
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    wait = ("-o", "DPkg::Lock::Timeout=120")
    works("apt-get", *wait, "update", timeout=180, env=env)  # an archive of others may be away
    flags = ("-q", "-y", "--no-install-recommends")
    try:
        run("apt-get", *wait, "install", *flags, *packages, timeout=400, env=env)
    except CommandError as error:
        raise NoEngineError(f"the engine cannot be installed: {error}") from error


def _plugins(config: Path) -> Path:
    """A configuration folder of docker's with compose and buildx in it."""
    say(f"{' '.join(PLUGINS)} of {PLUGINS_RELEASE}")
    folder = config / "cli-plugins"
    folder.mkdir(parents=True)
    lists = config / "lists"
    (lists / "partial").mkdir(parents=True)
    source = config / "sources.list"
    source.write_text(f"deb [signed-by={KEYRING}] {mirror()} {PLUGINS_RELEASE} main\n")
    options = {
        "Dir::Etc::SourceList": str(source),
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": str(lists),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    try:
        run("apt-get", *flags, "update", timeout=180)
        for name in PLUGINS:
            _unpack(name, flags, config)
            binary = config / "usr/libexec/docker/cli-plugins" / name
            shutil.move(binary, folder / name)
    except (CommandError, OSError) as error:
        raise NoEngineError(f"no {' or '.join(PLUGINS)}: {error}") from error
    return config


def _unpack(package: str, flags: list[str], folder: Path) -> None:
    """Raises CommandError; `folder` gets the package's file and what it holds."""
    run("apt-get", "-q", *flags, "download", package, timeout=180, cwd=folder)
    (file,) = folder.glob(f"{package}_*.deb")
    run("dpkg-deb", "--extract", file, folder)


@contextlib.contextmanager
def _network_as_it_was() -> Iterator[None]:
    """Forwarding, firewall rules and links, which a daemon changes and leaves behind."""
    forwarding, links = FORWARDING.read_text(), {link.name for link in LINKS.iterdir()}
    try:
        rules = {table: run("iptables-save", "-t", table) for table in ("filter", "nat")}
    except CommandError as error:
        raise NoEngineError(str(error)) from error
    try:
        yield
    finally:
        for link in {link.name for link in LINKS.iterdir()} - links:
            works("ip", "link", "delete", link)
        for table, text in rules.items():
            works("iptables-restore", "-T", table, text=text or f"*{table}\nCOMMIT\n")
        FORWARDING.write_text(forwarding)


@contextlib.contextmanager
def _daemon(folder: Path) -> Iterator[str]:
    """Address of a dockerd of our own, which keeps everything in `folder`."""
    socket = f"unix://{folder}/docker.sock"
    roots = ("--data-root", folder / "data", "--exec-root", folder / "exec")
    files = ("--pidfile", folder / "docker.pid", "--host", socket, "--bip", BRIDGE)
    say("dockerd")
    log = folder / "dockerd.log"
    with log.open("wb") as out:
        command = [str(word) for word in ("dockerd", *roots, *files)]
        child = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        _wait_for(child, socket, log)
        yield socket
    finally:
        _end(child)


def _wait_for(child: subprocess.Popen[bytes], socket: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while not _answers({"DOCKER_HOST": socket}):
        if child.poll() is not None or time.monotonic() > deadline:
            end = log.read_text(errors="replace")[-3000:]
            raise NoEngineError(f"dockerd does not start here:\n{end}")
        time.sleep(0.5)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Its containers and containerd go with it, if it gets the time."""
    child.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(60)
    child.kill()
    child.wait()
