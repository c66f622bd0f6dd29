"""k of all tokens, which lookahead clients fetch once.

Legend: V tokens, r rank.
"""

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from value_server.contract.checkpoint import LOOKAHEAD_FILE, CheckpointError
from value_server.model.lookahead import Lookahead
from value_server.model.value_model import ValueModel

log = logging.getLogger(__name__)

CHUNK = 4096  # tokens at a time: all of a large vocabulary would take gigabytes


@torch.inference_mode()
def lookahead_keys(model: ValueModel, lookahead: Lookahead) -> NDArray[np.float16]:
    """(V, r) k of the input embeddings; 0, so that z is b alone, where an embedding gives no
    number of float16. Raises CheckpointError where none does.
    """
    embeddings = model.backbone.get_input_embeddings().weight
    chunks = [lookahead.keys(chunk).half().cpu() for chunk in embeddings.split(CHUNK)]
    keys: NDArray[np.float16] = torch.cat(chunks).numpy()
    broken = ~np.isfinite(keys).all(-1)
    if broken.all():
        raise CheckpointError(f"{LOOKAHEAD_FILE}: no key is a finite number of float16")
    if broken.any():
        log.warning("lookahead: %d of %d tokens have no key", broken.sum(), len(keys))
        keys[broken] = 0
    return keys
