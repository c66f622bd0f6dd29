"""k of all tokens, which lookahead clients fetch once.

Legend: V tokens, r rank.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from value_server.contract.checkpoint import LOOKAHEAD_FILE, CheckpointError
from value_server.model.lookahead import Lookahead
from value_server.model.value_model import ValueModel

CHUNK = 4096  # tokens at a time: all of a large vocabulary would take gigabytes


@torch.inference_mode()
def lookahead_keys(model: ValueModel, lookahead: Lookahead) -> NDArray[np.float16]:
    """(V, r) k of the input embeddings. Raises CheckpointError if one is no float16 number."""
    embeddings = model.backbone.get_input_embeddings().weight
    chunks = [lookahead.keys(chunk).half().cpu() for chunk in embeddings.split(CHUNK)]
    keys: NDArray[np.float16] = torch.cat(chunks).numpy()
    if not np.isfinite(keys).all():
        raise CheckpointError(f"{LOOKAHEAD_FILE}: a key is not a finite number of float16")
    return keys
