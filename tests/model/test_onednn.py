"""A process on a CPU does not remember every length that it ever met."""

import os
import subprocess
import sys

import pytest

from tunefork.model.onednn import bound_shapes

_PRODUCTS = """
from tunefork.model.onednn import MOST, bound_shapes

bound_shapes()

import psutil
import torch

torch.set_num_threads(1)
weight = torch.zeros(64, 64, dtype=torch.bfloat16)
held = []
for length in range(1, 8 * MOST):
    torch.zeros(length, 64, dtype=torch.bfloat16) @ weight
    if length in (4 * MOST, 8 * MOST - 1):
        held.append(psutil.Process().memory_info().rss)
print(held[1] - held[0])
"""


@pytest.mark.parametrize(("adapters", "most"), [(0, 128), (4, 256), (1000, 1024)])
def test_a_group_has_shapes_of_each_adapter(
    monkeypatch: pytest.MonkeyPatch, adapters: int, most: int
) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    bound_shapes(adapters)
    assert [os.environ[name] for name in names] == [str(most)] * 2
    bound_shapes(7)  # what is said once holds
    assert os.environ[names[0]] == str(most)


@pytest.mark.slow
def test_new_lengths_take_no_more_memory() -> None:
    """512 more; without a bound they are 300 MB where bf16 is oneDNN's, and nothing elsewhere."""
    words = [sys.executable, "-c", _PRODUCTS]
    made = subprocess.run(words, check=True, capture_output=True, text=True)
    assert int(made.stdout) < 16 * 2**20
