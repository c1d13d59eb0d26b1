"""A sweep and train-many, stopped and killed in a process of their own, go on to the same end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes import rows
from tunefork.recipe import Recipe
from tunefork.recipe_file import dump
from tunefork.registry.run import read_record
from tunefork.sweep.result import SweepResult
from tunefork.train.events import EVENTS, Resumed, read_events, read_steps

pytestmark = pytest.mark.slow

MAIN = [sys.executable, "-c", "from tunefork.cli.main import main; main()"]
PATIENCE_S = 240.0
TRAIN = {"max_steps": 40, "epochs": 1000, "checkpoint_every_steps": 1, "batch_size": 2}


def _end_within(command: list[str], run: Path, number: signal.Signals) -> int:
    """Send a signal once `run` has taken five steps; returns the exit status."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + PATIENCE_S
        while len(read_steps(run / EVENTS)) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number)
    return process.returncode


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_a_sweep_goes_on(
    make_recipe: Callable[..., Recipe], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    sweeping = {"rank": [2, 4], "learning_rate": [1e-4, 1e-3], "validation_share": 0.3}
    recipe = make_recipe(train=TRAIN, sweep=sweeping)
    file, whole, out = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "out"
    file.write_text(dump(recipe))
    command = [*MAIN, "sweep", str(file), "--out"]
    run = out / "variants" / "r2-lr1e-4"
    assert _end_within([*command, str(out)], run, number) == status
    record = read_record(run)
    assert (record is None) == (number == signal.SIGKILL)
    assert record is None or record.status == "interrupted"
    again = [*MAIN, "sweep", str(out), "--resume", "--json"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    subprocess.run([*command, str(whole)], check=True, capture_output=True, timeout=PATIENCE_S)
    ours, theirs = (SweepResult.load(at / "sweep.json") for at in (out, whole))
    assert [v.metrics for v in ours.variants] == [v.metrics for v in theirs.variants]
    assert json.loads(done.stdout)["chosen"] == theirs.chosen
    resumed = [line.what for line in read_events(run / EVENTS) if isinstance(line.what, Resumed)]
    assert len(resumed) == 1 and resumed[0].step >= 4


def test_train_many_goes_on(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    lines = []
    for at, name in enumerate(("acme", "bolt")):
        text = "".join(json.dumps(row) + "\n" for row in rows(12, 1000 * at))
        (tmp_path / f"{name}.jsonl").write_text(text)
        lines.append(f"- {{name: {name}, publish: t/{name}, data: {{train: {name}.jsonl}}}}")
    (tmp_path / "base.yaml").write_text(dump(make_recipe(train=TRAIN)))
    file = tmp_path / "many.yaml"
    file.write_text("recipe: base.yaml\nadapters:\n" + "\n".join(lines) + "\n")
    out = tmp_path / "out"
    command = [*MAIN, "train-many", str(file), "--out", str(out)]
    assert _end_within(command, out / "acme", signal.SIGKILL) == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "t/acme:v1" in done.stdout and "t/bolt:v1" in done.stdout
