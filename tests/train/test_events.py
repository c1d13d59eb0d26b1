"""Events: readable while a run goes on, numbered through stops, and never a row's text."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from tunefork.train.events import (
    EVENTS,
    Resumed,
    SettingChanged,
    StepDone,
    Warned,
    event_log,
    read_events,
    read_steps,
)


def step(number: int, loss: float = 2.0) -> StepDone:
    return StepDone(
        step=number,
        num_steps=9,
        tokens=10 * number,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens_per_s=5.0,
        memory_bytes=1,
    )


def test_every_line_can_be_read_when_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / EVENTS
    with event_log(tmp_path) as log:
        heard: list[int] = []
        log.listeners.append(lambda line: heard.append(line.seq))
        log.state("preparing")
        assert [line.seq for line in read_events(file)] == [1]
        log.write(step(1))
        log.write(Warned(code="loss_spike", message="high", step=1))
        assert [json.loads(text)["event"] for text in file.read_text().splitlines()] == [
            "state",
            "step",
            "warning",
        ]
        assert heard == [1, 2, 3]


def test_a_line_cut_by_a_kill_is_passed_over_and_numbers_go_on(tmp_path: Path) -> None:
    file = tmp_path / EVENTS
    with event_log(tmp_path) as log:
        log.write(step(1))
        log.write(step(2))
    file.write_text(file.read_text()[:-20])
    with event_log(tmp_path) as log:
        log.write(step(2, loss=1.0))
    assert [line.seq for line in read_events(file)] == [1, 2]
    assert [done.loss for done in read_steps(file)] == [2.0, 1.0]
    times = [line.time for line in read_events(file)]
    assert times == sorted(times)


def test_steps_that_were_rolled_back_are_gone(tmp_path: Path) -> None:
    with event_log(tmp_path) as log:
        for number in (1, 2, 3, 4):
            log.write(step(number))
        log.write(Resumed(step=2, checkpoint="checkpoints/2", why="loss spike"))
        log.write(step(3, loss=1.5))
    assert [(s.step, s.loss) for s in read_steps(tmp_path / EVENTS)] == [(1, 2), (2, 2), (3, 1.5)]


def test_a_newer_versions_lines_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text(
        '{"seq": 1, "time": "t", "event": "novelty"}\nnot json\n[]\n'
        '{"seq": 2, "time": "t", "event": "state", "state": "training", "more": 1}\n'
    )
    assert [line.seq for line in read_events(tmp_path / EVENTS)] == [2]


def test_an_event_has_no_place_for_text_in_its_figures() -> None:
    with pytest.raises(ValidationError):
        SettingChanged(step=1, field="x", before="a row", after=2, why="")  # type: ignore[arg-type]
