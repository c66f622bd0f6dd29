"""What a server of ours tells of itself."""

import re

import httpx

TIMEOUT_S = 60


def metrics(url: str) -> dict[str, float]:
    """Those of its `/metrics` that are `lenvm_` and have no labels, by name.

    Raises httpx.HTTPError where it does not answer.
    """
    text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
    found = re.findall(r"^(lenvm_\w+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}
