"""Copies to and from the device of the logits."""

import pytest
import torch

from lenvm_vllm.steering.candidates import Cut, Writes, cut_candidates
from lenvm_vllm.steering.devices import Fetched, uploaded

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_what_is_uploaded_comes_back(name: str) -> None:
    parts = torch.arange(6).reshape(2, 3), torch.randn(4, 1, dtype=torch.float64), torch.arange(0)
    there = uploaded(torch.device(name), *parts)
    assert all(x.device.type == name for x in there)
    for part, own in zip(parts, there, strict=True):
        assert torch.equal(Fetched(own).here(), part)


@on_gpu
def test_a_step_on_a_gpu_waits_for_its_candidates_alone() -> None:
    logits = torch.randn(3, 1000)
    cuts = [Cut(0.8, 20, 0.9, 0.0, [1, 2])] * 3
    writes = Writes(torch.tensor([0, 0, 2]), torch.tensor([5, 6, 7]), torch.ones(3).double())
    there = logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = cut_candidates(there, cuts, 20)
        writes.apply_inplace(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = cut_candidates(logits, cuts, 20)
    writes.apply_inplace(logits)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.log_q, wanted.log_q, rtol=0, atol=1e-5)
    assert torch.equal(there.cpu(), logits)
