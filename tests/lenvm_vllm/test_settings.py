"""The settings of the plugin."""

from typing import Any

import pytest

from lenvm_vllm.settings import load_settings


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("http://a:1", ("http://a:1",)),
        ("http://a:1, https://b:2 ,unix:/run/s", ("http://a:1", "https://b:2", "unix:/run/s")),
        ('["http://a:1", "http://b:2"]', ("http://a:1", "http://b:2")),
        (["http://a:1", "http://b:2"], ("http://a:1", "http://b:2")),
    ],
)
def test_urls(given: Any, urls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({"lenvm": {"url": given}}).url == urls
    if isinstance(given, str):
        monkeypatch.setenv("LENVM_URL", given)
        assert load_settings().url == urls


@pytest.mark.parametrize(
    "given",
    [
        *("", "a:1", "http://a:1,", "http://a,http://a", [], "[3]", "[", 3),
        *("http://host:port", "http://", "http://:8100", "http://a:81000"),
        *("unix:", "unix::/models/a"),
    ],
)
def test_wrong_urls_are_named(given: Any) -> None:
    with pytest.raises(ValueError, match="url"):
        load_settings({"lenvm": {"url": given}})


def test_servers_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_ADAPTERS", '{"sql": "http://b:1/models/sql", "law": ["http://a:1"]}')
    found = load_settings({"lenvm": {"url": "http://a:1,unix:/run/s:/models/base"}})
    assert found.adapters == {"sql": ("http://b:1/models/sql",), "law": ("http://a:1",)}
    assert found.servers == ["http://a:1", "unix:/run/s:/models/base", "http://b:1/models/sql"]
    for wrong in ({"sql": "b:1"}, {"sql": []}, "http://b:1", {"": "http://b:1"}):
        with pytest.raises(ValueError, match="adapters"):
            load_settings({"lenvm": {"adapters": wrong}})


@pytest.mark.parametrize("wrong", [None, [], "http://a:1"])
def test_a_block_without_keys_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"additional_config\.lenvm: .*, must be an object"):
        load_settings({"lenvm": wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        *({"wait_share": -0.1}, {"wait_floor_s": -1}, {"timeout_s": 0}, {"wait": 1}),
        *({"timeout_s": "inf"}, {"aging": "inf"}),  # no socket, and no priority, takes them
    ],
)
def test_wrong_waits_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        load_settings({"lenvm": wrong})
