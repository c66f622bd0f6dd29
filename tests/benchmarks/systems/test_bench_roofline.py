"""The sums agree with the models that they are of."""

import pytest
import torch

from benchmarks.systems.device import SHAPES
from benchmarks.systems.roofline import CARDS, SERVED, measured


@pytest.mark.parametrize("name", ["135M", "0.5B", "1.5B"])
def test_weights_are_those_of_the_linear_layers(name: str) -> None:
    config_of, model_of, options = SHAPES[name]
    with torch.device("meta"):
        model = model_of(config_of(**options))
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert measured(name).weights == sum(m.weight.numel() for m in linears)


def test_a_step_reads_its_weights_or_multiplies_by_them() -> None:
    card, served = CARDS[0], SERVED[0]
    assert served.weights == pytest.approx(7.07e9, rel=0.01)  # 7.6 with the input embeddings
    assert served.token_bytes == 57344
    alone = served.step_ms(card, 1, 0)
    assert alone == pytest.approx(1000 * 2 * served.weights / card.bytes_per_s)
    many = served.step_ms(card, 4096, 0)
    assert many == pytest.approx(1000 * 2 * served.weights * 4096 / card.flops_per_s)
