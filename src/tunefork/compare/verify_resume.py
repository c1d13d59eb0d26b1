"""Does a stopped run go on with the same bits, here? Tried with the recipe's own model and data.

2N steps in one process, against N steps, a stop, and N more in another process: what each leaves is
a checkpoint, and their bits are compared. A GPU passes with `train.deterministic`; without it, it
may or may not, and a difference shows by how much.

    python -m tunefork.compare.verify_resume FOLDER RUN STEPS
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunefork.data.loader import load_data
from tunefork.errors import RecipeError, RunFolderError, TuneforkError
from tunefork.evaluate.evaluate import pad_id
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.fingerprint import identify
from tunefork.model.load import load_tokenizer
from tunefork.plan.auto import settle
from tunefork.recipe import Recipe
from tunefork.recipe_file import dump, load
from tunefork.registry.run import RECIPE, write_atomically
from tunefork.train import checkpoint
from tunefork.train.checkpoints import Policy
from tunefork.train.method import load_for_training, open_checkpoints, plan_steps, train_method
from tunefork.train.state import OPTIMIZER, RANDOM, WEIGHTS, Difference, digest, first_difference

_RUNS = {"whole": (2,), "stopped": (1, 2)}
"""Name -> after how many times N steps each of its processes ends."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What two runs of one recipe left."""

    method: str
    steps: int
    """That each took in all."""
    hashes: dict[str, tuple[str, str]]
    """weights, optimizer, random -> SHA-256 of the run that was not stopped, and of the other."""
    difference: Difference | None


def verify_resume(
    recipe: Recipe, folder: Path, *, steps: int, say: Callable[[str], None]
) -> Verdict:
    """Run both in `folder`, which must be new or empty, and compare.

    Raises BadInputError where the recipe has fewer steps, TuneforkError where a run fails.
    """
    data = load_data(recipe, load_tokenizer(recipe.model))
    recipe = settle(recipe, recipe.method, data.train).recipe
    available = len(plan_steps(recipe, len(data.train), seed=recipe.train.seed))
    if available < 2 * steps:
        raise RecipeError(
            f"--steps: {steps} before and {steps} after the stop, but the recipe's data make only "
            f"{available} steps; give {available // 2} or less"
            if available > 1
            else "the recipe's data make one step only, and none to stop after"
        )
    if folder.exists() and any(folder.iterdir()):
        raise RunFolderError(f"{folder}: is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECIPE, dump(recipe))
    for run, parts in _RUNS.items():
        for part in parts:
            say(f"{run}: to step {part * steps}")
            command = [sys.executable, "-m", __name__, str(folder), run, str(part * steps)]
            if subprocess.run(command).returncode:
                raise TuneforkError(f"{run}: failed before step {part * steps}; see above")
    ends = []
    for run in _RUNS:
        at = folder / run / checkpoint.folder_name(2 * steps)
        ends.append(checkpoint.read(at, checkpoint.read_facts(at)).tensors)
    return Verdict(
        method=str(recipe.method),
        steps=2 * steps,
        hashes={
            part.rstrip("/"): (digest(ends[0], part), digest(ends[1], part))
            for part in (WEIGHTS, OPTIMIZER, RANDOM)
        },
        difference=first_difference(*ends),
    )


def _run(folder: Path, run: str, stop_after: int) -> None:
    """One process: from the newest checkpoint of `run`, if any, to step `stop_after`."""
    recipe = load(folder / RECIPE)
    method, seed = recipe.method, recipe.train.seed
    tokenizer = load_tokenizer(recipe.model)
    examples = load_data(recipe, tokenizer).train
    device = pick_device()
    rate = recipe.learning_rate(method)
    checkpoints = open_checkpoints(
        folder / run,
        examples,
        recipe,
        method,
        base_sha256=identify(recipe.model).of_model(),
        learning_rate=rate,
        seed=seed,
        device=device,
        say=lambda line: print(line, file=sys.stderr),
    )
    checkpoints.policy = Policy(keep=1)
    dtype = pick_dtype(recipe.train.precision, device)
    train_method(
        load_for_training(recipe, method, dtype=dtype, device=device, seed=seed, examples=examples),
        examples,
        recipe,
        method,
        learning_rate=rate,
        seed=seed,
        pad_id=pad_id(tokenizer),
        on_step=lambda record: None,
        checkpoints=checkpoints,
        start=checkpoints.newest(),
        stop_after=stop_after,
    )


if __name__ == "__main__":
    try:
        _run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except TuneforkError as error:
        sys.exit(f"error: {error}")
