"""What Prometheus, and so the dashboard and the autoscaler, get to see."""

import json
import math
from typing import Any

import httpx
import yaml

from tests.containers.checks import wait_until
from tests.containers.clients import Tally
from tests.containers.shell import ROOT, say
from tests.containers.stack import Stack

RANGE = "3m"  # in place of Grafana's variable


def queries() -> list[str]:
    """Of the dashboard, and of the autoscaler's adapter as it would ask for one pod."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "lenvm.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [query.replace("$__rate_interval", RANGE) for query in found] + [autoscaled()]


def autoscaled() -> str:
    """The adapter's query, with a label that is here in place of a pod's."""
    path = ROOT / "deploy" / "kubernetes" / "base" / "autoscaling.yaml"
    (_, rules) = yaml.safe_load_all(path.read_text())
    (rule,) = yaml.safe_load(rules["data"]["config.yaml"])["rules"]
    query = str(rule["metricsQuery"]).replace("<<.GroupBy>>", "job")
    return query.replace("<<.LabelMatchers>>", 'job="values"')


def figures(stack: Stack, tally: Tally) -> None:
    """Prometheus reads both servers, and every query in our files has an answer with data."""
    say("Prometheus")
    seen = wait_until(lambda: states(stack) == {"values": "up", "vllm": "up"})
    tally.check(seen, f"targets: {states(stack)}")
    wait_until(lambda: all(answered(stack, query) for query in queries()))
    empty = [query for query in queries() if not answered(stack, query)]
    tally.check(not empty, f"without data: {empty}")
    say(f"{len(queries()) - len(empty)} of {len(queries())} queries have data")


def states(stack: Stack) -> dict[str, str]:
    """Of the targets, by their job."""
    targets = _ask(stack, "targets").get("activeTargets", [])
    return {target["labels"]["job"]: target["health"] for target in targets}


def answered(stack: Stack, query: str) -> bool:
    """Whether the query gives a number."""
    series = _ask(stack, "query", query=query).get("result", [])
    return any(math.isfinite(float(one["value"][1])) for one in series)


def _ask(stack: Stack, path: str, **fields: str) -> dict[str, Any]:
    """Raises ValueError for a query that Prometheus does not understand."""
    try:
        url = f"{stack.prometheus}/api/v1/{path}"
        reply = httpx.get(url, params=fields, timeout=10, trust_env=False)
    except httpx.HTTPError:
        return {}
    if reply.status_code == 400:
        raise ValueError(f"{fields}: {reply.json()['error']}")
    data: dict[str, Any] = reply.json()["data"] if reply.status_code == 200 else {}
    return data
