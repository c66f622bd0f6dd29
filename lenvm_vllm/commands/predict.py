"""`lenvm predict`: how long would the answer to this prompt be?"""

import sys
from typing import Any, Literal

import httpx

from lenvm_vllm.settings import load_settings
from lenvm_vllm.values.endpoint import http_client
from value_server.contract.units import UNITS
from value_server.contract.wire import PREDICT_PATH


def predict(
    prompt: str,
    *,
    url: str | None = None,
    raw: bool = False,
    unit: Literal["all", "tokens", "words", "characters"] = "all",
) -> None:
    """Print the completion length that the value server predicts for a prompt.

    A line for each unit, as "93.4 words". Tokens include the end of sequence. It is a typical
    length, below the mean of many answers where these differ.

    Parameters
    ----------
    prompt
        A user message, or with --raw the text that the model continues.
    url
        Of the value server; by default those of the plugin, LENVM_URL, one after the other.
    raw
        Send the text as it is, without the chat template.
    unit
        Print the number of this unit and nothing else.
    """
    messages = [{"role": "user", "content": prompt}]
    body = {"prompt": prompt} if raw else {"messages": messages}
    settings = load_settings({"lenvm": {"url": url}} if url else None)
    options = settings.connection | {"timeout_s": 60.0}
    troubles = []
    for server in settings.url:
        try:
            with http_client(server, **options) as http:
                reply = http.post(PREDICT_PATH, json=body)
            answer = reply.json() if reply.is_success else {}
        except (httpx.HTTPError, ValueError) as error:  # the latter where it is no JSON
            troubles.append(f"{server}: {error}")
            continue
        if not reply.is_success:
            troubles.append(f"{server}: {reply.status_code} {reply.text}")
        elif lines := _lines(answer, unit):
            print("\n".join(lines))
            return
        else:
            troubles.append(f"{server}: an older version, which knows no {unit}")
    sys.exit("\n".join(troubles))


def _lines(answer: dict[str, Any], unit: str) -> list[str]:
    """What is printed; nothing where the answer lacks the unit."""
    known = {u: n for u in UNITS if (n := answer.get(f"predicted_{u}")) is not None}
    if unit == "all":
        return [f"{number:.1f} {name}" for name, number in known.items()]
    return [f"{known[unit]:.1f}"] if unit in known else []
