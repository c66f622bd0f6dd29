"""A value server by hand for the tests of the doctor; a real one is asked in e2e/test_doctor.py."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import numpy as np
import pytest

from tests.support.fakes import INFO
from tests.support.tiny import tiny_tokenizer
from value_server.contract import wire
from value_server.contract.checkpoint import tokenizer_fingerprint


class ByHand(HTTPServer):
    """answer: status and body of what it says of itself. token: that it asks for, if any."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        ours = tokenizer_fingerprint(tiny_tokenizer())
        info = msgspec.structs.replace(INFO, base_model="tiny", tokenizer_fingerprint=ours)
        self.answer = (200, json.dumps(msgspec.to_builtins(info)).encode())
        self.token = ""

    def url(self, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """All values are 0."""

    server: ByHand

    def do_GET(self) -> None:
        token = self.server.token
        if token and self.headers["Authorization"] != f"Bearer {token}":
            self._send(401, b"")
        else:
            self._send(*self.server.answer)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = wire.decode_request(body)
        logits = wire.pack_logits(np.zeros(sum(request.candidate_counts), np.float32))
        held = request.token_counts
        self._send(200, wire.encode(wire.StepReply(logits=logits, held=held)))

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def values() -> Iterator[ByHand]:
    with ByHand() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
