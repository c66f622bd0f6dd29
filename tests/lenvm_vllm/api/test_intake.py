"""Requests on their way into vLLM's engine: its own input processor, then its own sampler.

Legend: V vocabulary. Token 0 is the end; token x is worth x more tokens.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.sample.logits_processor import BatchUpdate, build_logitsprocs
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from lenvm_vllm.api.intake import take_in
from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.host import served
from lenvm_vllm.host.sampling import KEY
from lenvm_vllm.plugin import BARE, PROCESSOR, register
from lenvm_vllm.target.request import HAS_CALLS
from lenvm_vllm.values.client import TimedOut
from tests.support.fakes import EOS, Server, V, config, entering, free, params, replicas_of
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_llm import tiny_llm

OWN = {
    "top_k": 7, "top_p": 0.9, "min_p": 0.01,
    "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2,
}  # fmt: skip


def taken(wanted: SamplingParams, prompt: Any = (7, 8), **facts: Any) -> SamplingParams:
    """What the engine gets of it."""
    served = config(**facts)
    request = entering(wanted.clone(), prompt)
    take_in(served, request)
    return request.sampling_params


# ---- the door itself


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[InputProcessor]]:
    """Of two models in one process; the second has the shorter context."""
    register()
    model = str(tiny_llm(tmp_path_factory.mktemp("model")))
    made = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(served, "config", None)  # and back, behind these tests
        for longest, names in ((512, [BARE]), (64, [BARE]), (64, None)):
            args = EngineArgs(model=model, logits_processors=names, max_model_len=longest)
            made.append(InputProcessor(args.create_engine_config()))
        yield made


def enter(door: InputProcessor, wanted: SamplingParams, prompt: int = 10) -> SamplingParams:
    text = {"type": "token", "prompt_token_ids": [5] * prompt}
    entered = door.process_inputs("one", text, wanted, supported_tasks=("generate",))
    assert entered.sampling_params is not None
    return entered.sampling_params


def test_a_request_is_changed_for_the_engine_only(doors: list[InputProcessor]) -> None:
    wanted = params(80, stop=["x"], max_tokens=None, **OWN)
    entered = enter(doors[0], wanted)
    assert entered.extra_args[KEY] == [7, 0.9, 0.01, 1.3, 0.4, -0.2]
    neutral = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    assert neutral.items() <= {name: getattr(entered, name) for name in OWN}.items()
    assert (entered.frequency_penalty, entered.presence_penalty) == (0, 0)
    assert (entered.max_tokens, entered.min_tokens) == (502, 71)
    assert {name: getattr(wanted, name) for name in OWN} == OWN
    assert (wanted.extra_args, wanted.min_tokens) == ({"length_target": 80}, 0)
    assert enter(doors[0], wanted) == entered


def test_each_model_of_a_process_has_its_own_limits(doors: list[InputProcessor]) -> None:
    assert served.config.model_config.max_model_len == 64  # of the last one
    enter(doors[0], params(80, max_tokens=None))
    with pytest.raises(ValueError, match="needs at least 72 tokens; a prompt of 10 leaves 54"):
        enter(doors[1], params(80, max_tokens=None))
    with pytest.raises(ValueError, match="needs at least 45 tokens; a prompt of 40 leaves 24"):
        enter(doors[1], params(50, max_tokens=None), prompt=40)


@pytest.mark.parametrize("prefix", [3, 2**31 - 1])
def test_no_more_of_a_prompt_counts_than_there_is(prefix: int) -> None:
    """The engine's step ended where they and the tokens so far were more than 2^31 - 1."""
    rest = {"length_target": 9, "length_mode": "at_least"}
    assert taken(params(rest | {"length_prefix_tokens": 2})).min_tokens == 0
    with pytest.raises(ValueError, match=rf"prefix_tokens: {prefix}, .* has 2 tokens"):
        taken(params(rest | {"length_prefix_tokens": prefix}))


def test_a_prefix_has_no_more_than_the_whole_may_have(doors: list[InputProcessor]) -> None:
    """Nothing could be written behind it that would meet the limit."""
    prefix = {"length_mode": "at_most", "length_prefix_tokens": 8}
    for limit, amount in (({"length_words": 2}, 4), ({"length_characters": 7}, 8)):
        (most,) = limit.values()
        text = {"type": "token", "prompt_token_ids": tiny_tokenizer()("so: a b c d ")["input_ids"]}
        at_most = params(prefix | limit, max_tokens=None)
        message = rf"prefix_tokens: 8, whose text has {amount} \w+, of .* at most {most}$"
        with pytest.raises(ValueError, match=message):
            doors[0].process_inputs("one", text, at_most, supported_tasks=("generate",))
        for more in ({"length_tolerance": "off"}, dict.fromkeys(limit, amount)):
            wanted = params(prefix | limit | more, max_tokens=None)
            doors[0].process_inputs("one", text, wanted, supported_tasks=("generate",))


def test_others_pass_as_they_are(doors: list[InputProcessor]) -> None:
    wanted = params(stop=["x"], **OWN)
    assert {name: getattr(enter(doors[0], wanted), name) for name in OWN} == OWN
    # A model without the plugin: the field is nobody's.
    unguided = enter(doors[2], params(80, max_tokens=None, **OWN))
    assert {name: getattr(unguided, name) for name in OWN} == OWN


def test_the_prefill_of_a_pair_is_let_through() -> None:
    """Its one token is not read by anybody."""
    pair = {"length_target": 80, "kv_transfer_params": {"do_remote_decode": True}}
    assert taken(params(pair, max_tokens=1)).max_tokens == 1
    other = {"length_target": 80, "kv_transfer_params": {"do_remote_prefill": True}}
    with pytest.raises(ValueError, match="max_tokens: 1 "):
        taken(params(other, max_tokens=1))


# ---- stop strings


@pytest.mark.parametrize(
    ("target", "held"),
    [
        ({"length_target": 80}, 71),
        ({"length_target": 80, "length_mode": "at_least"}, 79),
        ({"length_mode": "range", "length_min_tokens": 30, "length_max_tokens": 40}, 29),
        ({"length_target": 80, "length_prefix_tokens": 50}, 21),
        ({"length_target": 80, "length_mode": "at_most"}, 0),
        ({"length_target": 80, "length_tolerance": "off"}, 0),
        ({"length_mode": "tilt", "length_beta": 1.0}, 0),
    ],
)
def test_a_stop_string_is_held_back_to_the_lower_rail(target: Any, held: int) -> None:
    prompt, stop = [7] * 50, ["\n\n"]
    assert taken(params(target, stop=stop), prompt).min_tokens == held
    assert taken(params(target), prompt).min_tokens == 0
    assert taken(params(target, stop=stop, min_tokens=25), prompt).min_tokens == max(held, 25)


def test_a_stop_string_does_not_hold_a_tool_call_open() -> None:
    """vLLM keeps the end away, too, before so many tokens."""
    assert taken(params({"length_target": 80, HAS_CALLS: 1}, stop=["x"])).min_tokens == 0


# ---- what vLLM samples from


def final(
    wanted: SamplingParams, logits: Tensor, down: bool = False, output: Any = (), prompt: Any = (7,)
) -> list[float]:
    """The probabilities from which vLLM's own sampler draws, behind all that it does."""
    served = config()
    served.scheduler_config = SimpleNamespace(max_num_seqs=1)
    processors = build_logitsprocs(served, torch.device("cpu"), False, False, (PROCESSOR,))
    ours = next(p for p in processors.non_argmax_invariant if isinstance(p, LenvmLogitsProcessor))
    ours.batch.rows = EngineRows(
        served, replicas_of(Server(TimedOut("slow")) if down else Server())
    )
    for one in processors.all:
        one.update_state(BatchUpdate(1, [], [(0, wanted, list(prompt), list(output))], []))

    def column(name: str) -> Tensor:
        return torch.tensor([float(getattr(wanted, name))])

    metadata = SamplingMetadata(
        temperature=column("temperature"),
        all_greedy=False,
        all_random=True,
        top_p=column("top_p") if wanted.top_p < 1 else None,
        top_k=column("top_k").int() if wanted.top_k > 0 else None,
        generators={},
        max_num_logprobs=None,
        no_penalties=False,
        prompt_token_ids=torch.tensor([prompt]),
        frequency_penalties=column("frequency_penalty"),
        presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"),
        output_token_ids=[list(output)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=processors,
    )
    sampler = Sampler("processed_logits")
    penalised = sampler.apply_logits_processors(logits[None].clone(), metadata, False)
    processed = sampler.sample(penalised, metadata)[1]
    assert processed is not None
    return torch.softmax(processed[0].double(), dim=-1).tolist()


def logits_of(p: dict[int, float]) -> Tensor:
    logits = torch.full((V,), -torch.inf)
    logits[list(p)] = torch.tensor(list(p.values())).log()
    return logits


def test_top_p_is_applied_once() -> None:
    """0.85 and five times 0.03 at 0.9: three tokens stay, steered or not."""
    logits = logits_of({5: 0.85} | dict.fromkeys((10, 11, 12, 13, 14), 0.03))
    for down in (False, True):
        p = final(taken(params(free(500) | {"length_max_kl": 0.0}, top_p=0.9)), logits, down)
        assert [x for x in p if x] == pytest.approx([0.85 / 0.91, 0.03 / 0.91, 0.03 / 0.91])


def test_a_raised_end_outlives_the_cut() -> None:
    """In the landing, with odds of an end below 1 - top_p, by itself and when it is raised."""
    logits = logits_of({EOS: 0.004, 20: 0.936, 21: 0.06})
    for fields in ({"top_p": 0.9}, {"top_k": 1}, {"min_p": 0.3}):
        wanted = taken(params(10, **fields))
        before, landing = (final(wanted, logits, output=[9] * n) for n in (3, 9))
        assert before[EOS] == 0
        assert 0.004 < landing[EOS] < 0.5, fields


@pytest.mark.parametrize("fields", [{}, OWN, {"temperature": 0.5, "top_p": 0.5}])
@pytest.mark.parametrize("down", [False, True])
def test_an_unsteered_text_is_what_it_would_be_without_a_target(fields: Any, down: bool) -> None:
    """Penalties, cut and temperature of vLLM and of the plugin agree; so do they in a step of
    which no values are known. The policy moves nothing, and the length is where it should be."""
    torch.manual_seed(0)
    output, prompt = [3, 4, 4, EOS, 9], [4, 5, EOS]
    for _ in range(5):
        logits = 2 * torch.randn(V)
        logits[EOS] = 1.0
        unguided = final(params(**fields), logits, output=output, prompt=prompt)
        target = free(1) | {"length_mode": "at_least", "length_max_kl": 0.0}
        # The settings cut where the request does not.
        wide = fields or {"top_k": V, "top_p": 0.999999}
        guided = final(taken(params(target, **wide)), logits, down, output, prompt)
        assert guided == pytest.approx(unguided, abs=1e-5)


def test_an_end_is_decided_behind_its_penalty() -> None:
    """The end stands in every prompt of a chat. Steered to a probability, it has that one."""
    logits = logits_of({EOS: 0.2, 20: 0.4, 21: 0.4})
    tokens = free(10) | {"length_policy": "project"}
    plain, penalised = (
        final(taken(params(tokens, repetition_penalty=penalty)), logits, False, [9] * 10, [EOS, 7])
        for penalty in (1.0, 1.5)
    )
    assert plain[EOS] == penalised[EOS] == 1  # past the target an end of 0.05 is taken
    # In V2 vLLM penalises first, so its penalties are left with vLLM.
    v2 = taken(params(tokens, repetition_penalty=1.5), v2=True)
    assert v2.repetition_penalty == 1.5
    assert v2.extra_args[KEY][3:] == [1.0, 0.0, 0.0]
