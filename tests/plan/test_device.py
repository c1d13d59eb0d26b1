"""A GPU is found in the catalogue by the name that its driver gives it."""

import pytest

from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import _is

REPORTED = {
    "NVIDIA GeForce RTX 4090": ["rtx4090"],
    "NVIDIA A10G": ["a10g"],
    "NVIDIA L4": ["l4"],
    "NVIDIA L40S": ["l40s"],
    "NVIDIA A100-SXM4-40GB": ["a100-40"],
    "NVIDIA A100-SXM4-80GB": ["a100-80"],
    "NVIDIA H100 80GB HBM3": ["h100"],
    "NVIDIA H200": ["h200"],
    "NVIDIA B200": ["b200"],
    "NVIDIA T4": [],
}


@pytest.mark.parametrize("reported", REPORTED)
def test_a_drivers_name_finds_its_entry(reported: str) -> None:
    found = [gpu.id for gpu in load_catalogue().gpus if _is(gpu.name, reported)]
    assert found == REPORTED[reported]
