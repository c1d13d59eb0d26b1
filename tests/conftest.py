"""What every test runs under."""

import gc
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models here are tiny: waiting for a second thread costs more than it computes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def imports_left_to_themselves() -> None:
    """A run collects garbage before it measures memory: over what PyTorch's and transformers'
    imports leave, a quarter of a second each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TUNEFORK_HOME of the test's own: its runs correct no plan but its own."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TUNEFORK_HOME", str(folder))
    return folder
