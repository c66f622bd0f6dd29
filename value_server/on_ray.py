"""Value servers on a Ray cluster, each an application of Ray Serve at a path of its own.

    python -m value_server.on_ray CHECKPOINT --replicas 2

Ray places them, gives them their GPUs and starts a dead one anew. Whose a session is stays with
the plugin, as everywhere: its list of URLs is http://HOST:8000/values-0, /values-1, … So no
router has to look into a step, which carries sessions of several servers.
"""

import signal
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from ray import serve

from value_server.serve import build_app
from value_server.settings import ServerSettings

app = App(help=__doc__)


@app.default
def main(
    checkpoint: Path,
    *,
    replicas: int = 2,
    gpus: float = 0,
    cpus: float = 1,
    settings: Annotated[ServerSettings | None, Parameter(name="*")] = None,
) -> None:
    """Serve the value model in CHECKPOINT on the Ray cluster that is there, until interrupted.

    Parameters
    ----------
    checkpoint
        Folder of a value model, at the same place on every node.
    replicas
        Value servers.
    gpus
        Of each; a fraction lets several share one.
    cpus
        Of each.
    """
    urls = start(checkpoint, settings or ServerSettings(), replicas, gpus, cpus)
    print(",".join(urls))
    signal.pause()


def start(
    checkpoint: Path, settings: ServerSettings, replicas: int, gpus: float = 0, cpus: float = 1
) -> list[str]:
    """URLs of the value servers. Each is one process: its sessions are there and nowhere else."""
    serve.start(http_options={"host": settings.host, "port": settings.port})

    @serve.deployment(
        num_replicas=1,
        max_ongoing_requests=settings.max_waiting,
        ray_actor_options={"num_gpus": gpus, "num_cpus": cpus},
        health_check_period_s=2,
    )
    @serve.ingress(lambda: build_app({"": checkpoint}, settings))
    class ValueServer:
        pass

    names = [f"values-{number}" for number in range(replicas)]
    for name in names:
        serve.run(ValueServer.bind(), name=name, route_prefix=f"/{name}")  # type: ignore[attr-defined]  # by the decorator
    return [f"http://{settings.host}:{settings.port}/{name}" for name in names]


if __name__ == "__main__":
    app()
