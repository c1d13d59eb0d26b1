"""What every test runs under."""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

gc.disable()  # while tests are collected nothing is garbage, and all of PyTorch would be looked at


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models here are tiny: waiting for a second thread costs more than it computes."""
    import torch  # not where workers are only directed from

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def imports_left_to_themselves() -> None:
    """A run collects garbage before it measures memory: over what PyTorch's and transformers'
    imports leave, a quarter of a second each time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """A killed process loses nothing that was written: no test needs the disk to have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def fingerprints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is remembered of models by their files' state: of those that tests share, once."""
    return tmp_path_factory.mktemp("fingerprints")


@pytest.fixture(scope="session")
def new_home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Numbered here: `mktemp` reads a folder of thousands to find the next number."""
    folder, numbers = tmp_path_factory.mktemp("homes"), itertools.count()
    return lambda: folder / str(next(numbers))


@pytest.fixture(autouse=True)
def home(new_home: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, fingerprints: Path) -> Path:
    """A TUNEFORK_HOME of the test's own: its runs correct no plan but its own."""
    folder = new_home()
    folder.mkdir()
    (folder / "fingerprints").symlink_to(fingerprints)
    monkeypatch.setenv("TUNEFORK_HOME", str(folder))
    return folder
