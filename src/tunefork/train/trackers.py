"""A run's figures in TensorBoard, MLflow, Weights & Biases or Trackio, if the recipe says so.

None is on by default, each is an optional extra, and what is sent is the figures of each step and
the run's own settings: no data, no row, no console output, no code, no machine statistics. Where to
is the tracker's own affair (MLFLOW_TRACKING_URI, WANDB_MODE, ...); with nothing set, MLflow and
TensorBoard write into the run folder. Their own usage reports are switched off here, unless the
environment says otherwise.

A tracker works in a thread of its own behind a short queue: one that fails is said once and left
out, one that hangs loses figures, and neither stops or slows a run. events.jsonl has them all.
"""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tunefork.errors import RecipeError
from tunefork.train.events import Line, State, StateChanged, StepDone, Validated

Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]
Settings = dict[str, str | int | float]

_FIGURES = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes")
_MOST_WAITING = 1000
_LAST_WAIT_S = 20.0
_ENDED: tuple[State, ...] = ("finished", "failed", "interrupted")
_SILENCE = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, slots=True)
class Sink:
    """An opened tracker. All calls come from one thread."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[bool], None]
    """Told whether the run succeeded."""


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raise RecipeError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(
                f"train.trackers: {name} is not installed; pip install 'tunefork[{name}]', or "
                "leave it out"
            )


def _tensorboard(folder: Path, run: str, settings: Settings) -> Sink:
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    def log(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Sink(log, lambda _: writer.close())


def _mlflow(folder: Path, run: str, settings: Settings) -> Sink:
    mlflow: Any = import_module("mlflow")
    named = os.environ.get("MLFLOW_TRACKING_URI")
    uri = named or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunefork")
    found = client.get_experiment_by_name(name)
    where = None if named else (folder / "mlflow-artifacts").resolve().as_uri()
    experiment = found.experiment_id if found else client.create_experiment(name, where)
    run_id = client.create_run(experiment, run_name=run).info.run_id
    for key, value in settings.items():
        client.log_param(run_id, key, value)

    def log(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            client.log_metric(run_id, name, value, step=step)

    return Sink(log, lambda ok: client.set_terminated(run_id, "FINISHED" if ok else "FAILED"))


def _wandb(folder: Path, run: str, settings: Settings) -> Sink:
    wandb: Any = import_module("wandb")
    quiet = wandb.Settings(
        console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
    )
    project = os.environ.get("WANDB_PROJECT", "tunefork")
    opened = wandb.init(
        project=project,
        name=run,
        dir=str(folder),
        config=settings,
        settings=quiet,
        reinit="create_new",
    )

    def log(step: int, figures: dict[str, float]) -> None:
        opened.log(figures, step=step)

    return Sink(log, lambda ok: opened.finish(exit_code=0 if ok else 1))


def _trackio(folder: Path, run: str, settings: Settings) -> Sink:
    trackio: Any = import_module("trackio")
    project = os.environ.get("TRACKIO_PROJECT", "tunefork")
    opened = trackio.init(project=project, name=run, config=settings, embed=False)
    return Sink(
        lambda step, figures: opened.log(figures, step=step),
        lambda _: opened.finish(),
    )


_OPEN: dict[Tracker, Callable[[Path, str, Settings], Sink]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
}


class TrackerThread:
    """One tracker: `listen` to a run's events, and `close`."""

    def __init__(
        self,
        name: Tracker,
        folder: Path,
        run: str,
        settings: Settings,
        warn: Callable[[str], None],
    ) -> None:
        self.name, self.warn = name, warn
        self.is_ok = False
        self.waiting: queue.Queue[StepDone | Validated | None] = queue.Queue(_MOST_WAITING)
        self.warned = False
        self.error: str | None = None
        opening = (folder, run, settings)
        self.thread = threading.Thread(target=self._work, args=opening, daemon=True)
        self.thread.start()

    def listen(self, line: Line) -> None:
        """Take what is for a tracker; never waits."""
        match line.what:
            case StateChanged(state=state) if state in _ENDED:
                self.is_ok = state == "finished"
            case StepDone() | Validated() as done:
                try:
                    self.waiting.put_nowait(done)
                except queue.Full:
                    self.error = self.error or f"{self.name} is slower than the run"
        if self.error is not None and not self.warned:
            self.warned = True
            self.warn(
                f"train.trackers: {self.error}; the run goes on without, events.jsonl has all"
            )

    def close(self) -> None:
        """Let it write what is waiting, for `_LAST_WAIT_S` at most."""
        try:
            self.waiting.put_nowait(None)
            self.thread.join(_LAST_WAIT_S)
        except queue.Full:
            pass
        if self.thread.is_alive():
            self.error = self.error or f"{self.name} does not end"
        if self.error is not None and not self.warned:
            self.warned = True
            self.warn(f"train.trackers: {self.error}; events.jsonl has all figures")

    def _work(self, folder: Path, run: str, settings: Settings) -> None:
        try:
            sink = _OPEN[self.name](folder, run, settings)
            while (done := self.waiting.get()) is not None:
                names = _FIGURES if isinstance(done, StepDone) else ("validation_loss",)
                sink.log(done.step, {name: float(getattr(done, name)) for name in names})
            sink.close(self.is_ok)
        except BaseException as error:  # whatever a tracker does, a run goes on
            # Its type only: messages hold addresses, and sometimes keys.
            self.error = f"{self.name} failed ({type(error).__name__})"
            while self.waiting.get() is not None:
                pass


def open_trackers(
    names: Sequence[Tracker],
    folder: Path,
    settings: Settings,
    warn: Callable[[str], None],
) -> list[TrackerThread]:
    """Start the trackers that `names` asks for; the run is called by its folder's name."""
    for key, value in _SILENCE.items():
        if names:
            os.environ.setdefault(key, value)
    return [TrackerThread(name, folder, folder.name, settings, warn) for name in names]
