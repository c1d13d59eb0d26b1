"""The speed table's script on a small shape: what it trains, what it records, what it compares."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import h200_training, results, training_peers, training_runs
from benchmarks.training_cases import CASES, RUNS, TOOLS, chosen_runs
from benchmarks.training_runs import TINY, WARM_UP, Run
from benchmarks.training_table import collect

_ROWS, _LENGTH, _TIMED = 2, 12, 5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    training_runs.make_model(folder, TINY)
    return folder


def _measured(name: str, folder: Path) -> dict[str, Any]:
    run = replace(RUNS[name], rows=_ROWS, length=_LENGTH)
    batches = training_runs.draw_batches(run, WARM_UP + _TIMED, TINY.vocabulary)
    np.savez(folder / training_runs.BATCHES, **batches)
    return training_runs.measure(run, folder)


def test_ours_and_pefts_losses_agree_step_by_step(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, batches, targets, scale, optimiser and order: else they part."""
    for module in (training_runs, training_peers):  # or the deltas would hardly move in 8 steps
        monkeypatch.setattr(module, "LEARNING_RATE", 3e-3)
    ours = _measured("plain_lora", weights)
    peft = _measured("peft_defaults", weights)
    assert len(ours["losses"]) == WARM_UP + _TIMED
    assert ours["losses"][0] == pytest.approx(peft["losses"][0], rel=2e-4)
    assert ours["losses"][-1] < 0.95 * ours["losses"][0]
    # Each draws its own A, which parts them by 0.4 %; half or twice the scale by 1.6 % and more.
    np.testing.assert_allclose(ours["losses"], peft["losses"], rtol=8e-3)
    for row in (ours, peft):
        assert row["timed_steps"] == _TIMED
        assert row["tokens_per_s"] == pytest.approx(_ROWS * _LENGTH / row["step_s"])


def test_full_fine_tuning_agrees_too(weights: Path) -> None:
    ours, peer = _measured("plain_full", weights), _full_without_liger(weights)
    np.testing.assert_allclose(ours["losses"], peer["losses"], rtol=5e-3)


def _full_without_liger(weights: Path) -> dict[str, Any]:
    run = replace(RUNS["peft_liger_full"], tool="peft", rows=_ROWS, length=_LENGTH)
    batches = training_runs.draw_batches(run, WARM_UP + _TIMED, TINY.vocabulary)
    np.savez(weights / training_runs.BATCHES, **batches)
    return training_runs.measure(run, weights)


def test_a_case_names_runs_that_exist_and_its_own_tool_first() -> None:
    for case in CASES.values():
        assert RUNS[case.ours].tool == RUNS[case.plain].tool == "tunefork"
        sizes = {(RUNS[n].rows, RUNS[n].length) for n in (case.ours, case.plain, *case.peers)}
        assert len(sizes) == 1
    runs = chosen_runs(list(CASES), list(TOOLS))
    assert len(runs) == len({run.name for run in runs}) == len(RUNS)
    assert [r.name for r in chosen_runs(["full_8x2048"], ["tunefork"])] == ["full"]


@pytest.mark.slow
def test_a_run_that_fails_or_hangs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("none", "no such tool", 1, 4)
    config = tmp_path / "config.json"
    config.write_text('{"hidden_size": 64}')
    found = h200_training.in_a_process(run, tmp_path, None, 60.0)
    assert "KeyError: 'no such tool'" in found["error"]
    assert "not done after" in h200_training.in_a_process(run, tmp_path, None, 0.01)["error"]
    if not torch.cuda.is_available():
        config.write_text('{"hidden_size": 4096}')
        asked = ["h200_training", "one", json.dumps(asdict(run)), str(tmp_path)]
        monkeypatch.setattr(sys, "argv", asked)
        with pytest.raises(SystemExit) as ended:  # the process' own end, which takes no second one
            h200_training.main()
        (tmp_path / "ends_so.py").write_text(f"raise SystemExit({ended.value.code})")
        with pytest.raises(SystemExit, match="no GPU is seen any more"):
            h200_training.in_a_process(run, tmp_path, str(tmp_path), 60.0, "ends_so")


def _raw(run: str, call: str, **more: Any) -> str:
    tool = RUNS[run].tool
    return json.dumps({"run": run, "tool": tool, "setting": "-", "call": call, **more})


def _speed(run: str, call: str, tokens_per_s: float, **more: Any) -> str:
    found = {"device": "GPU", "versions": {"torch": "2"}, "peak_gib": 1.0, "losses": [2.0, 1.0]}
    speed = {"tokens_per_s": tokens_per_s, "step_s": 1 / tokens_per_s}
    return _raw(run, call, **(speed | found | more))


def test_ratios_are_of_one_call_and_of_the_best_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    raw = tmp_path / "raw.jsonl"
    lines = [
        _raw("int8", "1", error="killed"),
        _speed("int8", "1", 290.0, first_step_s=30.0),
        _speed("int8", "1", 310.0, first_step_s=8.0),
        _speed("unsloth", "1", 100.0),
        _speed("peft_liger", "1", 50.0),
        _speed("peft_liger_defaults", "1", 60.0),
        _raw("peft", "1", error="out of memory"),
        _speed("plain_lora", "0", 40.0, losses=[2.0, 1.5]),
        _speed("full", "2", 30.0),
        _speed("unsloth", "2", 500.0),  # of another machine
        _raw("int8", "3", error="killed"),
    ]
    raw.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = json.loads(collect([raw], "table").read_text(encoding="utf-8"))
    assert {"command", "device", "date", "commit", "versions", "rows"} <= table.keys()
    by = {(row["case"], row["tool"], row.get("tokens_per_s")): row for row in table["rows"]}
    ours = by["lora_8x2048_fp8", "tunefork", 300.0]
    assert ours["ratios"] == {"unsloth": 3.0, "peft_liger": 5.0}
    assert (ours["repeats"], ours["first_step_s"]) == ([290.0, 310.0], 30.0)  # the median, 300
    assert ours["asked"] == {"tokens_per_s": [26_000, False], "times_unsloth": [1.6, True]}
    assert ours["largest_loss_gap"] == 0.5
    assert by["lora_8x2048_fp8", "peft", None]["error"] == "out of memory"
    assert by["lora_8x2048_fp8_plain_losses", "tunefork", 40.0]["losses"] == [2.0, 1.5]
    over = by["lora_over_full", "tunefork", None]
    assert (over["ratio"], over["same_call"]) == (10.0, False)


def test_a_newer_run_without_a_peer_is_the_row_and_the_older_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    raw = tmp_path / "raw.jsonl"
    lines = [
        _speed("int8", "1", 300.0).replace('"int8"', '"fp8"'),  # as it was called then
        _speed("unsloth", "1", 100.0),
        _speed("int8", "2", 250.0),
    ]
    raw.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = json.loads(collect([raw], "table").read_text(encoding="utf-8"))["rows"]
    by = {row["case"]: row for row in rows if row.get("ours")}
    assert by["lora_8x2048_fp8"]["tokens_per_s"] == 250.0
    assert by["lora_8x2048_fp8"]["ratios"] == {"unsloth": 2.5}
    assert by["lora_8x2048_fp8"]["ratios_to_call"] == "1"
    before = by["lora_8x2048_fp8_before"]
    assert before["ratios"] == {"unsloth": 3.0} and "ratios_to_call" not in before


def test_a_tool_that_is_not_in_the_rows_call_is_beside_ours_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    raw = tmp_path / "raw.jsonl"
    lines = [
        _speed("int8", "1", 300.0),
        _speed("unsloth", "1", 100.0),
        _speed("int8", "2", 280.0),
        _speed("peft_liger", "2", 140.0),
        _speed("peft_liger_defaults", "2", 70.0),
        _speed("int8", "3", 270.0),  # a peer that fails is none
        _raw("unsloth", "3", error="killed"),
        _raw("peft_liger", "3", error="killed"),
    ]
    raw.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = json.loads(collect([raw], "table").read_text(encoding="utf-8"))["rows"]
    by = {row["case"]: row for row in rows if row.get("ours")}
    assert by["lora_8x2048_fp8"]["tokens_per_s"] == 270.0
    assert by["lora_8x2048_fp8"]["ratios_to_call"] == "1"
    assert by["lora_8x2048_fp8_before"]["ratios"] == {"unsloth": 3.0}
    assert by["lora_8x2048_fp8_before"]["asked"]["times_unsloth"] == [1.6, True]
    beside = by["lora_8x2048_fp8_beside_peft_liger"]
    assert (beside["tokens_per_s"], beside["ratios"]) == (280.0, {"peft_liger": 2.0})


@pytest.mark.slow
def test_the_whole_way_on_a_cpu(tmp_path: Path) -> None:
    """`measure --tiny`: a process for each run, a line for each, and what was run is compared."""
    raw = tmp_path / "raw.jsonl"
    command = [sys.executable, "-m", "benchmarks.h200_training", "measure", "--tiny"]
    command += ["--out", str(raw), "--model", str(tmp_path / "weights"), "--call", "an earlier one"]
    command += ["--cases", "lora_8x2048_bf16", "--tools", "tunefork", "plain", "peft"]
    command += ["--steps", "2", "--peer-steps", "2", "--set", "train.precision=fp32"]
    here = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(here / "src")}
    subprocess.run(command, check=True, cwd=here, env=environment)
    rows = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    assert [row["run"] for row in rows] == ["bf16", "peft", "peft_defaults", "plain_lora"]
    assert not [row["error"] for row in rows if "error" in row]
    assert {row["call"] for row in rows} == {"an earlier one"}
    assert "train.precision: fp32" in rows[0]["setting"]
    assert "train.precision: bf16" in rows[3]["setting"]  # what is compared with stays as it is
