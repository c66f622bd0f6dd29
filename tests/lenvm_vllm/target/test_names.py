"""Names and places that were meant for the field; a 400 of the middleware tells them."""

import re
import time
from typing import Any

import pytest

from lenvm_vllm.api.fields import FIELDS
from lenvm_vllm.target.misplaced import HINT, looks_like_target, misplaced

NEAR = [
    *("length_target", "lengthTarget", "LengthTarget", "length-target", "LENGTH_TARGET"),
    *("target_length", "targetLength", "lenght_target", "length_targets", "target_tokens"),
]
FAR = ["length_penalty", "max_length", "min_length", "target_language", "target", "max_tokens"]


@pytest.mark.parametrize("name", NEAR)
def test_near(name: str) -> None:
    assert looks_like_target(name)
    assert HINT.search(f'{{"{name}" : 1}}'.encode())


@pytest.mark.parametrize("name", [*FAR, *sorted(FIELDS)])
def test_far(name: str) -> None:
    assert not looks_like_target(name)


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        ({"extra_body": {"length_target": 8}}, [("extra_body.length_target", 8)]),
        ({"extra_body": {"targetLength": 8, "x": 1}}, [("extra_body.targetLength", 8)]),
        (
            {"extra_body": {"vllm_xargs": {"length_target": 8}}},
            [("extra_body.vllm_xargs.length_target", 8)],
        ),
        ({"sampling_params": {"length_target": 8}}, [("sampling_params.length_target", 8)]),
        ({"optional_params": {"length_target": 8}}, [("optional_params.length_target", 8)]),
        ({"modelKwargs": {"length_target": 8}}, [("modelKwargs.length_target", 8)]),
        ({"providerOptions": {"length_target": 8}}, [("providerOptions.length_target", 8)]),
        ({"chat_template_kwargs": {"length_target": 8}}, []),  # a variable of the template
        ({"vllm_xargs": {"length_target": 8}}, []),  # there it may stand
        ({"metadata": {"length_target": "8"}}, []),  # a client's own notes
        ({"response_format": {"schema": {"target_length": {}}}}, []),
        ({"extra_body": None, "options": 7, "parameters": [{"length_target": 8}]}, []),
    ],
)
def test_wrappers(request_: dict[str, Any], found: list[Any]) -> None:
    assert list(misplaced(request_, own="vllm_xargs")) == found


def test_a_body_is_searched_in_little_time() -> None:
    for hard in (b'"' + b"len" * 500_000, b'"len' * 400_000, b'"' + b" " * 2_000_000):
        started = time.thread_time()
        assert HINT.search(hard) is None
        assert time.thread_time() - started < 2
    assert re.search(HINT, b'{"prompt": "a", "length_target": 5}')
    started = time.thread_time()
    assert not looks_like_target("lengthtarget" * 100_000)
    assert time.thread_time() - started < 2
