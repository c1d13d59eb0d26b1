"""Real processes: how a piece ends where its parent is told to, or is gone.

A piece's first act once it is loaded is to read recipe.yaml. That is a FIFO here, so that a piece
waits there until it is ended, and opening the other end tells when it has come so far.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tunefork.compare import worker
from tunefork.compare.worker import start
from tunefork.registry.run import RECIPE

PATIENCE_S = 60.0

PARENT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
from tunefork.compare.worker import start
print("ready", flush=True)
try:
    print(start(Path(sys.argv[1]), "base"))
except KeyboardInterrupt:
    print("interrupted")
"""


def _wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def environment() -> dict[str, str]:
    """As it is: a piece loads PyTorch and transformers, which takes seconds."""
    return dict(os.environ)


LIGHT = """
import sys, types
for name in ("tunefork.compare.search", "tunefork.trial.trial"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["tunefork.compare.search"].search = None
sys.modules["tunefork.trial.trial"].run_trial = None
"""


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)])
def perhaps_light(
    request: pytest.FixtureRequest,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With what a piece loads for its work left out."""
    if request.param:
        site = tmp_path_factory.mktemp("site")
        (site / "sitecustomize.py").write_text(LIGHT)
        paths = [str(site), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / RECIPE)
    return tmp_path


@pytest.fixture
def parent(folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that starts a piece in `folder`; so far it has imported what it needs for that."""
    command = [sys.executable, "-c", PARENT, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def _child(parent: subprocess.Popen[str]) -> psutil.Process:
    _wait_until(lambda: bool(psutil.Process(parent.pid).children()))
    return psutil.Process(parent.pid).children()[0]


@pytest.mark.parametrize(
    ("number", "delay_s"),
    [
        (signal.SIGINT, 0.0),
        (signal.SIGINT, 0.05),
        pytest.param(signal.SIGINT, 0.5, marks=pytest.mark.slow),
        (signal.SIGTERM, 0.05),
    ],
)
def test_a_signal_while_a_piece_starts_ends_both_quietly(
    parent: subprocess.Popen[str], number: signal.Signals, delay_s: float
) -> None:
    child = _child(parent)
    time.sleep(delay_s)
    parent.send_signal(number)
    out, err = parent.communicate(timeout=PATIENCE_S)
    assert (out, err) == ("interrupted\n", "")
    assert not child.is_running()


def test_a_signal_to_a_piece_at_work_ends_both_quietly(
    perhaps_light: None, parent: subprocess.Popen[str], folder: Path
) -> None:
    ends: list[int] = []

    def is_loaded() -> bool:
        try:
            ends.append(os.open(folder / RECIPE, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO  # nobody reads it yet
        return bool(ends)

    _wait_until(is_loaded)  # from here on it waits for what is never written
    time.sleep(0.2)  # a signal just before a read that waits is heeded after it, as in any Python
    parent.send_signal(signal.SIGINT)
    out, err = parent.communicate(timeout=PATIENCE_S)
    assert (out, err) == ("interrupted\n", "")
    os.close(ends[0])


def test_a_piece_does_not_outlive_its_parent(parent: subprocess.Popen[str]) -> None:
    child = _child(parent)
    parent.kill()
    _wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_what_a_piece_says_of_its_failure_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def here(folder: Path, *task: str, lock: int | None) -> Iterator[tuple[Any, threading.Event]]:
        """In the place of a process, which takes seconds to load."""
        assert lock is None
        yield SimpleNamespace(wait=lambda: worker.main([str(folder), *task])), threading.Event()

    monkeypatch.setattr(worker, "_child", here)
    (tmp_path / RECIPE).write_text("model: [")
    failure = start(tmp_path, "base")
    assert failure is not None and failure.is_bad_input
    assert "recipe.yaml:1: is not YAML" in failure.message
