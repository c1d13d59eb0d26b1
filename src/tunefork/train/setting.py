"""What a checkpoint belongs to, and what its bits may depend on.

The setting is what the steps follow from: recipe, seed and data. Going on with another would mix
two runs, so a checkpoint of another setting is passed over. The environment is where the same
steps may round otherwise: other versions, another device, another number of threads (sums are cut
up among them). Going on there is allowed and said.
"""

import hashlib
import platform
from collections.abc import Sequence

import torch

from tunefork.data.example import Encoded
from tunefork.installed import version
from tunefork.model.device import describe
from tunefork.recipe import Method, Recipe
from tunefork.train.checkpoint import Value

_CHANGES_NO_STEP = {
    "learning_rate",  # of this run, recorded apart
    "seed",
    "log_every_s",
    "checkpoint_every_s",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "checkpoints_when_done",
    "preemption_file",
    "validate_every_steps",  # which examples are held back is in the data's digest
    "validation_share",
    "keep",
    "gradient_release",
    "rehearse",
    "on_out_of_memory",
    "on_loss_spike",
    "trackers",
}
_PACKAGES = ("torch", "transformers", "bitsandbytes")


def setting(
    recipe: Recipe,
    method: Method,
    examples: Sequence[Encoded],
    *,
    base_sha256: str,
    learning_rate: float,
    seed: int,
    num_steps: int,
) -> dict[str, Value]:
    """Of one run; values are as JSON holds them."""
    section = "full" if method is Method.FULL else "lora"
    fields = recipe.model_dump(mode="json")
    found: dict[str, Value] = {
        "method": str(method),
        "learning_rate": learning_rate,
        "seed": seed,
        "num_steps": num_steps,
        "base_sha256": base_sha256,
        "data_sha256": _digest(examples),
    }
    for name in ("model", section, "train"):
        for key, value in fields[name].items():
            if key not in _CHANGES_NO_STEP:
                is_plain = value is None or isinstance(value, str | int | float)
                found[f"{name}.{key}"] = value if is_plain else str(value)
    return found


def environment(device: torch.device) -> dict[str, Value]:
    """Versions, the device's name, and the number of CPU threads."""
    described = describe(device)
    found: dict[str, Value] = {"python": platform.python_version()}
    found |= {name: version(name) for name in _PACKAGES}
    return found | {"device": described["name"], "threads": described["threads"]}


def _digest(examples: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.tobytes())
        digest.update(example.supervised.tobytes())
    return digest.hexdigest()
