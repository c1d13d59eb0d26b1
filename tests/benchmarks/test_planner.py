"""What is said of the planner's grid is what its raw file and the packaged fit come to."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import planner_fit
from benchmarks.fitting import fit_memory, fit_time, process_errors, tensor_error, time_errors
from benchmarks.planner_cases import (
    CASES,
    HELD_OUT_FILE,
    HELD_OUT_SHAPE,
    held_out,
    read_case,
)
from benchmarks.results import FOLDER
from tunefork.plan.fits import load_fits

RAW = FOLDER / "raw" / "planner_h200.jsonl"
LIMITS = {"tensor": 0.05, "process": 0.08, "step": 0.15}


def _row(took: float, predicted: float, figure: str = "process") -> dict[str, Any]:
    return {f"measured_{figure}_bytes": took, f"predicted_{figure}_bytes": predicted}


def _intervals(runs: Sequence[Any]) -> list[tuple[str, str, float, float, float]]:
    """Name and figure of each measurement, the ends of its interval, and what was measured."""
    found = []
    for run in runs:
        memory = run.case.memory(run.largest)
        for figure, ends, took in (
            ("tensor", memory.tensors, run.tensor_bytes),
            ("process", memory.process, run.process_bytes),
        ):
            found.append((run.name, figure, ends.low, ends.high, took))
        error = run.case.time_error(run.case.step(run.largest), run.largest)
        step_s = run.predicted_step_s()
        most = max(step_s, run.predicted_step_s(is_launched=True)) if run.case.is_varied else step_s
        found.append((run.name, "step", step_s / (1 + error), most * (1 + error), run.step_s))
    return found


@pytest.fixture(scope="module")
def every() -> list[Any]:
    """All measurements, to be predicted by the packaged fit, whatever this machine remembers."""
    (fit,) = (fit for fit in load_fits() if fit.device == "h200")
    return [run.with_fit(fit).traced() for run in planner_fit.runs(RAW, all_lines=True)]


def test_the_held_out_are_those_of_the_hash_and_a_whole_size() -> None:
    chosen = HELD_OUT_FILE.read_text(encoding="utf-8").split()
    assert chosen == held_out()
    assert {name for name in CASES if read_case(name).shape == HELD_OUT_SHAPE} <= set(chosen)
    assert len(chosen) >= len(CASES) / 3


def test_intervals_hold_every_measurement(every: list[Any]) -> None:
    lines = [json.loads(line) for line in RAW.read_text(encoding="utf-8").splitlines()]
    names = [line["case"] for line in lines if "step_s" in line]
    assert [run.name for run in every] == names
    assert set(names) == set(CASES), "a case that was not measured, or a run of none"
    outside = [
        (name, figure, took)
        for name, figure, low, high, took in _intervals(every)
        if not low <= took <= high
    ]
    assert outside == []


def test_the_results_are_the_packaged_fits() -> None:
    results = json.loads((FOLDER / "planner_h200.json").read_text(encoding="utf-8"))["rows"]
    (fit,) = (fit for fit in load_fits() if fit.device == "h200")
    once = [run.with_fit(fit).traced() for run in planner_fit.runs(RAW)]
    judged = {run.name: planner_fit._judged(run)["errors"] for run in once}
    for row in results:
        assert row["errors"] == pytest.approx(judged[row["case"]], abs=2e-4), row["case"]
    held = [row for row in results if row["held_out"]]
    assert {row["case"] for row in held} <= set(held_out())
    for row in held:
        for figure, limit in LIMITS.items():
            assert abs(row["errors"][figure]) <= limit, row["case"]


def test_what_held_out_runs_took_changes_no_constant(every: list[Any]) -> None:
    others = [
        replace(
            run,
            tensor_bytes=3 * run.tensor_bytes,
            process_bytes=3 * run.process_bytes,
            context_bytes=3 * run.context_bytes,
            step_s=3 * run.step_s,
        )
        if run.is_held_out
        else run
        for run in every
    ]
    assert sum(run.is_held_out for run in every) > 10
    start = every[0].case.target.fit
    assert fit_memory(others, start.memory) == fit_memory(every, start.memory)
    one = {"gemm": 1.5}
    assert fit_time(others, start.time, one) == fit_time(every, start.time, one)


@pytest.mark.slow
def test_a_fit_keeps_what_is_kept_and_its_errors_are_those_of_every_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (packaged,) = (fit for fit in load_fits() if fit.device == "h200")
    asked: list[tuple[Any, Any]] = []

    def fitted(_: Sequence[Any], start: Any, prior: Any) -> Any:
        asked.append((start, prior))
        return packaged.time

    monkeypatch.setattr("benchmarks.fitting.fit_time", fitted)
    planner_fit.fit(RAW, writes=False)
    ((start, prior),) = asked
    for name in planner_fit.KEPT:
        assert name not in prior
        assert getattr(start, name) == planner_fit.FIRST_GRID[name]
    assert set(prior) | set(planner_fit.KEPT) == set(planner_fit.FIRST_GRID)
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("\n{\n") :])
    assert found["memory"] == pytest.approx(packaged.memory.model_dump())
    assert found["time"] == pytest.approx(packaged.time.model_dump())


def test_tensors_are_judged_relative_to_what_was_predicted() -> None:
    assert tensor_error([_row(1.0685, 1.0, "tensor"), _row(0.99, 1.0, "tensor")], 1000) == 0.069
    assert tensor_error([_row(0.8, 1.0, "tensor")], 1000) == pytest.approx(0.2)
    assert tensor_error([_row(1.0, 1.0, "tensor")], 1000) == 0.01


@pytest.mark.parametrize(
    "pairs",
    [
        [(2.4e9, 2e9), (20.4e9, 20e9)],  # the same bytes more, whatever the size
        [(2.2e9, 2e9), (22e9, 20e9)],  # the same share
        [(1.7e9, 2e9), (19e9, 20e9), (50e9, 50e9)],
    ],
)
def test_a_processs_errors_hold_every_run_and_no_more(pairs: list[tuple[float, float]]) -> None:
    found = process_errors([_row(*pair) for pair in pairs], "process", 1000)
    room = []
    for took, predicted in pairs:
        low = predicted * (1 - found["process_less"]) - found["process_less_bytes"]
        high = predicted * (1 + found["process_more"]) + found["process_more_bytes"]
        assert low <= took <= high
        room.append((min(took - low, high - took)) / predicted)
    assert min(room) < 0.025  # one per cent at least, and steps of 16 MiB


def test_the_same_bytes_at_every_size_are_no_share() -> None:
    rows = [_row(2.4e9, 2e9), _row(20.4e9, 20e9)]
    found = process_errors(rows, "process", 1000)
    assert found["process_more"] < 0.02 and found["process_more_bytes"] > 3.5e8
    assert found["process_less"] == 0.01 and found["process_less_bytes"] == 0.0


def test_a_steps_errors_are_of_its_kind() -> None:
    def row(kind: str, measured: float, predicted: float, **more: float) -> dict[str, Any]:
        times = {"measured_step_s": measured, "predicted_step_s": predicted}
        return {"kind": kind, "errors": {"step": 0.0}, **times, **more}

    found = time_errors(
        [
            row("error", 1.2, 1.0),
            row("error", 1.0, 1.1),
            row("error_launched", 1.4, 1.0),
            row("error_offloaded", 1.0, 2.0),
            row("error_captured_varied", 3.0, 1.0, launched_step_s=4.0),
        ],
        1000,
    )
    assert found["error"] == pytest.approx(0.2, abs=0.0011)
    assert found["error_launched"] == pytest.approx(0.4, abs=0.0011)
    assert found["error_offloaded"] == pytest.approx(1.0)
    assert found["error_captured_varied"] == found["error"]  # between its two ends, so no further
    assert time_errors([row("error", 1.0, 1.5)], 1000)["error"] == pytest.approx(0.5)


def test_a_case_that_ran_twice_took_the_mean_and_all_lines_are_all(every: list[Any]) -> None:
    lines = [json.loads(line) for line in RAW.read_text(encoding="utf-8").splitlines()]
    measured, _ = planner_fit.read_raw(RAW)
    twice = "360m-qlora-8x1024-packed-eager"
    times = [line["step_s"] for line in lines if line["case"] == twice and "step_s" in line]
    assert len(times) == 2 and measured[twice]["step_s"] == times[-1] != times[0]
    (one,) = (run for run in planner_fit.runs(RAW) if run.name == twice)
    both = [run for run in every if run.name == twice]
    assert one.step_s == pytest.approx(sum(times) / 2)
    assert [run.step_s for run in both] == times
