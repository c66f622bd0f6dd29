"""A policy learns a task and to be brief: policy gradient with a length value model as baseline.

    python -m trainer.examples.length_rl

Everything is tiny and random, and learns in seconds on one core. The task is to write token 3
somewhere; what follows it is of no use. The last line is one JSON object.
"""

import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from trainer.rl import (
    combine,
    completion_logits,
    gae,
    length_rewards,
    length_values,
    linear_schedule,
)
from value_server.contract.checkpoint import LenvmConfig
from value_server.model.value_model import ValueHead, ValueModel

GAMMA = 0.95
END, WANTED, VOCABULARY = 0, 3, 12
PROMPT, COMPLETIONS, MAX_TOKENS = 2, 64, 32
SHAPE = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=END,
    pad_token_id=END,
)


def sample(policy: LlamaForCausalLM) -> tuple[Tensor, Tensor, Tensor]:
    """(texts (B, P + R), completion mask (B, R), whether each ended (B,))."""
    prompts = torch.ones(COMPLETIONS, PROMPT, dtype=torch.long)
    texts = policy.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_TOKENS,
    )
    ends = texts[:, PROMPT:] == END
    mask = ends.cumsum(dim=1) - ends.long() == 0
    return texts, mask, ends.any(dim=1)


def log_probabilities(policy: LlamaForCausalLM, texts: Tensor, attention: Tensor) -> Tensor:
    """(B, R) of the completion tokens."""
    logits = policy(texts, attention_mask=attention).logits[:, PROMPT - 1 : -1]
    chosen = texts[:, PROMPT:, None]
    return F.log_softmax(logits.float(), dim=-1).gather(2, chosen).squeeze(2)


def main(steps: int = 120, scale: float = 0.5, seed: int = 0) -> dict[str, Any]:
    """Train for `steps`; `scale` of the length advantages is reached half-way.

    Returns share of completions with the wanted token and mean length, before and after.
    """
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(SHAPE)
    facts = LenvmConfig(
        gamma=GAMMA, base_model="tiny", weights="full", num_layers=1, tokenizer_fingerprint=""
    )
    critic = ValueModel(LlamaModel(SHAPE), ValueHead(SHAPE.hidden_size), facts)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=3e-3)
    scale_at = linear_schedule(0.0, scale, max(steps // 2, 1))
    history: list[tuple[float, float]] = []
    for step in range(steps):
        texts, mask, ended = sample(policy)
        attention = torch.cat([torch.ones_like(texts[:, :PROMPT]), mask.long()], dim=1)
        z = completion_logits(critic, texts, attention, mask.shape[1])
        values = length_values(z, mask, ended)
        rewards = length_rewards(mask, GAMMA)
        length, returns = gae(rewards, values.detach(), mask, GAMMA, lam=0.95)
        done = ((texts[:, PROMPT:] == WANTED) & mask).any(dim=1).float()
        advantages = combine(done - done.mean(), length, mask, scale_at(step))
        policy_loss = -(log_probabilities(policy, texts, attention) * advantages)[mask].mean()
        value_loss = (values[:, :-1] - returns)[mask].square().mean()
        optimizer.zero_grad()
        (policy_loss + value_loss).backward()
        optimizer.step()
        history.append((float(done.mean()), float(mask.sum(dim=1).float().mean())))
    first, last = (torch.tensor(part).mean(dim=0).tolist() for part in (history[:5], history[-5:]))
    return {"scale": scale, "done": [first[0], last[0]], "tokens": [first[1], last[1]]}


if __name__ == "__main__":
    for scale in (0.0, 0.5):
        result = main(scale=scale)
        print(json.dumps(result))
