"""An adapter's low-rank matrices by themselves, to be put beside others over one base.

Everything that `peft_format.load_adapter` checks is checked here, against the base's shapes alone:
keys that are missing or left over, shapes, values that are not finite, a dead adapter.
"""

from math import inf
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from tunefork.errors import AdapterError
from tunefork.registry import peft_targets
from tunefork.registry.peft_config import WEIGHTS, read_config
from tunefork.registry.peft_format import check_header, expected_shapes
from tunefork.registry.peft_save import PREFIX
from tunefork.registry.safe_read import read_header
from tunefork.registry.safe_tensors import read_tensors


class Delta(NamedTuple):
    """`scale * B A` of one layer."""

    lora_a: Tensor
    """(R, D)"""
    lora_b: Tensor
    """(O, R)"""
    scale: float


Deltas = dict[str, Delta]
"""By the layer's path."""


def read_deltas(skeleton: PreTrainedModel, folder: Path, *, most: float = inf) -> Deltas:
    """The matrices of the adapter in `folder`; `skeleton` is its base, on the meta device or not.

    Raises AdapterError, naming file and key, also for what is no plain LoRA on linear layers, and
    for values that, times the scale, are above `most`.
    """
    config = read_config(folder)
    file = folder / WEIGHTS
    targets = peft_targets.find(skeleton, config, folder)
    beyond = {
        "DoRA": config.use_dora,
        "modules_to_save": bool(targets.whole),
        "trainable_token_indices": bool(targets.rows),
    }
    if named := [what for what, is_there in beyond.items() if is_there]:
        raise AdapterError(
            f"{folder}: has {' and '.join(named)}, which cannot share a batch with other adapters; "
            "serve it merged (tunefork serve --merge), or export it with tunefork merge"
        )
    header = read_header(file)
    check_header(header, expected_shapes(skeleton, config, targets), file)
    scale = max((abs(delta.scale) for delta in targets.deltas.values()), default=1.0)
    found = read_tensors(file, header, most=most / max(1.0, scale))
    tensors = {key.removeprefix(PREFIX): value for key, value in found.items()}
    if not any(bool(value.any()) for key, value in tensors.items() if ".lora_B." in key):
        raise AdapterError(f"{file}: every lora_B is zero: the adapter would change nothing")
    return {
        path: Delta(tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"], delta.scale)
        for path, delta in targets.deltas.items()
    }
