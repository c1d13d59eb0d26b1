"""Two runs in processes of their own: alike where nothing differs, and what differs is shown."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tunefork.compare.verify_resume as verify
from tunefork.compare.verify_resume import verify_resume
from tunefork.errors import RecipeError, RunFolderError
from tunefork.recipe import Recipe
from tunefork.train import checkpoint
from tunefork.train.state import Difference, State, first_difference

Make = Callable[..., Recipe]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_goes_on_with_the_same_bits(make_recipe: Make, tmp_path: Path, method: str) -> None:
    recipe = make_recipe(method=method, lora={"dropout": 0.1}, train={"max_steps": None})
    verdict = verify_resume(recipe, tmp_path / "v", steps=1, say=lambda line: None)
    assert verdict.difference is None and verdict.steps == 2
    assert all(whole == stopped for whole, stopped in verdict.hashes.values())


def test_a_difference_is_found_and_placed(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process here, and with one value of the stopped run's state changed."""
    calls: list[int] = []

    class Done:
        returncode = 0

    def run(command: list[str]) -> Done:
        folder, name, stop = Path(command[3]), command[4], int(command[5])
        verify._run(folder, name, stop)
        at = folder / name / checkpoint.folder_name(stop)
        if name == "stopped" and len(calls) == 1:
            facts = checkpoint.read_facts(at)
            state = checkpoint.read(at, facts)
            weight = next(n for n in state.tensors if n.endswith("q_proj.lora_b"))
            state.tensors[weight][3, 2] += 1e-3
            shutil.rmtree(at)
            changed = State(state.progress, state.tensors)
            checkpoint.write(
                changed, folder / name, setting=facts.setting, environment=facts.environment
            )
        calls.append(stop)
        return Done()

    monkeypatch.setattr(subprocess, "run", run)
    said: list[str] = []
    verdict = verify_resume(make_recipe(), tmp_path / "v", steps=1, say=said.append)
    assert calls == [2, 1, 2]
    assert said == ["whole: to step 2", "stopped: to step 1", "stopped: to step 2"]
    assert verdict.difference is not None and verdict.difference.index is not None
    assert verdict.hashes["weights"][0] != verdict.hashes["weights"][1]
    assert verdict.hashes["random"][0] == verdict.hashes["random"][1]


def test_more_steps_than_there_are_and_a_full_folder_are_refused(
    make_recipe: Make, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"--steps: 2 before and 2 .* only 3 steps; give 1"):
        verify_resume(make_recipe(), tmp_path / "v", steps=2, say=print)
    with pytest.raises(RunFolderError, match="is not empty"):
        verify_resume(make_recipe(), tmp_path, steps=1, say=print)


def test_the_first_difference_is_of_bits() -> None:
    left = {"a": torch.tensor([1.0, float("nan")]), "b": torch.zeros(2, 3)}
    assert first_difference(left, {n: v.clone() for n, v in left.items()}) is None
    right = {"a": left["a"].clone(), "b": torch.zeros(2, 3)}
    right["b"][1, 2] = -0.0
    assert first_difference(left, right) == Difference("b", (1, 2), "0.0", "-0.0", 1)
    del right["a"]
    assert first_difference(left, right) == Difference(
        "a", None, "(2,) in torch.float32", "absent", 2
    )
