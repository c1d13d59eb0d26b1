"""The group benchmark's script on a small shape, and its table of an incomplete set of runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import h200_together, results, training_runs
from benchmarks.h200_together import CASES, RUNS, collect
from benchmarks.together_runs import measure_group, ranks_of
from benchmarks.training_runs import TINY, WARM_UP, Run

_STEPS = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    training_runs.make_model(folder, TINY)
    return folder


def _small(name: str) -> Run:
    run = RUNS[name]
    given: dict[str, Any] = {"steps": _STEPS, "vocabulary": TINY.vocabulary, "most": 16}
    given["train"] = {"precision": "fp32", "compile": "never"}
    return replace(run, rows=4, length=8, options=run.options | given)


def test_a_group_is_measured_to_the_end(weights: Path) -> None:
    found = measure_group(_small("group_16x512"), weights)
    assert len(found["losses"]) == WARM_UP + _STEPS == len(found["last_adapters_losses"])
    assert found["losses"][-2] < found["losses"][0]  # the same row
    assert found["timed_steps"] == _STEPS - 2 and found["tokens_per_s"] > 0
    assert found["ranks"] == ranks_of(_small("group_16x512")) == [8, 16, 16, 16]
    per_rank = TINY.layers * sum(a + b for a, b in _layers())
    assert found["adapter_parameters"] == per_rank * sum(found["ranks"])


def _layers() -> list[tuple[int, int]]:
    kv = TINY.width * TINY.kv_heads // TINY.heads
    attention = [(TINY.width, TINY.width)] * 2 + [(TINY.width, kv)] * 2
    return [*attention, *[(TINY.width, TINY.mlp)] * 2, (TINY.mlp, TINY.width)]


def test_runs_that_failed_or_were_cut_off_leave_the_rest_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    fine = {"call": "2", "versions": {}, "device": "a GPU", "process_s": 1.0}
    rows: list[dict[str, Any]] = [
        fine | {"run": "group_16x512", "call": "1", "tokens_per_s": 20_000.0},
        fine | {"run": "looped_16x512", "call": "1", "tokens_per_s": 5_000.0},
        fine | {"run": "unsloth_512", "call": "1", "tokens_per_s": 1.0},
        fine | {"run": "unsloth_8192", "call": "0", "tokens_per_s": 1.0},
        fine | {"run": "group_16x512", "tokens_per_s": 25_000.0},
        fine | {"run": "unsloth_512", "tokens_per_s": 4_000.0},
        {"run": "peft_512", "call": "2", "error": "not done after 90 s"},
        {"run": "group_64x128", "call": "2", "error": "exit status 1"},
    ]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"run": "unsloth_8')
    table = json.loads(collect([raw], "table").read_text())
    assert [(r["case"], r["run"], r["ours"]) for r in table["rows"]] == [
        ("together_16x512", "group_16x512", True),
        ("together_16x512", "unsloth_512", False),
        ("together_16x512", "peft_512", False),
        ("together_16x512", "looped_16x512", False),  # of a call before, with ours of then
    ]
    ours = table["rows"][0]
    assert ours["asked"] == {"tokens_per_s": [24_000.0, True], "times_unsloth_512": [5.0, True]}
    assert ours["ratios"] == {"unsloth_512": 6.25, "looped_16x512": 4.0}
    raw.write_text(json.dumps(rows[-1]) + "\n")
    with pytest.raises(SystemExit, match="no run of ours"):
        collect([raw], "table")
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert {own for own, *_ in CASES.values()} <= set(h200_together.RUNS)
