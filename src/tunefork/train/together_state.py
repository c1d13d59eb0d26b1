"""One slot of a group as the state of a run alone, and back.

The names are those that `state.capture` gives the same adapter built by `model.build`: its deltas
in module order, A before B, their moments numbered so. Whatever reads a single run's checkpoint
reads this, and goes on alone from it.
"""

import torch
from torch import Tensor

from tunefork.errors import CheckpointError
from tunefork.model.bank import Bank
from tunefork.train.adamw_bank import BankAdamW
from tunefork.train.member import Member
from tunefork.train.optim_state import by_first_part, check_indices, check_layout
from tunefork.train.state import OPTIMIZER, RANDOM, WEIGHTS, Progress, State, random_states_of


def take_out(bank: Bank, optimizer: BankAdamW, slot: int, progress: Progress, count: int) -> State:
    """The state of `slot` after `count` updates, in host memory, copied."""
    tensors: dict[str, Tensor] = {}
    for path, (a_rd, b_or) in bank.adapter(slot).items():
        tensors[f"{WEIGHTS}{path}.lora_a"] = a_rd
        tensors[f"{WEIGHTS}{path}.lora_b"] = b_or
    if count:
        for index, (m, v) in enumerate(optimizer.moments(slot).values()):
            tensors[f"{OPTIMIZER}{index}.step"] = torch.tensor(float(count))
            tensors[f"{OPTIMIZER}{index}.exp_avg"] = m
            tensors[f"{OPTIMIZER}{index}.exp_avg_sq"] = v
    tensors |= {RANDOM + name: value for name, value in random_states_of(bank.model).items()}
    copies = {
        name: torch.empty(value.shape, dtype=value.dtype).copy_(value)
        for name, value in tensors.items()
    }
    return State(progress, copies)


@torch.no_grad()
def put_in(bank: Bank, optimizer: BankAdamW, slot: int, member: Member, state: State) -> int:
    """Make `slot`, which holds `member` untrained, go on from `state`; returns its updates.

    Raises CheckpointError, and changes nothing, where it is another adapter's.
    """
    own = bank.adapter(slot)
    weights = {n[len(WEIGHTS) :]: t for n, t in state.tensors.items() if n.startswith(WEIGHTS)}
    wanted = {
        f"{path}.{name}": (torch.float32, tuple(value.shape))
        for path, pair in own.items()
        for name, value in zip(("lora_a", "lora_b"), pair, strict=True)
    }
    check_layout(weights, wanted, f"{member.name}: weights")
    kept = {n[len(OPTIMIZER) :]: t for n, t in state.tensors.items() if n.startswith(OPTIMIZER)}
    groups = by_first_part(kept)
    moments = list(optimizer.moments(slot).values())
    check_indices(groups, len(moments))
    if groups and len(groups) != len(moments):
        raise CheckpointError(f"{member.name}: optimizer: has {len(groups)} of {len(moments)}")
    for index, found in groups.items():
        shape = (torch.float32, tuple(moments[int(index)][0].shape))
        layout = {"step": (torch.float32, ()), "exp_avg": shape, "exp_avg_sq": shape}
        check_layout(found, layout, f"{member.name}: optimizer: weight {index}")
    for path, (a_rd, b_or) in own.items():
        a_rd.copy_(weights[f"{path}.lora_a"])
        b_or.copy_(weights[f"{path}.lora_b"])
    for index, found in groups.items():
        m, v = moments[int(index)]
        m.copy_(found["exp_avg"])
        v.copy_(found["exp_avg_sq"])
    return max((int(found["step"]) for found in groups.values()), default=0)
