"""Which dtype a precision is."""

import pytest
import torch

from tunefork.model import device


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_what_is_asked_for_by_name_is_no_matter_of_speed(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_fast_bf16", lambda: False)
    cpu = torch.device("cpu")
    assert device.pick_dtype(precision, cpu) == torch.bfloat16
    assert device.pick_dtype("auto", cpu) == torch.float32
