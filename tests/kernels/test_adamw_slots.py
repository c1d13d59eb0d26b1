"""Many optimisers in one pass against PyTorch's, one a slot; what is not due keeps its bits."""

import pytest
import torch

from tunefork.kernels.adamw import factors_of
from tunefork.kernels.adamw_slots import adamw_slots_, slot_norms, update_slot_

SETTINGS = [
    {"learning_rate": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.1, "gradient_scale": 0.5},
    {"learning_rate": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.0, "gradient_scale": 1.0},
]


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("count", [1, 7])
def test_each_slot_takes_pytorchs_own_step(width: int, count: int) -> None:
    torch.manual_seed(0)
    slot_b = torch.tensor([0, 1, 2, 1, 0, 3], dtype=torch.int32)  # 2 is not due, 3 is padding
    tensors = [torch.randn(6, width) for _ in range(4)]
    tensors[3].square_()
    tensors[1][2] = torch.nan
    p, g, m, v = (tensor.clone() for tensor in tensors)
    idle = [1.0, *[0.0] * 7]
    known = [[*factors_of(count, **setting), 1.0] for setting in SETTINGS]  # type: ignore[arg-type]
    adamw_slots_(p, g, m, v, slot_b, torch.tensor([*known, idle, idle]))
    assert not g.any()
    for ours, theirs in zip((p, m, v), (tensors[0], tensors[2], tensors[3]), strict=True):
        assert torch.equal(ours[[2, 5]], theirs[[2, 5]])
    for slot, setting in enumerate(SETTINGS):
        parts = [tuple(tensor[at] for tensor in tensors) for at in range(6) if slot_b[at] == slot]
        update_slot_(parts, torch.tensor(float(count)), **setting)  # type: ignore[arg-type]
    own = slot_b < 2
    for ours, theirs in zip((p, m, v), (tensors[0], tensors[2], tensors[3]), strict=True):
        torch.testing.assert_close(ours[own], theirs[own], rtol=1e-5, atol=1e-6)


def test_a_norm_is_of_its_slots_blocks_alone() -> None:
    g = torch.arange(24.0).view(6, 4)
    g[1] = torch.inf
    at = torch.tensor([[0, 2, 5], [1, 6, 6], [3, 4, 6]], dtype=torch.int32)
    found = slot_norms(g, at)
    assert found[1] == torch.inf
    torch.testing.assert_close(found[0], g[[0, 2, 5]].norm())
    torch.testing.assert_close(found[2], g[[3, 4]].norm())
