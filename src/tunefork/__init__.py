"""LoRA, QLoRA or full fine-tuning? Train all three, compare them fairly, get the answer.

The Python API mirrors the command line's verbs; what it needs is imported when it is called.

    import tunefork

    recipe = tunefork.load_recipe("recipe.yaml")
    comparison = tunefork.compare(recipe, "runs/mine")
    print(comparison.verdict.text)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tunefork.installed import OWN_VERSION

if TYPE_CHECKING:
    from tunefork.advise.advice import Advice
    from tunefork.compare.comparison import Comparison
    from tunefork.plan.schema import Plan
    from tunefork.recipe import Recipe
    from tunefork.registry.opening import Opened
    from tunefork.registry.run import RunRecord
    from tunefork.sweep.many_result import ManyResult
    from tunefork.sweep.result import SweepResult

__version__ = OWN_VERSION

__all__ = [
    "advise",
    "check_data",
    "compare",
    "evaluate",
    "load_recipe",
    "open_model",
    "plan",
    "runs",
    "sweep",
    "train",
    "train_many",
]


def load_recipe(file: str | Path, *overrides: str) -> Recipe:
    """Read a recipe file; `overrides` such as "lora.rank=32" beat it. Raises RecipeError."""
    from tunefork.recipe_file import load

    return load(Path(file), overrides)


def advise(situation: str | Path | None = None, **facts: Any) -> Advice:
    """Which method suits a situation: a file, facts by its keys (`task="chat"`), or both.

    Facts beat the file; your comparisons (below `runs/`, or anywhere that the store knows) outrank
    rules of thumb. Raises BadInputError for facts that are wrong or contradict each other.
    """
    from tunefork.advise.advise import advise as run
    from tunefork.advise.experience import places
    from tunefork.advise.resolve import resolve
    from tunefork.advise.situation import load_situation
    from tunefork.plan.catalogue import load_catalogue

    file = None if situation is None else Path(situation)
    return run(resolve(load_situation(file, facts), load_catalogue(), places()))


def plan(recipe: Recipe | str | Path, gpus: Sequence[str] = (), **work: int) -> Plan:
    """What a recipe takes by each method, on `gpus` (catalogue ids) or else on this machine.

    `examples=` and `tokens=` stand for data that is not at hand. Raises BadInputError.
    """
    from tunefork.plan.batches import work_of
    from tunefork.plan.catalogue import load_catalogue
    from tunefork.plan.device import here, target_of
    from tunefork.plan.plan import plan_recipe
    from tunefork.recipe import Method

    resolved, known = _recipe(recipe), load_catalogue()
    price = resolved.compare.usd_per_hour
    target = target_of(known.machine(gpus)) if gpus else here(known, price)
    told = work_of(resolved, **work)
    return plan_recipe(resolved, target=target, methods=tuple(Method), work=told)


def compare(
    recipe: Recipe | str | Path, out: str | Path, *, ignore_plan: bool = False
) -> Comparison:
    """Train by every method in `recipe.compare`, evaluate, judge; results land in `out`.

    Each method runs in a process of its own. What cannot fit in memory is refused unless
    `ignore_plan`. Raises TuneforkError and its subclasses.
    """
    from tunefork.compare.compare import compare as run

    return run(_recipe(recipe), Path(out), ignore_plan=ignore_plan)


def train(recipe: Recipe | str | Path, out: str | Path, *, ignore_plan: bool = False) -> RunRecord:
    """Train by `recipe.method` in the run folder `out`, and evaluate. Raises TuneforkError.

    A run that cannot fit in memory is refused unless `ignore_plan`.
    """
    from tunefork.trial.trial import train_run

    return train_run(_recipe(recipe), Path(out), ignore_plan=ignore_plan)


def sweep(
    recipe: Recipe | str | Path, out: str | Path, *, ignore_plan: bool = False
) -> SweepResult:
    """Train the variants of `recipe.sweep` together, evaluate and rank them; results land in `out`.

    Raises TuneforkError and its subclasses.
    """
    from tunefork.sweep.sweep import sweep as run

    return run(_recipe(recipe), Path(out), ignore_plan=ignore_plan)


def train_many(
    file: str | Path, out: str | Path, *, publish: str | None = None, together: int | None = None
) -> ManyResult:
    """Train the adapters that `file` lists (or the recipes of a folder) together, each on its own
    data, in run folders below `out`.

    Those that name no name are published as `publish`/NAME, where that is given. What is one
    adapter's own fault is in its result. Raises TuneforkError.
    """
    from tunefork.sweep.many import train_many as run
    from tunefork.sweep.many_file import load_many

    return run(load_many(Path(file), publish), Path(out), together=together)


def evaluate(
    target: str | Path, recipe: Recipe | str | Path
) -> dict[str, tuple[float, float, float]]:
    """Each metric's value, low and high end for a run, adapter or model. Raises TuneforkError."""
    from tunefork.trial.trial import evaluate_target

    return evaluate_target(str(target), _recipe(recipe))


def check_data(recipe: Recipe | str | Path) -> dict[str, Any]:
    """What `tunefork data check --json` prints; `errors` says what would stop a run.

    Raises DataError only where a file cannot be read at all or the recipe does not suit it.
    """
    from tunefork.data.check import check
    from tunefork.model.load import load_tokenizer

    resolved = _recipe(recipe)
    return check(resolved, load_tokenizer(resolved.model)).as_dict()


def open_model(target: str | Path) -> Opened:
    """The model and tokenizer of a run, an adapter folder or a model id, ready for inference."""
    from tunefork.registry.opening import open_model as run

    return run(str(target))


def runs(folder: str | Path = "runs") -> list[tuple[Path, RunRecord]]:
    """Finished runs below `folder`."""
    from tunefork.registry.run import find_runs

    return find_runs(Path(folder))


def _recipe(recipe: Recipe | str | Path) -> Recipe:
    return load_recipe(recipe) if isinstance(recipe, str | Path) else recipe


def _make_callable(package: ModuleType, verb: Callable[..., Any]) -> ModuleType:
    """`package` itself, which may now be called.

    Six verbs have a package of their name, and Python binds a package to its name here when it is
    first imported: without this `tunefork.train(...)` would work once.
    """

    class Verb(ModuleType):
        __doc__ = verb.__doc__

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return verb(*arguments, **options)

    package.__class__ = Verb
    return package


for _verb in (advise, plan, compare, sweep, train, evaluate):
    _package = import_module(f"tunefork.{_verb.__name__}")
    globals()[_verb.__name__] = _make_callable(_package, _verb)
