"""What other clients send where their users ask for a length of 80: writes requests.json.

    python -m venv /tmp/clients
    /tmp/clients/bin/pip install openai langchain-openai langchain-community langchain-litellm \\
        'litellm[proxy]' llama-index-llms-openai-like
    npm install --prefix /tmp/clients ai @ai-sdk/openai-compatible
    /tmp/clients/bin/python tests/lenvm_vllm/api/recorded/record.py

Nothing else imports these libraries; the tests read what is recorded. Each request is recorded
with the code that made it, in which `here` is the address of the server; what a library raises
itself, before it asks, is recorded in place of a body. langchain-litellm says nothing of a field
that its constructor does not know, the AI SDK of options of another provider, and LiteLLM's
`responses` of parameters that are not OpenAI's: these lose the length before anything is sent.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Thread
from typing import Any

CASES = Path(__file__).with_name("cases.txt")
RECORD = Path(__file__).with_name("requests.json")
PROXY_PORT = 4017
NAMES = """
import asyncio, httpx, litellm
from langchain_community.llms import VLLMOpenAI
from langchain_litellm import ChatLiteLLM
from langchain_openai import ChatOpenAI, OpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openai import OpenAI as Client
"""
AI_SDK = """
import {createOpenAICompatible} from "@ai-sdk/openai-compatible";
import {generateText, streamText} from "ai";
const provider = createOpenAICompatible({name: "vllm", baseURL: process.argv[1]});
const model = provider("m");
"""


class Recorder(BaseHTTPRequestHandler):
    """Keeps each request and answers next to nothing."""

    requests: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append({"path": self.path, "body": body})
        answer = b"data: [DONE]\n\n" if body.get("stream") else b"{}"
        self.send_response(200)
        kind = "text/event-stream" if body.get("stream") else "application/json"
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def litellm_proxy(url: str) -> Iterator[str]:
    """LiteLLM's proxy before `url`: `plain` asks for nothing itself, the others for a length."""
    length = {"plain": {}, "short": {"length_target": 80}}
    length["short-extra"] = {"extra_body": {"length_target": 80}}
    backend = {"model": "hosted_vllm/m", "api_base": url, "api_key": "none"}
    config = {
        "model_list": [
            {"model_name": name, "litellm_params": backend | more} for name, more in length.items()
        ],
        "litellm_settings": {"drop_params": True},
        "router_settings": {"disable_cooldowns": True, "num_retries": 0},
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(config, file)
        file.flush()
        command = [str(Path(sys.executable).with_name("litellm")), "--config", file.name]
        command += ["--host", "127.0.0.1", "--port", str(PROXY_PORT)]
        proxy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{PROXY_PORT}/v1"
        finally:
            proxy.terminate()
            proxy.wait()


def recorded(client: str, written: str, names: dict[str, Any]) -> dict[str, Any]:
    """The first request that comes of the code, or what it raises without one."""
    Recorder.requests.clear()
    said = {"client": client, "version": version_of(client), "written": written}
    try:
        if client.startswith("@"):
            code = f"{AI_SDK}\nawait {written};"
            command = ["node", "--input-type=module", "-e", code, names["url"]]
            subprocess.run(command, cwd=sys.prefix, check=True, capture_output=True)
        else:
            eval(written, names)
    except Exception as error:  # of an empty answer; without a request it is the client's own
        said["error"] = f"{type(error).__name__}: {error}"
    if Recorder.requests:
        said.pop("error", None)
        said |= Recorder.requests[0]
    return said


def version_of(client: str) -> str:
    if not client.startswith("@"):
        return version(client)
    package = Path(sys.prefix) / "node_modules" / client / "package.json"
    return str(json.loads(package.read_text())["version"])


def main() -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for prices in the network
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    names: dict[str, Any] = {"url": url, "messages": [{"role": "user", "content": "Hi"}]}
    names["here"] = {"base_url": url, "api_key": "none", "max_retries": 0}
    exec(NAMES, names)
    rows = []
    with litellm_proxy(url) as proxy:
        names["ask_proxy"] = lambda path, **body: names["httpx"].post(proxy + path, json=body)
        for line in CASES.read_text().splitlines():
            client, written = line.split(maxsplit=1)
            while "ask_proxy" in written and not ready(names["httpx"], proxy):
                time.sleep(1)
            rows.append(recorded(client, written, names))
            print(json.dumps(rows[-1]), flush=True)
    RECORD.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def ready(httpx: Any, proxy: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return bool(httpx.get(proxy.replace("/v1", "/health/liveliness")).status_code == 200)
    return False


if __name__ == "__main__":
    main()
