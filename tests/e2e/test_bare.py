"""A real vLLM and a real value server on a machine without compilers: no request of ours ends it.

`pytest --without-compiler tests/e2e/test_steering.py` asks the same of all that steers.
"""

from typing import Any

import pytest

from tests.e2e.pairs import Pair

pytestmark = [pytest.mark.e2e, pytest.mark.pair("doors")]


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "tiny", "messages": messages, "seed": 1, **fields}


@pytest.mark.parametrize(
    "target",
    [
        40,
        {"tokens": 40, "tolerance": 0.0},
        {"tokens": 40, "endings": 8},
        {"tokens": 40, "best_of": 4},
        {"mode": "at_most", "tokens": 40},
        {"mode": "at_least", "tokens": 40},
        {"mode": "range", "min_tokens": 30, "max_tokens": 40},
        {"mode": "tilt", "beta": -1.0},
    ],
)
def test_every_target_is_answered(pair: Pair, target: Any) -> None:
    one = isinstance(target, dict) and {"endings", "best_of"} & target.keys()
    others = [{"n": 2}, {"stream": True}, {"temperature": 0.0}]
    for more in ({}, {"top_k": 15, "top_p": 0.9, "temperature": 0.7}, *([] if one else others)):
        fields = body(length_target=target, max_tokens=60, **more)
        reply = pair.client.post("/v1/chat/completions", json=fields)
        assert reply.status_code == 200, reply.text
        assert pair.client.get("/health").status_code == 200


def test_what_would_end_it_was_said_at_the_start(pair: Pair) -> None:
    assert pair.log.read_text().count("no C++ compiler here: a request with logprobs") == 1
