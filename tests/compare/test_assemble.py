"""From run folders to a comparison: what is paired with what, and how many it was."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.registry.conftest import make_record
from tunefork.compare.assemble import ArmRuns, assemble
from tunefork.compare.comparison import Arm, Comparison, Data, PairedDifference
from tunefork.evaluate.evaluate import save_columns
from tunefork.evaluate.statistics import Columns
from tunefork.recipe import Recipe
from tunefork.recipe_file import parse
from tunefork.registry.run import COLUMNS, STEPS, write_record

SIZE = 60
DATA = Data(
    train_examples=100,
    eval_examples=SIZE,
    labels=None,
    majority_share=None,
    supervised_share=0.5,
    tokens=1000,
)


def _columns(level: float, generated: int = 5) -> Columns:
    """Losses of about `level`, and fewer generated answers, as `evaluate.max_generated` has it."""
    noise = np.random.default_rng(0).normal(scale=0.01, size=SIZE)
    return {
        "loss_sum": level + noise,
        "tokens": np.ones(SIZE, dtype=np.int64),
        "rouge_l": np.clip(0.5 + noise[:generated] - level / 10, 0, 1),
    }


def _recipe(seeds: tuple[int, ...]) -> Recipe:
    return parse(
        {
            "model": "owner/name",
            "data": {"train": "rows.jsonl"},
            "evaluate": {"metrics": ["loss", "rouge_l"], "bootstrap_samples": 400},
            "compare": {"seeds": list(seeds), "methods": ["lora", "full"]},
        }
    )


def _compare(out: Path, levels: dict[Arm, dict[int, float]], seeds: tuple[int, ...]) -> Comparison:
    """The comparison of runs with these losses, by arm and seed."""
    arms: dict[Arm, ArmRuns] = {}
    for arm, runs in levels.items():
        folders = []
        for seed, level in runs.items():
            folder = out / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            save_columns(_columns(level), folder / COLUMNS)
            step = {"step": 1, "tokens": 10, "loss": 2.0, "learning_rate": 1e-4}
            (folder / STEPS).write_text(json.dumps(step) + "\n")
            metrics = {"loss": [level] * 3, "rouge_l": [0.5] * 3}
            method = None if arm == "base" else arm
            versions = {"torch": "2.13.0", "transformers": "5.24.0"}
            record = make_record(method=method, seed=seed, metrics=metrics, versions=versions)
            write_record(folder, record)
            folders.append(folder)
        arms[arm] = ArmRuns(folders=folders)
    return assemble(_recipe(seeds), out, arms, DATA)


def _pair(comparison: Comparison, a: Arm, b: Arm, metric: str = "loss") -> PairedDifference:
    [found] = [p for p in comparison.paired if (p.a, p.b, p.metric) == (a, b, metric)]
    return found


def test_runs_are_paired_by_seed_and_not_by_place(tmp_path: Path) -> None:
    """Each seed moves both methods alike; LoRA lost seed 1 and full lost seed 2."""
    at = {0: 0.0, 1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8}
    lora = {seed: 1.0 + shift for seed, shift in at.items() if seed != 1}
    full = {seed: 1.1 + shift for seed, shift in at.items() if seed != 2}
    made = _compare(tmp_path, {"base": {0: 3.0}, "lora": lora, "full": full}, (0, 1, 2, 3, 4))
    found = _pair(made, "full", "lora")
    assert found.seeds == (0, 3, 4)
    assert found.difference == pytest.approx(0.1)
    assert 0.09 < found.low < found.high < 0.11  # by place, the seeds' spread would be in it
    base = _pair(made, "lora", "base")
    assert base.seeds == () and base.high - base.low > 0.5  # the base has no seed to pair with
    assert "variance of training is unmeasured" not in made.verdict.text


def test_without_a_common_seed_the_runs_are_unpaired(tmp_path: Path) -> None:
    made = _compare(
        tmp_path, {"base": {0: 3.0}, "lora": {0: 1.0}, "full": {1: 1.1, 2: 1.3}}, (0, 1, 2)
    )
    found = _pair(made, "full", "lora")
    assert found.seeds == () and found.difference == pytest.approx(0.2)
    assert "With one training run a method" in made.verdict.text


def test_differences_say_how_many_they_are_of(tmp_path: Path) -> None:
    made = _compare(tmp_path, {"base": {0: 3.0}, "lora": {0: 1.0}, "full": {0: 1.1}}, (0,))
    assert _pair(made, "full", "lora").examples == SIZE
    assert _pair(made, "full", "lora", "rouge_l").examples == 5
