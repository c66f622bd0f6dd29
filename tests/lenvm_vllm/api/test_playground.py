"""The playground's route: what it serves, to whom, and under which headers. The page itself is
driven in a browser by test_e2e_playground."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import lenvm_vllm.api.playground
from lenvm_vllm.api.middleware import LengthTargetMiddleware
from tests.support.through import send_through

FOLDER = Path(lenvm_vllm.api.playground.__file__).parent
FILES = sorted(p.name for p in FOLDER.iterdir() if p.is_file() and p.suffix != ".py")
PAGE = "lenvm/"  # what the page's own links begin with


async def vllm(scope: Any, receive: Any, send: Any) -> None:
    """Knows no path."""
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b"vLLM"})


def get(path: str, query: str = "", method: str = "GET", root: str = "") -> Any:
    """(status, headers, body)"""
    scope = {"root_path": root, "query_string": query.encode()}
    middleware = LengthTargetMiddleware(vllm)
    status, raw, body = send_through(middleware, path=root + path, method=method, **scope)
    return status, {name.decode(): value.decode() for name, value in raw.items()}, body


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_PLAYGROUND", "true")


@pytest.mark.parametrize("path", ["/lenvm", "/lenvm/", "/lenvm/app.js", "/lenvm/rails"])
def test_off_by_default(path):
    assert get(path)[0] == 418


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize("root", ["", "/behind/a/proxy"])
def test_page_has_a_strict_policy(root):
    status, headers, body = get("/lenvm", root=root)
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert int(headers["content-length"]) == len(body)
    assert headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}


@pytest.mark.usefixtures("on")
def test_each_file_has_its_type():
    kinds = {name: get(f"/lenvm/{name}")[1]["content-type"] for name in FILES}
    del kinds["index.html"]
    types = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert {name: kind.split(";")[0] for name, kind in kinds.items()} == {
        name: types[Path(name).suffix] for name in kinds
    }


@pytest.mark.usefixtures("on")
def test_all_that_the_page_names_is_there():
    html = (FOLDER / "index.html").read_text()
    named = set(re.findall(r'(?:src|href)="([^"]+)"', html))
    for script in FOLDER.glob("*.js"):
        modules = re.findall(r'from "\./([^"]+)"', script.read_text())
        named |= {PAGE + module for module in modules}
    assert named == {PAGE + name for name in FILES if name != "index.html"}
    assert all(get(f"/{name}")[0] == 200 for name in named)


def test_the_wheel_has_all_files():
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["lenvm_vllm.api.playground"]
    assert {p.name for pattern in patterns for p in FOLDER.glob(pattern)} == set(FILES)


def test_nothing_comes_from_elsewhere():
    """One address is a name, not a place: that of SVG."""
    text = "".join((FOLDER / name).read_text() for name in FILES)
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", text)


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(
    "path",
    [
        *("/lenvm/nothing.js", "/lenvm/__init__.py", "/lenvm/index.html", "/lenvm/../settings.py"),
        *("/lenvm/..%2fsettings.py", "/lenvm//app.js", "/lenvm/app.js/x", "/lenvm/%00"),
    ],
)
def test_unknown_files(path):
    status, headers, body = get(path)
    assert (status, body) == (404, b"no such file")
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.usefixtures("on")
def test_a_slash_too_many_leads_to_the_page():
    status, headers, _ = get("/lenvm/", root="/proxy")
    assert (status, headers["location"]) == (307, "../lenvm")


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/lenvm"), ("DELETE", "/lenvm/app.js"), ("GET", "/lenvmx"), ("GET", "/v1/models")],
)
def test_all_else_is_left_to_vllm(method, path):
    assert get(path, method=method)[0] == 418


@pytest.mark.usefixtures("on")
def test_head_has_no_body():
    status, headers, body = get("/lenvm/app.js", method="HEAD")
    assert (status, body) == (200, b"")
    assert headers["content-length"] == str((FOLDER / "app.js").stat().st_size)


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(
    ("target", "first", "last", "landing", "unit"),
    [
        (100, 90, 110, [95, 110], "tokens"),
        ({"tokens": 100, "tolerance": 0}, 100, 100, [96, 100], "tokens"),
        ({"tokens": 100, "tolerance": None}, 1, None, [95, 110], "tokens"),
        ({"mode": "at_most", "tokens": 100}, 1, 100, [80, 100], "tokens"),
        ({"mode": "range", "min_tokens": 80, "max_tokens": 120}, 80, 120, [96, 120], "tokens"),
        ({"mode": "at_least", "tokens": 100}, 100, None, None, "tokens"),
        ({"mode": "tilt", "beta": -5}, 1, None, None, "tokens"),
        ({"tokens": 100, "policy": "greedy"}, 90, 110, None, "tokens"),
        ({"tokens": 100, "policy": "rails"}, 90, 110, None, "tokens"),
        ({"tokens": 100, "policy": "landing"}, 90, 110, [95, 110], "tokens"),
        ({"mode": "at_most", "words": 150}, 0, 150, [120, 150], "words"),
        ({"characters": 100}, 90, 110, [95, 110], "characters"),
    ],
)
def test_rails(target, first, last, landing, unit):
    status, headers, body = get("/lenvm/rails", f"length_target={quote(json.dumps(target))}")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"first": first, "last": last, "landing": landing, "unit": unit}


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(
    ("query", "words"),
    [
        ('length_target={"tokens":0}', "length_target.tokens: .*got 0"),
        ('length_target={"tokns":1}', "length_target.tokns"),
        ("length_target=[[[", r"length_target: .*\[\[\["),
        ("", "length_target: "),
    ],
)
def test_rails_of_nonsense_are_a_400_in_the_words_of_a_request(query, words):
    status, _, body = get("/lenvm/rails", query)
    assert status == 400
    assert re.match(words, json.loads(body)["error"]["message"])
