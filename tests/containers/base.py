"""What the images are built on: the images of the registry, or stand-ins where it is out of reach.

The stand-in of Python's image is a small Debian with its Python, which takes along how this
machine's pip finds packages and whom it trusts. It differs from the real one in its Python (no
headers, Debian's patches) and stays outside of the Dockerfile.
"""

import contextlib
import functools
import os
import re
import shutil
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

from tests.containers.engine import NoEngineError, mirror
from tests.containers.shell import ROOT, CommandError, run, say, works

STAND_IN = {"BASE_IMAGE": "lenvm-stand-in/python", "PROMETHEUS_IMAGE": "lenvm-stand-in/prometheus"}
RELEASE = "bookworm"  # of Python's image
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
PORTABLE = ("index-url", "extra-index-url", "trusted-host", "proxy")
CA_FILE = "etc/ssl/certs/ca-certificates.crt"


@contextlib.contextmanager
def base_images(docker: dict[str, str], folder: Path) -> Iterator[dict[str, str]]:
    """Names of the images to build on and to run, there for the block.

    docker: the environment that reaches the engine. Raises NoEngineError.
    """
    real = {"BASE_IMAGE": dockerfile(r"ARG BASE=(\S+)"), "PROMETHEUS_IMAGE": prometheus_image()}
    if all(_pulled(image, docker) for image in real.values()):
        say("the real base images")
        yield real
        return
    say("no registry in reach: stand-ins for the base images")
    with _wheels(docker, folder / "wheels") as links:
        try:
            _import(docker, folder / "root", links)
            _prometheus(docker)
        except (CommandError, OSError) as error:
            raise NoEngineError(f"no base image: {error}") from error
        yield STAND_IN


def dockerfile(pattern: str) -> str:
    """The group of the pattern's first match in the Dockerfile."""
    found = re.search(pattern, (ROOT / "Dockerfile").read_text())
    assert found, pattern
    return found[1]


def prometheus_image() -> str:
    """As the compose file has it."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return str(compose["services"]["prometheus"]["image"])


def pip_settings(listed: str, links: str) -> str:
    """A pip.conf that says the same as `pip config list`, but for files of this machine.

    links: where the container finds wheels, beside the index.
    """
    pairs = re.findall(r"^(\S+)\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    pairs.sort(key=lambda pair: pair[0] == ":env:")  # wins
    values = {
        name: " ".join(word for word in value.split() if not word.startswith(("file:", "/")))
        for _, name, value in pairs
        if name in PORTABLE
    }
    host = links.split("/")[2].split(":")[0]
    values["trusted-host"] = " ".join([values.get("trusted-host", ""), host]).strip()
    ours = {"find-links": links, "cert": f"/{CA_FILE}", "retries": "2", "timeout": "120"}
    lines = [f"{name} = {value}" for name, value in (values | ours).items() if value]
    return "\n".join(["[global]", *lines, ""])


def ca_bundle() -> Path | None:
    """The authorities that this machine's programs trust, if it has a file of them."""
    named = [os.environ.get(name) for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    named += [ssl.get_default_verify_paths().cafile, f"/{CA_FILE}"]
    return next((Path(name) for name in named if name and Path(name).is_file()), None)


def _pulled(image: str, docker: dict[str, str]) -> bool:
    here = works("docker", "image", "inspect", image, env=docker)
    return here or works("docker", "pull", "-q", image, timeout=300, env=docker)


@contextlib.contextmanager
def _wheels(docker: dict[str, str], folder: Path) -> Iterator[str]:
    """A page, on the engine's bridge, of the torch wheel that this machine's pip finds."""
    folder.mkdir()
    torch = dockerfile(r"(torch==[\w.+]+)")
    works(*_pip("download", "-q", "--no-deps", "-d", str(folder), torch), timeout=300)
    form = "{{(index .IPAM.Config 0).Gateway}}"
    gateway = run("docker", "network", "inspect", "bridge", "-f", form, env=docker).strip()
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer((gateway, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{gateway}:{server.server_port}/"
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def _pip(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pip", *words)


def _import(docker: dict[str, str], root: Path, links: str) -> None:
    say(f"debootstrap {RELEASE}")
    flags = ("--variant=minbase", f"--include={PACKAGES}")
    log = root.with_suffix(".log")
    run("debootstrap", *flags, RELEASE, root, mirror(), timeout=400, output=log)
    run("chroot", root, "ln", "-sf", "python3", "/usr/bin/python")
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    for rest in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / rest)
        (root / rest / "partial").mkdir(parents=True)
    if bundle := ca_bundle():
        shutil.copyfile(bundle, root / CA_FILE)
    (root / "etc/pip.conf").write_text(pip_settings(run(*_pip("config", "list")), links))
    tar = root.with_suffix(".tar")
    run("tar", "-C", root, "-cf", tar, ".", timeout=120)
    run("docker", "import", tar, STAND_IN["BASE_IMAGE"], timeout=120, env=docker)
    tar.unlink()
    shutil.rmtree(root)


def _prometheus(docker: dict[str, str]) -> None:
    say("Debian's Prometheus")
    text = (ROOT / "tests" / "containers" / "prometheus.Dockerfile").read_text()
    arguments = ("--build-arg", f"BASE={STAND_IN['BASE_IMAGE']}")
    name = ("-t", STAND_IN["PROMETHEUS_IMAGE"])
    run("docker", "build", "-q", *arguments, *name, "-", timeout=300, env=docker, text=text)
