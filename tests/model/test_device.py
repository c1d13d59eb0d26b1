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


@pytest.mark.parametrize(
    ("capability", "has_it"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_which_gpus_have_int8(
    capability: tuple[int, int], has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.has_int8(torch.device("cuda", 0)) == has_it
    assert not device.has_int8(torch.device("cpu")) and not device.has_int8(None)
