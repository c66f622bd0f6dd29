"""The logits processor as vLLM's own loaders see it: construction, validation, names."""

import logging
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import (
    LogitsProcessor,
    _load_logitsprocs_by_fqcns,
    build_logitsprocs,
)

import lenvm_vllm
from lenvm_vllm.api.intake import take_in
from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.v1 import V1Batch
from lenvm_vllm.plugin import PROCESSOR
from lenvm_vllm.text.tokenizer import tokenizer_of
from tests.support.blocked import SECONDS
from tests.support.fakes import EOS, Server, V, config, entering, free, params, replicas_of
from tests.support.tiny import tiny_tokenizer
from tests.support.v1_batch import added, processor_with, suppressed, update
from value_server.contract.checkpoint import tokenizer_fingerprint


def test_the_constructor_connects_to_nothing() -> None:
    """Nor does a batch without targets; a request with one does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        settings = {"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "timeout_s": 0.05}
        served = LenvmLogitsProcessor(config(**settings), torch.device("cpu"), False)
        served.update_state(update(added=[added(0, params())]))
        served.apply(torch.zeros(1, V))
        with pytest.raises(BlockingIOError):
            listener.accept()
        served.update_state(update(added=[added(0, params(9))]))
        assert EOS in suppressed(served, 1)[0]
        listener.settimeout(SECONDS)  # which a thread does
        listener.accept()[0].close()


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ValueError, match="ulr"):
        LenvmLogitsProcessor(config(ulr="http://x"), torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("length", "fields", "message"),
    [
        ({"length_target": 0}, {}, "length_target.tokens: .* got 0"),
        ({"length_target": "many"}, {}, "length_target.tokens: .* got 'many'"),
        ({"length_targets": 9}, {}, "length_targets: unknown field, got 9"),
        ({"length_mode": "tilt"}, {}, "length_target.beta: required by mode 'tilt'"),
        (200, {"max_tokens": 100}, "max_tokens: 100 contradicts length_target"),
        (200, {"min_tokens": 221, "max_tokens": 300}, "min_tokens: 221 tokens before the end"),
        (200, {"ignore_eos": True, "max_tokens": 300}, "ignore_eos: true contradicts"),
        (200, {"max_tokens": 179}, "max_tokens: 179 contradicts .* at least 180"),
        (
            {"length_target": 50, "length_mode": "at_least"},
            {"max_tokens": 49},
            "max_tokens: 49 contradicts .* at least 50",
        ),
        (
            {"length_target": 50, "length_mode": "at_most"},
            {"min_tokens": 50, "max_tokens": 99},
            "min_tokens: 50 .* at most 50",
        ),
        (
            {"length_target": 50, "length_prefix_tokens": 55},
            {},
            "prefix_tokens: 55 must be below the 55 tokens",
        ),
        (
            {"length_target": 50, "length_prefix_tokens": 20},
            {"max_tokens": 24},
            "max_tokens: 24 .* at least 25",
        ),
        ({"length_target": 9, "lenvm_sampling": ["x"]}, {}, "lenvm_sampling: unknown field"),
    ],
)
def test_requests_that_are_refused(length: Any, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LenvmLogitsProcessor.validate_params(params(length, **fields))


@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (None, {}),
        ({"other": "x"}, {"ignore_eos": True}),
        (200, {"max_tokens": 220}),
        (200, {"max_tokens": None}),
        (free(200), {"max_tokens": 16}),
        ({"length_target": 50, "length_prefix_tokens": 20}, {"max_tokens": 25}),
        ({"length_mode": "tilt", "length_beta": -3}, {}),
    ],
)
def test_requests_that_are_taken(length: Any, fields: Any) -> None:
    LenvmLogitsProcessor.validate_params(params(length, **fields))


def test_one_name_for_both_model_runners() -> None:
    """What the loader of this one makes; that of the other stands in test_v2."""
    served = config()
    served.scheduler_config = SimpleNamespace(max_num_seqs=4)
    made = build_logitsprocs(served, torch.device("cpu"), False, False, (PROCESSOR,))
    (ours,) = (p for p in made.non_argmax_invariant if isinstance(p, LenvmLogitsProcessor))
    assert isinstance(ours.batch, V1Batch)


def test_vllm_finds_the_processor_by_its_full_name() -> None:
    assert _load_logitsprocs_by_fqcns([PROCESSOR]) == [lenvm_vllm.LenvmLogitsProcessor]
    assert issubclass(LenvmLogitsProcessor, LogitsProcessor)
    assert not processor_with(Server()).is_argmax_invariant()
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        lenvm_vllm.Other  # noqa: B018


@pytest.mark.parametrize("target", [9, {"length_mode": "tilt", "length_beta": 1.0}])
def test_no_guidance_of_drafts(target: Any) -> None:
    for drafts in (None, object()):
        made = config()
        made.speculative_config = drafts
        wishes = [params(), params(target)]
        for wanted in wishes if drafts is None else wishes[:1]:
            take_in(made, entering(wanted))
        refused = entering(params(target))
        if drafts is not None:
            with pytest.raises(ValueError, match=r"length_target: .* speculative decoding"):
                take_in(made, refused)


def test_no_guidance_where_ranks_sample_rows_of_their_own(log: list[logging.LogRecord]) -> None:
    """vLLM falls back to all ranks sampling all rows where a model cannot do it, and the plugin is
    not told: ranks that each ask for values would sample different tokens."""
    made = config()
    made.parallel_config.enable_batch_sharded_sampling = True
    take_in(made, entering(params()))
    with pytest.raises(ValueError, match=r"length_target: .* batch-sharded sampling"):
        take_in(made, entering(params(9)))
    # Of a front end that does not ask.
    rows = EngineRows(made, replicas_of(Server()))
    assert rows.open(params(9), [7], []) is None
    assert "batch-sharded" in log[-1].getMessage()


def test_the_fingerprint_is_that_of_the_served_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    served = SimpleNamespace(
        model=str(tmp_path),
        tokenizer=str(tmp_path),
        tokenizer_mode="hf",
        tokenizer_revision=None,
        trust_remote_code=False,
        runner_type="generate",
        skip_tokenizer_init=False,
    )
    vllm_config = SimpleNamespace(model_config=served)
    fingerprint = tokenizer_fingerprint(tokenizer_of(vllm_config))
    assert fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    served.skip_tokenizer_init = True
    assert tokenizer_of(vllm_config) is None
