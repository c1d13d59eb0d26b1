"""What every test runs under."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models here are tiny: waiting for a second thread costs more than it computes."""
    torch.set_num_threads(1)
