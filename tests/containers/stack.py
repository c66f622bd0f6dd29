"""The compose file's services, started, stopped and asked."""

import re
from dataclasses import dataclass
from pathlib import Path

import httpx

from lenvm_vllm.commands.processes import free_port
from tests.containers.shell import CommandError, run, say

PROJECT = "lenvm-check"
FILES = ("-f", "docker-compose.yml", "-f", "tests/containers/compose.yml")
SERVICES = ("values-cpu", "vllm-cpu", "prometheus")
IMAGES = {"cpu": "lenvm-vllm:cpu", "values": "lenvm-vllm:values"}
LONGEST_START_S = 400
HUB = "http://hub:8080"


@dataclass
class Stack:
    """docker: the environment that reaches the engine; images: names of those that are not ours."""

    docker: dict[str, str]
    images: dict[str, str]
    model: Path

    def __post_init__(self) -> None:
        self.ports = {"VLLM_PORT": str(free_port()), "PROMETHEUS_PORT": str(free_port())}
        self.chosen: dict[str, str] = {}

    @property
    def vllm(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.ports['VLLM_PORT']}"

    @property
    def prometheus(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.ports['PROMETHEUS_PORT']}"

    def compose(self, *words: str, timeout: float = 120, output: Path | None = None) -> str:
        """`docker compose WORDS`, of the profile `cpu`. Raises CommandError."""
        command = ("docker", "compose", "-p", PROJECT, *FILES, "--profile", "cpu", *words)
        model = {"MODEL_FOLDER": str(self.model), "HF_ENDPOINT": HUB}
        env = self.docker | self.images | self.ports | model | self.chosen
        return run(*command, timeout=timeout, env=env, output=output)

    def build(self, log: Path) -> dict[str, float]:
        """Make both images; their sizes in GB."""
        build = ("build", "--progress", "plain", "values-cpu", "vllm-cpu")
        say("images")
        try:
            self.compose(*build, timeout=700, output=log)
        except CommandError as error:  # an index that failed once; what is built stays
            say(f"once more: {str(error)[-600:]}")
            self.compose(*build, timeout=400, output=log)
        form = ("--format", "{{.Size}}")
        return {
            name: round(
                int(run("docker", "image", "inspect", image, *form, env=self.docker)) / 1e9, 2
            )
            for name, image in IMAGES.items()
        }

    def up(self, *services: str, **environment: str) -> None:
        """Start the services and wait until they are healthy, with this in the environment."""
        self.chosen = environment
        say(f"up {' '.join(services)} {environment}")
        flags = ("--detach", "--no-build", "--wait", "--wait-timeout", str(LONGEST_START_S))
        self.compose("up", *flags, *services, timeout=LONGEST_START_S + 60)

    def stop(self, service: str) -> None:
        """`docker stop`, with the service's own grace period."""
        self.compose("stop", service, timeout=150)

    def inside(self, service: str, code: str) -> str:
        """What a line of Python prints in the service's container."""
        return self.compose("exec", "-T", service, "python3", "-c", code).strip()

    def counters(self) -> dict[str, float]:
        """The plugin's sums, as vLLM shows them."""
        text = httpx.get(f"{self.vllm}/metrics", timeout=10, trust_env=False).text
        lines = re.findall(r"^lenvm_(\w+)_total (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in lines}

    def logs(self) -> str:
        """The last lines of each service."""
        try:
            return self.compose("logs", "--no-color", "--tail", "60")
        except CommandError as error:
            return str(error)

    def down(self) -> None:
        """Containers, network and volumes go, as far as that can be had."""
        self.chosen = {}
        try:
            self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
        except CommandError as error:
            say(f"something is left: {error}")
