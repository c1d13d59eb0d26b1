"""How far int8 products are from exact ones on a real model's inputs: results/int8_rounding.json.

    python -m benchmarks.int8_rounding --model M --data DATA        on a CPU, some minutes

M and DATA are those of int8_gate.py. The inputs of every group of layers (q, k and v; o; gate and
up; down) on examples of the evaluation are kept from a pass of the plain model. Each group's int8
product of them, through the kernels that training takes (on a CPU: their definitions), is compared
with the product of the same frozen weights in float64: with no direction multiplied apart, and with
the main ones of training examples' inputs (`kernels/directions.py`). The error is the root of the
mean over tokens of |y - exact|^2 / |exact|^2, so that each token counts alike; a row is its mean
over the model's layers, by the number of directions.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.int8_run import Trial, load, recipe_of
from tunefork.data.example import Encoded
from tunefork.kernels.layout import Storage
from tunefork.model.build import build
from tunefork.model.fused import FusedGroup
from tunefork.model.load import load_model
from tunefork.model.shared_inputs import find_groups
from tunefork.recipe import LoraSection, Method
from tunefork.train.method import calibration_ids

CPU = torch.device("cpu")
STORAGES: dict[Storage, Method] = {"int8": Method.LORA, "nf4": Method.QLORA}
_EXAMPLES = 16


def inputs(model: Any, groups: list[list[str]], ids: Tensor) -> dict[str, Tensor]:
    """(tokens, D) of each group, by its first layer, in a pass over `ids`."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(paths[0]).register_forward_pre_hook(
            lambda _, given, name=paths[0]: found.update({name: given[0].flatten(0, 1)})
        )
        for paths in groups
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def error(group: FusedGroup, x_sd: Tensor, exact_so: Tensor) -> float:
    """Of the group's product."""
    with torch.no_grad():
        y_so = torch.cat(group(x_sd), dim=1).double()
    relative = (y_so - exact_so).norm(dim=1) / exact_so.norm(dim=1)
    return float(relative.square().mean().sqrt())


def measure(storage: Storage, recipe: Any, data: Any) -> list[dict[str, Any]]:
    """One row for each kind of group, and one for all."""
    model = load_model(recipe.model, dtype=torch.bfloat16, device=CPU)
    build(model, STORAGES[storage], LoraSection(), seed=0)
    groups = find_groups(model)
    seen = inputs(model, groups, _ids(data.train))
    asked = inputs(model, groups, _ids(data.eval[:_EXAMPLES]))
    found = defaultdict[str, list[dict[int, float]]](list)
    for paths in groups:
        members = [model.get_submodule(path) for path in paths]
        group = FusedGroup(members, storage, "int8", CPU)
        exact_od = torch.cat([member.materialize() for member in members]).double()
        x_sd = asked[paths[0]]
        exact_so = x_sd.double() @ exact_od.t()
        errors = {0: error(group, x_sd, exact_so)}
        group.is_calibrated = False
        group(seen[paths[0]])
        errors[group.layout.apart] = error(group, x_sd, exact_so)
        for kind in ("+".join(path.rpartition(".")[2] for path in paths), "all"):
            found[kind].append(errors)
    rows = []
    for kind, each in found.items():
        mean = {str(count): sum(of[count] for of in each) / len(each) for count in each[0]}
        rows.append({"case": f"{storage} {kind}", "groups": len(each), "error_by_directions": mean})
        print(rows[-1], flush=True)
    return rows


def _ids(examples: list[Encoded]) -> Tensor:
    ids = calibration_ids(examples)
    assert ids is not None
    return ids


def main() -> None:
    """Measure both storages and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    arguments = argparse.Namespace(
        model=given.model,
        data=given.data,
        max_train_examples=200,
        max_eval_examples=_EXAMPLES,
        batch_size=1,
        steps=1,
        learning_rate=1e-3,
        set=[],
    )
    trial = Trial("lora", "bf16", 0)
    data, _ = load(arguments, trial)
    rows: list[dict[str, Any]] = []
    for storage in STORAGES:
        rows += measure(storage, recipe_of(arguments, trial), data)
    command = "python -m benchmarks.int8_rounding --model SmolLM2-135M-Instruct --data DATA"
    print(results.write("int8_rounding", rows, device="cpu", command=command))


if __name__ == "__main__":
    main()
