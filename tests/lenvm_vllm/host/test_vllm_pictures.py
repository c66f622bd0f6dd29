"""Pictures through vLLM's own connector: from where it may, and not more than wanted."""

import asyncio
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lenvm_vllm.host.pictures import load, prepared_plainly
from tests.support.shown import data_url, with_vllms_client

FILE = bytes(range(256)) * 4
MOST = len(FILE)


def may_load(path: str = "", domains: list[str] | None = None) -> Any:
    return SimpleNamespace(allowed_local_media_path=path, allowed_media_domains=domains)


def loaded(url: str, config: Any = None, most: int = MOST) -> bytes:
    return asyncio.run(with_vllms_client(load(url, config or may_load(), most)))


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """Of a server on loopback, which has one file and a way round to it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/round" else 200)
            if self.path == "/round":
                self.send_header("Location", "/file")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/round" else FILE)

        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_data_url() -> None:
    assert loaded(data_url(FILE)) == FILE
    for size in range(4):  # of all paddings
        assert loaded(data_url(FILE[:size]), most=size) == FILE[:size]
        with pytest.raises(ValueError, match=f"more than {size} bytes"):
            loaded(data_url(FILE[: size + 1]), most=size)


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:image/png;base64,?", "ftp://x/y", ""])
def test_what_vllm_does_not_take(url: str) -> None:
    with pytest.raises((ValueError, NotImplementedError)):
        loaded(url)


def test_an_address_only_where_vllm_may(page: str) -> None:
    assert loaded(f"{page}/file") == FILE
    assert loaded(f"{page}/file", may_load(domains=["127.0.0.1"])) == FILE
    with pytest.raises(ValueError, match="allowed domains"):
        loaded(f"{page}/file", may_load(domains=["example.org"]))
    with pytest.raises(Exception, match=r"(?i)exceed"):
        loaded(f"{page}/file", most=MOST - 1)


def test_a_redirect_as_vllm_follows_it(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(f"{page}/round") == FILE
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    assert loaded(f"{page}/round") == b""


def test_a_file_only_below_the_allowed_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in" / "x.png", tmp_path / "x.png"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(FILE)
    config = may_load(str(inside.parent))
    assert loaded(inside.as_uri(), config) == FILE
    for url in (outside.as_uri(), f"file://{inside.parent}/../x.png"):
        with pytest.raises(ValueError, match="allowed-local-media-path"):
            loaded(url, config)
    with pytest.raises(RuntimeError, match="allowed-local-media-path"):
        loaded(inside.as_uri())
    with pytest.raises(ValueError, match="more than 3 bytes"):
        loaded(inside.as_uri(), config, most=3)


@pytest.mark.parametrize(
    ("processor", "media", "plainly"),
    [
        (None, {}, True),
        ({}, {"video": {"num_frames": 4}}, True),
        ({"max_pixels": 10}, {}, False),
        (None, {"image": {"image_mode": None}}, False),
    ],
)
def test_an_operators_own_way_is_known(processor: Any, media: Any, plainly: bool) -> None:
    config = SimpleNamespace(mm_processor_kwargs=processor, media_io_kwargs=media)
    assert prepared_plainly(SimpleNamespace(multimodal_config=config)) is plainly
    assert prepared_plainly(SimpleNamespace(multimodal_config=None)) is False
