"""A comparison killed amidst a method goes on there, by the same command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tunefork.recipe import Recipe
from tunefork.recipe_file import dump
from tunefork.registry.run import read_record
from tunefork.train.events import EVENTS, Resumed, read_events, read_steps

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-c", "from tunefork.cli.main import main; main()", "compare"]
PATIENCE_S = 120.0


def test_a_killed_comparison_goes_on_from_the_checkpoint(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(
        train={"max_steps": 300, "epochs": 1000, "checkpoint_every_steps": 1, "batch_size": 2},
        compare={"methods": ["lora"], "search_trials": 1},
    )
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(dump(recipe))
    command = [*COMMAND, str(file), "--out", str(out)]
    run = out / "lora" / "seed-0"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + PATIENCE_S
        while len(read_steps(run / EVENTS)) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and read_record(run) is None
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    resumed = [line.what for line in read_events(run / EVENTS) if isinstance(line.what, Resumed)]
    assert len(resumed) == 1 and resumed[0].step >= 4
    record = read_record(run)
    assert record is not None and (record.status, record.num_steps) == ("ok", 300)
