"""The usual ways to score candidates behind a prefix, in plain transformers with sdpa.

reforward   the whole text again for each candidate (one candidate measured, times K, where not
            all texts are asked for)
copy        one copy of the prefix's keys and values per candidate, one token behind each
tree        the candidates as one row behind the prefix, under a mask; cache cropped after it
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.systems.timing import best_ms
from value_server.model.value_model import ValueModel

MOST_BYTES = 6 << 30  # keys and values that a baseline may hold, else it is left out


class Baselines:
    """On a plain model. All sessions have the same length: no padding."""

    def __init__(self, model: ValueModel, sessions: int, prefix: int, candidates: int) -> None:
        self.model, self.sessions, self.candidates = model, sessions, candidates
        self.device = next(model.parameters()).device
        vocabulary = model.config.vocab_size
        self.prompt = torch.randint(vocabulary, (sessions, prefix), device=self.device)
        self.ids = torch.arange(1000, 1000 + candidates, device=self.device)

    def times(self, repeats: int, all_texts: bool, bytes_per_token: int) -> dict[str, float | None]:
        """In ms by way, None for one that is left out: too large, or of no use beside the others.

        all_texts: whether `reforward` computes them all, and not one in place of them.
        bytes_per_token: of keys and values.
        """
        times: dict[str, float | None] = {"reforward": None, "copy": None, "tree": None}
        if all_texts:
            times["reforward"] = best_ms(lambda: self.reforward(self.candidates), 1)
        elif self.sessions == 1:
            times["reforward"] = self.candidates * best_ms(lambda: self.reforward(1), 1)
        held = self.prompt.numel() * bytes_per_token
        if held <= MOST_BYTES:
            cache = self.prefix_cache()
            times["tree"] = best_ms(lambda: self.tree(cache), repeats)
            if held * self.candidates <= MOST_BYTES:
                times["copy"] = best_ms(lambda: self.copy(cache), repeats)
        return times

    def reforward(self, rows: int) -> None:
        """`rows` texts, one at a time."""
        text = torch.cat([self.prompt[:1], self.ids[:1, None]], dim=1)
        for _ in range(rows):
            self.model(text)

    def prefix_cache(self) -> DynamicCache:
        """Random keys and values: what they are does not change the time."""
        config = self.model.config
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (self.sessions, heads, self.prompt.shape[1], size)
        dtype = next(self.model.backbone.parameters()).dtype
        cache = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            keys, values = torch.randn(2, *shape, device=self.device).to(dtype)
            cache.update(keys, values, index)
        return cache

    def copy(self, cache: DynamicCache) -> Tensor:
        copies = DynamicCache(config=self.model.config)
        for index, layer in enumerate(cache.layers):
            copies.update(layer.keys, layer.values, index)
        copies.batch_repeat_interleave(self.candidates)
        ids = self.ids.repeat(self.sessions)[:, None]  # (B * K, 1)
        output = self.model.backbone(ids, past_key_values=copies, use_cache=True)
        z: Tensor = self.model.head(output.last_hidden_state)
        return z

    def tree(self, cache: DynamicCache) -> Tensor:
        length, count = self.prompt.shape[1], self.candidates
        mask = torch.ones(count, length + count, dtype=torch.bool, device=self.device)
        mask[:, length:] = torch.eye(count, dtype=torch.bool, device=self.device)
        output = self.model.backbone(
            self.ids.repeat(self.sessions, 1),
            position_ids=torch.full((self.sessions, count), length, device=self.device),
            attention_mask=mask[None, None].expand(self.sessions, 1, -1, -1),
            past_key_values=cache,
            use_cache=True,
        )
        z: Tensor = self.model.head(output.last_hidden_state)
        cache.crop(length)
        return z
