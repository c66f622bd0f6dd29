"""The files that deploy: each is read by its own format's checker, and names only what exists.

No image is built here (tests/containers does that); what they run is tried in test_packaging.py.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml

from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.telemetry.metrics import HELP
from tests.support.tiny import tiny_model
from value_server.engine.engine import Engine
from value_server.http.metrics import Figures, Metrics
from value_server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
KIND = {"values": "StatefulSet", "vllm": "Deployment"}
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def compose() -> dict[str, Any]:
    """With the defaults of its variables."""
    text = (ROOT / "docker-compose.yml").read_text()
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text))
    return found


@pytest.mark.parametrize("path", [ROOT / "Dockerfile", *ROOT.glob("tests/*/*.Dockerfile")], ids=str)
def test_dockerfile(path: Path) -> None:
    run = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_compose_file() -> None:
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose())).validate()  # "<<" merged
    with pytest.raises(ValueError, match="prots"):
        compose_spec.PyCompose.from_yaml("services: {a: {image: a, prots: []}}")


@pytest.mark.parametrize(
    "path", sorted(KUBERNETES.glob("*/[!k]*.yaml")), ids=lambda path: path.stem
)
def test_manifests(path: Path) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, "1.33", strict=True)


@pytest.mark.parametrize("folder", ["base", "cache"])
def test_every_manifest_is_applied(folder: str) -> None:
    (kustomization,) = documents(KUBERNETES / folder / "kustomization.yaml")
    files = [path.name for path in (KUBERNETES / folder).glob("[!k]*.yaml")]
    assert sorted(kustomization["resources"]) == sorted(files)


def rendered(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What `kubectl apply -k` sends, by kind and name, each of it valid."""
    run = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = list(yaml.safe_load_all(run.stdout))
    for document in found:
        kubernetes_validate.validate(document, "1.33", strict=True)
    return {(document["kind"], document["metadata"]["name"]): document for document in found}


def pods(objects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of what `rendered` gave: each pod's specification, by its app."""
    return {app: objects[kind, app]["spec"]["template"]["spec"] for app, kind in KIND.items()}


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay(overlay: str) -> None:
    """Each container has its image, what it needs of the node, and no neighbour's variables."""
    objects = rendered(KUBERNETES / overlay)
    images = {"cpu": ("values", "cpu"), "gpu": ("values-cuda", "cuda")}[overlay]
    for (app, pod), tag in zip(pods(objects).items(), images, strict=True):
        (container,) = pod["containers"]
        assert container["image"] == f"lenvm-vllm:{tag}"
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay == "gpu")
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        assert pod["enableServiceLinks"] is False
        (user,) = set(re.findall(r"^USER (\d+):", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
        assert pod["securityContext"]["runAsUser"] == int(user)
        scraped = objects[KIND[app], app]["spec"]["template"]["metadata"]["annotations"]
        assert int(scraped["prometheus.io/port"]) in [
            p["containerPort"] for p in container["ports"]
        ]
    assert objects["Deployment", "vllm"]["spec"]["strategy"] == {"type": "Recreate"}


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_cache(tmp_path: Path, overlay: str) -> None:
    """The component puts every pod's models on a claim."""
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": [os.path.relpath(KUBERNETES / overlay, tmp_path)],
                "components": [os.path.relpath(KUBERNETES / "cache", tmp_path)],
            }
        )
    )
    objects = rendered(tmp_path)
    volumes = {app: {v["name"]: v for v in pod["volumes"]} for app, pod in pods(objects).items()}
    (template,) = objects["StatefulSet", "values"]["spec"]["volumeClaimTemplates"]
    assert template["metadata"]["name"] == "models"
    assert "models" not in volumes["values"]
    claim = volumes["vllm"]["models"]["persistentVolumeClaim"]["claimName"]
    assert ("PersistentVolumeClaim", claim) in objects


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_is_whole(profile: str) -> None:
    """Whatever a service waits for or mounts is there."""
    services = {
        name: service
        for name, service in compose()["services"].items()
        if profile in service["profiles"]
    }
    assert {"prometheus", "grafana", f"vllm-{profile}", f"values-{profile}"} == set(services)
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        for volume in service["volumes"]:
            source = str(volume).split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists()
    networks = [service["networks"] for service in services.values() if "networks" in service]
    names = {alias for network in networks for alias in network["default"]["aliases"]}
    targets = re.findall(r"targets: \[\"(\w+):", (DEPLOY / "prometheus.yml").read_text())
    assert set(targets) == names


def environments() -> list[dict[str, str]]:
    """Of every container that runs one of our two programs."""
    found = [
        {name: value or "" for name, value in service["environment"].items()}
        for name, service in compose()["services"].items()
        if name.startswith(("vllm", "values"))
    ]
    for path in (KUBERNETES / "base").glob("v*.yaml"):
        for document in documents(path):
            pod = document.get("spec", {}).get("template", {}).get("spec", {})
            found += [{e["name"]: e["value"] for e in c["env"]} for c in pod.get("containers", ())]
    return found


def test_environments_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name would be ignored, and a wrong value stop the server where it runs."""
    known = {f"LENVM_{name.upper()}" for name in Settings.model_fields}
    known |= {f"LENVM_SERVER_{name.upper()}" for name in ServerSettings.model_fields}
    assert len(environments()) == 6
    for environment in environments():
        ours = {k: v for k, v in environment.items() if k.startswith("LENVM_")}
        assert set(ours) <= known
        with monkeypatch.context() as patch:
            for name, value in ours.items():
                patch.setenv(name, value)
            settings, server = load_settings(), ServerSettings()
        assert all(url.endswith(":8100") for url in settings.url)
        assert server.drain_s in (1, 5)


def test_dashboard_and_autoscaler_name_metrics_that_exist() -> None:
    figures = Figures({"": Metrics(Engine(tiny_model(), slots=64))})
    exposed = set(re.findall(r"^(lenvm_\w+)", figures.render().decode(), re.MULTILINE))
    exposed |= {f"lenvm_{name}_total" for name in HELP}
    figures.error("busy", "")
    exposed |= set(re.findall(r"^(lenvm_\w+)", figures.render().decode(), re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana" / "lenvm.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    (_, rules) = documents(KUBERNETES / "base" / "autoscaling.yaml")
    named = set(re.findall(r"lenvm_\w+", " ".join(queries)))
    named |= set(re.findall(r"lenvm_\w+(?:bucket|count)", rules["data"]["config.yaml"]))
    assert named <= exposed
    assert len(queries) > 12


def dockerfile_list(keyword: str) -> list[list[str]]:
    """The JSON lists of all lines of a kind in the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = re.findall(rf"^{keyword}.*?(\[.*\])$", text, re.MULTILINE)
    return [json.loads(line) for line in lines]


def test_commands_of_vllm() -> None:
    """All load the plugin and let running requests end, within the time that they get for it."""
    services = [s for n, s in compose()["services"].items() if n.startswith("vllm")]
    (deployment,) = (
        d for d in documents(KUBERNETES / "base" / "vllm.yaml") if "template" in d["spec"]
    )
    pod = deployment["spec"]["template"]["spec"]
    graces = [int(service["stop_grace_period"].removesuffix("s")) for service in services]
    commands = [shlex.split(service["command"]) for service in services]
    graces.append(pod["terminationGracePeriodSeconds"])
    commands.append(pod["containers"][0]["args"])
    for words, grace in zip(commands, graces, strict=True):
        assert words[words.index("--logits-processors") + 1] == "lenvm_vllm"
        assert int(words[words.index("--shutdown-timeout") + 1]) + 20 <= grace
    for words in dockerfile_list("ENTRYPOINT"):
        assert words[-1] == "serve"


def test_health_checks_ask_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker gives containers the proxies of its own configuration."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "127.0.0.0/8")  # which Python does not read
    services = [
        s["healthcheck"]["test"][1:] for s in compose()["services"].values() if "build" in s
    ]
    checks = {json.dumps(words) for words in (*services, *dockerfile_list("HEALTHCHECK"))}
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for check in checks:
            words = json.loads(
                re.sub("127.0.0.1:8[01]00", f"127.0.0.1:{server.server_port}", check)
            )
            assert subprocess.run([sys.executable, *words[1:]], check=False).returncode == 0
        server.shutdown()
    assert len(checks) == 2


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
