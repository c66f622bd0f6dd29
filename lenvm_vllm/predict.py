"""`lenvm predict`: how long would the answer to this prompt be?"""

import os
import sys

import httpx

from value_server.contract.wire import PREDICT_PATH


def predict(prompt: str, *, url: str = "http://127.0.0.1:8100", raw: bool = False) -> None:
    """Print the completion length, in tokens, that the value server predicts for a prompt.

    Parameters
    ----------
    prompt
        A user message, or with --raw the text that the model continues.
    url
        Of the value server.
    raw
        Send the text as it is, without the chat template.
    """
    messages = [{"role": "user", "content": prompt}]
    body = {"prompt": prompt} if raw else {"messages": messages}
    token = os.environ.get("LENVM_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        reply = httpx.post(f"{url}{PREDICT_PATH}", json=body, headers=headers, timeout=60)
    except httpx.HTTPError as error:
        sys.exit(f"{url}: {error}")
    if reply.is_error:
        sys.exit(f"{url}: {reply.status_code} {reply.text}")
    print(f"{reply.json()['predicted_tokens']:.1f}")
