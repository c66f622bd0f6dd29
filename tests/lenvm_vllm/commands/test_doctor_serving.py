"""What `lenvm doctor` says of a running vLLM, for which a server by hand stands here.

Its answers are those that vLLM 0.32 gave, with the plugin and without parts of it; what a real
one gives now is asked in test_e2e_doctor.py.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lenvm_vllm.commands.doctor import serving
from lenvm_vllm.commands.doctor.finding import Finding
from lenvm_vllm.commands.processes import free_port


class Vllm(ThreadingHTTPServer):
    """processor, middleware: the parts of the plugin that it runs. steered: steps with values,
    None where the API server knows nothing of them."""

    version = "0.32.0"
    health = 200
    key: str | None = None
    processor = middleware = True
    steered: int | None = 7
    caches = "True"
    refusal = ""
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[dict[str, Any]] = []
        self.sampled = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def complete(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append(request)
        target = request.get("length_target") if self.middleware else None
        if target == "doctor":
            return 400, error("length_target: expected a number of tokens", "length_target")
        if request.get("vllm_xargs") and self.processor:
            return 400, error("length_target.tokens: Input should be a valid integer", None)
        if self.refusal:
            return 400, error(self.refusal, None)
        exact = target["tokens"] if target and self.processor else 16
        choice: dict[str, Any] = {"index": 0, "text": "…", "finish_reason": "length"}
        if target:
            steps = None if self.steered is None else exact
            choice["length_result"] = {"steps": steps, "steered_steps": self.steered}
        tokens = min(request.get("max_tokens", 16), exact)
        self.sampled += tokens
        return 200, {"choices": [choice], "usage": {"completion_tokens": tokens}}


def error(message: str, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": param, "code": 400}}


class Answer(BaseHTTPRequestHandler):
    server: Vllm

    def do_GET(self) -> None:
        vllm = self.server
        if self.path == "/version":
            self._send(200, {"version": vllm.version})
        elif self.path == "/health":
            self._send(vllm.health, None)
        elif self.path == "/metrics":
            label = f'vllm:cache_config_info{{enable_prefix_caching="{vllm.caches}"}} 1.0'
            self._send(200, label)
        elif self.path == "/v1/models" and self._may():
            self._send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._may():
            self._send(*self.server.complete(json.loads(body)))

    def _may(self) -> bool:
        key = self.server.key
        if may := key is None or self.headers["Authorization"] == f"Bearer {key}":
            return may
        self._send(401, {"error": "Unauthorized"})
        return False

    def _send(self, status: int, body: Any) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        if isinstance(body, str):
            data = body.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(serving, "_PAUSE_S", 0.0)
    with Vllm() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def found(url: str | None) -> tuple[list[Finding], Finding]:
    """(the others, the last one)."""
    *others, last = serving.findings(url)
    assert not any(finding.is_wrong for finding in others), "the first fault is the last row"
    return others, last


def test_all_is_well(vllm: Vllm) -> None:
    for url in (vllm.url, f"{vllm.url}/", f"{vllm.url}/v1", f"{vllm.url}/v1/"):
        (version,), request = found(url)
        assert version.seen == f"{vllm.url}: version 0.32.0"
        assert (request.state, request.seen) == (
            "ok",
            "8 tokens were asked for and came, 7 of 8 steps with values",
        )
    assert vllm.sampled == 4 * 8


def test_the_flag_is_missing(vllm: Vllm) -> None:
    vllm.processor = vllm.middleware = False
    _, last = found(vllm.url)
    assert last.is_wrong
    assert last.seen == "vLLM runs without the plugin, and ignores length_target"
    assert last.advice.startswith("end it, and start it with the flag: `")
    assert last.advice.endswith("serve MODEL --logits-processors lenvm_vllm`")


def test_only_the_middleware_is_there(vllm: Vllm) -> None:
    vllm.processor = False
    _, last = found(vllm.url)
    assert last.seen.startswith("8 tokens were asked for, 16 came: vLLM runs without the plugin")
    assert "--logits-processors lenvm_vllm`" in last.advice


def test_the_middleware_is_missing(vllm: Vllm) -> None:
    vllm.middleware = False
    _, last = found(vllm.url)
    assert last.is_wrong
    assert last.seen.startswith("vLLM runs the logits processor without its middleware")
    for part in ("unset VLLM_PLUGINS", "`pip show lenvm-vllm`", "`--logits-processors lenvm_vllm`"):
        assert part in last.advice


def test_no_values_reach_vllm(vllm: Vllm) -> None:
    vllm.steered = 0
    _, last = found(vllm.url)
    assert last.seen.endswith("came, by the rails alone: vLLM gets no values")
    assert "vLLM's log says why" in last.advice
    assert "LENVM_URL and LENVM_TOKEN must be set where vLLM is started" in last.advice


def test_the_engine_is_elsewhere(vllm: Vllm) -> None:
    vllm.steered = None
    _, last = found(vllm.url)
    assert last.state == "off"
    assert "LENVM_METRICS_DIR" in last.advice


def test_a_request_is_refused(vllm: Vllm) -> None:
    vllm.refusal = "length_target: contradicts speculative decoding"
    _, last = found(vllm.url)
    assert last.seen == f"/v1/completions: HTTP 400 {vllm.refusal}"
    assert last.advice == "correct what it names, in vLLM's flags as a rule"


def test_an_old_vllm_runs(vllm: Vllm) -> None:
    vllm.version = "0.9.2"
    _, last = found(vllm.url)
    assert last.seen == f"{vllm.url}: version 0.9.2 is not supported"
    assert "`pip install 'vllm<0.34,>=0.32' lenvm-vllm`" in last.advice
    assert vllm.asked == []


def test_another_install_than_this_one_runs(vllm: Vllm) -> None:
    vllm.version = "0.33.1"
    (version,), _ = found(vllm.url)
    assert version.state == "ok"
    assert "0.33.1, of another environment than this one, which has 0.32.0" in version.seen


def test_the_engine_has_ended(vllm: Vllm) -> None:
    vllm.health = 503
    _, last = found(vllm.url)
    assert last.seen == f"{vllm.url}: its engine has ended"
    assert last.advice == "look into its log for the first error, and start it anew"


def test_api_keys(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.key = "secret"
    for given in ("", "other"):
        monkeypatch.setenv("VLLM_API_KEY", given)
        _, last = found(vllm.url)
        assert last.is_wrong
        assert last.advice == "set VLLM_API_KEY to the key that vLLM was started with"
        assert "other" not in last.seen
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert found(vllm.url)[1].state == "ok"


def test_no_prefix_cache(vllm: Vllm) -> None:
    vllm.caches = "False"
    _, last = found(vllm.url)
    assert (last.state, last.advice) == ("off", "start it anew with `--enable-prefix-caching`")
    assert "no other endings unless a request asks for them" in last.seen


def test_something_else(vllm: Vllm) -> None:
    vllm.version = None  # type: ignore[assignment]
    _, last = found(vllm.url)
    assert (last.seen, last.advice) == (
        f"{vllm.url}: something else than vLLM",
        "give vLLM's URL as --vllm",
    )


def test_nobody_listens(vllm: Vllm) -> None:
    _, last = found(f"http://127.0.0.1:{free_port()}")
    assert "refused" in last.seen
    assert "serve MODEL --logits-processors lenvm_vllm`, and wait until it runs" in last.advice
    for url in ("127.0.0.1:8000", "localhost"):
        _, last = found(url)
        assert last.advice == "give its URL, http://host:port"


def test_none_is_named() -> None:
    _, last = found(None)
    assert (last.state, last.seen) == ("off", "not looked at")
