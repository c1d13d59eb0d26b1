"""Trackers get the figures and nothing else, and cannot hurt a run.

The default tests put minimal packages in the real ones' place; those marked slow run with the real
ones where they are installed (benchmarks and CI do: `pip install 'tunefork[tensorboard]'` and so
on), offline.
"""

import json
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import tunefork.train.trackers as trackers
from tests.train.test_events import step
from tunefork.errors import RecipeError
from tunefork.train.events import EventLog, Warned, event_log, read_events
from tunefork.train.trackers import Tracker, check_trackers, open_trackers

SETTINGS: dict[str, str | int | float] = {"method": "lora", "seed": 0}
REAL: tuple[Tracker, ...] = ("tensorboard", "mlflow", "wandb", "trackio")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test's trackers set goes with it; whoever runs the tests has no say."""
    for key in trackers._SILENCE:
        monkeypatch.setenv(key, trackers._SILENCE[key])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class Fake:
    """A tracker package of any kind: remembers what it is told."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[bool] = []
        self.fail_at = fail_at
        self.config: object = None

    def init(self, **options: Any) -> Any:
        self.config = options["config"]
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, figures: dict[str, float], step: int) -> None:
        if step == self.fail_at:
            raise ConnectionError("https://key:secret@example.com refused")
        self.logged.append((step, figures))

    def finish(self, exit_code: int = 0) -> None:
        self.ended.append(exit_code == 0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    module = ModuleType("wandb")
    module.init = made.init  # type: ignore[attr-defined]
    module.Settings = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return made


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with event_log(tmp_path) as opened:
        yield opened


def _run(log: EventLog, folder: Path, *names: Tracker, steps: int = 3) -> list[str]:
    said: list[str] = []

    def warn(message: str) -> None:
        said.append(message)
        log.write(Warned(code="tracker", message=message))

    opened = open_trackers(names, folder, SETTINGS, warn)
    for tracker in opened:
        log.listeners.append(tracker.listen)
    log.state("training")
    for number in range(1, steps + 1):
        log.write(step(number, loss=3.0 - number))
    log.state("finished")
    for tracker in opened:
        tracker.close()
    return said


def test_the_figures_and_settings_are_all_that_it_gets(
    fake: Fake, log: EventLog, tmp_path: Path
) -> None:
    assert _run(log, tmp_path, "wandb") == []
    assert [number for number, _ in fake.logged] == [1, 2, 3]
    assert fake.logged[0][1] == {
        "loss": 2.0,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_s": 5.0,
        "memory_bytes": 1.0,
    }
    assert fake.config == SETTINGS and fake.ended == [True]


def test_a_failed_run_is_told_apart(fake: Fake, log: EventLog, tmp_path: Path) -> None:
    [tracker] = open_trackers(("wandb",), tmp_path, SETTINGS, lambda _: None)
    log.listeners.append(tracker.listen)
    log.state("failed", "step 3: the loss is nan")
    tracker.close()
    assert fake.ended == [False]


def test_a_failing_tracker_is_said_once_and_the_run_goes_on(
    fake: Fake, log: EventLog, tmp_path: Path
) -> None:
    fake.fail_at = 2
    [said] = _run(log, tmp_path, "wandb", steps=9)
    assert said.startswith("train.trackers: wandb failed (ConnectionError)")
    assert "secret" not in said and len(fake.logged) == 1
    warned = [line.what for line in read_events(tmp_path / "events.jsonl")]
    assert sum(isinstance(what, Warned) for what in warned) == 1


def test_a_hanging_tracker_stops_nothing(
    fake: Fake, log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_LAST_WAIT_S", 0.1)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 4)
    let_go = threading.Event()
    monkeypatch.setattr(fake, "log", lambda *_, **__: let_go.wait(30))
    [said] = _run(log, tmp_path, "wandb", steps=50)
    assert "wandb is slower than the run" in said
    let_go.set()


def test_a_missing_package_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"mlflow is not installed; pip install 'tunefork\[mlf"):
        check_trackers(("mlflow",))
    check_trackers(())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", REAL)
def test_the_real_package_takes_a_run(
    name: Tracker, log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(trackers, "_LAST_WAIT_S", 90.0)
    assert _run(log, tmp_path, name) == []
    assert _read(name, tmp_path) == [2.0, 1.0, 0.0]


def _read(name: Tracker, folder: Path) -> list[float]:
    """The losses, out of what the tracker wrote."""
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder / "tensorboard"))
        found.Reload()
        return [scalar.value for scalar in found.Scalars("loss")]
    if name == "mlflow":
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("tunefork")
        [run] = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED" and run.data.params["method"] == "lora"
        return [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")]
    if name == "trackio":
        [file] = (folder / "trackio").glob("tunefork.db")
        with sqlite3.connect(file) as database:
            rows = database.execute("SELECT metrics FROM metrics ORDER BY step").fetchall()
        return [json.loads(row[0])["loss"] for row in rows]
    # wandb has no reader of its own files left: history items are protobuf, key then JSON value.
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    # Each is there twice: in the history and in the summary.
    found = re.findall(rb"loss\x82\x01.([0-9.]+)", file.read_bytes())
    return [float(text) for text in found[::2]]
