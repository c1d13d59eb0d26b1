"""A run that cannot fit is refused before anything is loaded; one that ran is remembered."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MambaConfig

from tests.folders import save_model, save_tokenizer
from tunefork.data.example import Encoded
from tunefork.model.device import describe, pick_device
from tunefork.plan import calibrate, gate
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import Target, here
from tunefork.plan.measured import recall
from tunefork.recipe import DataSection, Method, ModelSection, Recipe, TrainSection

EXAMPLES = [Encoded(f"f:{n}", np.arange(40, dtype=np.int32), np.ones(40, bool)) for n in range(30)]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    save_model(tmp_path)
    return Recipe(
        model=ModelSection(id=str(tmp_path)),
        data=DataSection(train="-", max_length=64),
        train=TrainSection(batch_size=4),
    )


def _on_a_machine_of(memory_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target: Target = replace(here(load_catalogue()), memory_bytes=memory_bytes)
    monkeypatch.setattr(gate, "here", lambda *_: target)


def test_what_fits_is_let_through_and_no_larger_pass_looked_for(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would take several times as long as the rest."""
    monkeypatch.setattr("tunefork.plan.method._largest", lambda *_, **__: pytest.fail("searched"))
    said: list[str] = []
    gate.refuse_what_cannot_fit(recipe, tuple(Method), EXAMPLES, said.append)
    assert said == [] and gate.predict(recipe, Method.LORA, EXAMPLES) is not None


def test_what_cannot_fit_is_refused_with_what_would(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_a_machine_of(2**28, monkeypatch)
    with pytest.raises(gate.DoesNotFitError, match=r"(?s)method lora: .*0\.2 GiB.*--ignore-plan"):
        gate.refuse_what_cannot_fit(recipe, (Method.LORA,), EXAMPLES, print)
    with pytest.raises(gate.DoesNotFitError, match=r"leave lora out of compare\.methods"):
        gate.refuse_what_cannot_fit(recipe, tuple(Method), EXAMPLES, print)


def test_what_may_fit_is_warned_of(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = gate.plan_here(recipe, (Method.LORA,), EXAMPLES).methods["lora"].peak_process_bytes
    _on_a_machine_of(round(peak.mid), monkeypatch)
    said: list[str] = []
    gate.refuse_what_cannot_fit(recipe, (Method.LORA,), EXAMPLES, said.append)
    assert len(said) == 1 and said[0].startswith("warning: method lora: is predicted")


def test_a_finished_run_is_remembered(recipe: Recipe, home: Path) -> None:
    prediction = gate.predict(recipe, Method.LORA, EXAMPLES)
    assert prediction is not None

    def learn(num_steps: int) -> None:
        gate.learn(
            prediction,
            device="a CPU",
            case="lora",
            num_steps=num_steps,
            train_s=3.0,
            process_bytes=10**9,
            say=pytest.fail,
        )

    learn(9)
    assert recall(lambda _: True) == []
    learn(12)
    (row,) = recall(lambda device: device == "a CPU")
    assert row.measured_step_s == 0.25 and row.predicted_step_s == prediction.step_s


def test_a_home_that_cannot_be_written_is_said(
    recipe: Recipe, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("TUNEFORK_HOME", str(home / "file"))
    said: list[str] = []
    gate.learn(
        gate.Prediction(1.0, 1.0, 1.0, 1.0, 1.0, "a fit"),
        device="d",
        case="c",
        num_steps=12,
        train_s=1.0,
        process_bytes=1,
        say=said.append,
    )
    assert len(said) == 1 and "could not be kept" in said[0]


def test_corrections_settle_at_the_truth(recipe: Recipe) -> None:
    """A machine twice as slow as predicted: what is remembered are predictions uncorrected."""
    for run in range(4):
        prediction = gate.predict(recipe, Method.LORA, EXAMPLES)
        assert prediction is not None
        gate.learn(
            prediction,
            device=str(describe(pick_device())["name"]),
            case=f"run {run}",
            num_steps=10,
            train_s=10 * 2.0 * prediction.raw_step_s,
            process_bytes=round(prediction.raw_process_bytes),
            say=pytest.fail,
        )
    trust = here(load_catalogue()).trust
    assert trust.time_factor.ratio == pytest.approx(2.0)
    assert trust.time >= here(load_catalogue(), is_corrected=False).fit.time.error


@pytest.mark.parametrize("kind", [Gemma2Config, MambaConfig])
def test_what_cannot_be_planned_can_be_trained(kind: Any, tmp_path: Path, recipe: Recipe) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
    config = kind(vocab_size=save_tokenizer(tmp_path), **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    said: list[str] = []
    gate.refuse_what_cannot_fit(recipe, (Method.FULL,), EXAMPLES, said.append)
    assert all("cannot be traced" in line for line in said)
    gate.predict(recipe, Method.FULL, EXAMPLES)


def test_a_broken_catalogue_stops_no_run(recipe: Recipe, home: Path) -> None:
    (home / "catalogue.yaml").write_text("gpus: 5")
    (home / "measurements.jsonl").write_bytes(b"\xff\xfe")
    assert gate.predict(recipe, Method.LORA, EXAMPLES) is None
    assert recall(lambda _: True) == []


def test_a_gpu_is_calibrated_by_the_engine_that_trains_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate, "pick_dtype", lambda *_: torch.bfloat16)
    for kind in ("cpu", "cuda"):
        made = calibrate.build_on(torch.device(kind), Method.LORA)
        assert made.device == kind and made.is_compiled == (kind == "cuda")
