"""`lenvm predict`: how long would the answer to this prompt be?"""

import sys

import httpx

from lenvm_vllm.endpoint import http_client
from lenvm_vllm.settings import load_settings
from value_server.contract.wire import PREDICT_PATH


def predict(prompt: str, *, url: str | None = None, raw: bool = False) -> None:
    """Print the completion length, in tokens, that the value server predicts for a prompt.

    Parameters
    ----------
    prompt
        A user message, or with --raw the text that the model continues.
    url
        Of the value server; by default those of the plugin, LENVM_URL, one after the other.
    raw
        Send the text as it is, without the chat template.
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
        except httpx.HTTPError as error:
            troubles.append(f"{server}: {error}")
            continue
        if reply.is_success:
            print(f"{reply.json()['predicted_tokens']:.1f}")
            return
        troubles.append(f"{server}: {reply.status_code} {reply.text}")
    sys.exit("\n".join(troubles))
