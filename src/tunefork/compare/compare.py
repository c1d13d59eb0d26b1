"""`tunefork compare`: the same model and data by every method, evaluated alike, and an answer.

What makes it fair: the same examples in the same order and batches; a learning rate searched for
each method with equally many trials on a validation split of the training data; the evaluation
examples untouched until the end. What makes it safe: the recipe, the data and the targets are
checked before anything is trained; each piece runs in a process of its own; a piece that is done
stays done, so the same command goes on where it was stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunefork.compare.assemble import ArmRuns, assemble
from tunefork.compare.comparison import Arm, Comparison
from tunefork.compare.comparison import Data as DataFacts
from tunefork.compare.report import write_report
from tunefork.compare.search import RESULT, SearchResult, grid
from tunefork.compare.worker import Failure, seed_folder, start
from tunefork.data.loader import Data, validation_split
from tunefork.errors import BadInputError, RecipeError, TuneforkError
from tunefork.evaluate.evaluate import check_primary_metric
from tunefork.model.fingerprint import identify
from tunefork.model.identity import Identity
from tunefork.recipe import Method, Recipe
from tunefork.recipe_file import anchor
from tunefork.registry.claim import Claim, claimed
from tunefork.registry.history import remember_comparison
from tunefork.registry.run import RunRecord, read_json, read_record
from tunefork.trial.check import check_recipe
from tunefork.trial.record import check_base

COMPARISON = "comparison.json"
REPORT = "report.html"


def compare(
    recipe: Recipe,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    ignore_plan: bool = False,
) -> Comparison:
    """Compare the recipe's methods in the folder `out`; `say` gets one line a piece of work.

    Writes comparison.json and report.html, also when a method failed. Raises BadInputError before
    any training where the recipe, the data or the model cannot be used, TuneforkError where no
    piece succeeded, KeyboardInterrupt on Ctrl-C (the same call goes on from there).
    """
    recipe = anchor(recipe, Path.cwd())
    data = check(recipe, say, ignore_plan=ignore_plan)
    with claimed(out, recipe, Claim(verb="compare", data_sha256=data.fingerprint())) as lock:
        work = _Work(recipe, out, lock, say, identify(recipe.model))
        arms: dict[Arm, ArmRuns] = {"base": _base(work)}
        for method in recipe.compare.methods:
            arms[method.value] = _method(work, method)
        if not any(runs.folders for runs in arms.values()):
            errors = "\n".join(f"{arm}: {runs.error}" for arm, runs in arms.items())
            raise TuneforkError(f"nothing succeeded:\n{errors}")
        comparison = assemble(recipe, out, arms, _facts(data, arms))
        comparison.save(out / COMPARISON)
        write_report(comparison, out / REPORT)
        remember_comparison(out)
    return comparison


def check(recipe: Recipe, say: Callable[[str], None] = print, *, ignore_plan: bool = False) -> Data:
    """Everything about the recipe that can be found wrong without training; returns its data.

    `say` gets a line a warning. A method that cannot fit in memory is refused unless `ignore_plan`.
    """
    if recipe.train.learning_rate is not None:
        raise RecipeError(
            f"train.learning_rate: {recipe.train.learning_rate:g} is one rate for every method, "
            "which would favour one of them; leave it out and give each method its grid in "
            "compare.learning_rates (tunefork train takes the middle rate of a method's grid)"
        )
    data = check_recipe(recipe, recipe.compare.methods, say, ignore_plan=ignore_plan)
    check_primary_metric(recipe, data)
    if recipe.compare.search_trials > 1:
        validation_split(data.train, recipe.compare.validation_share, recipe.data_seed)
    return data


@dataclass(frozen=True, slots=True)
class _Work:
    """What every piece of one comparison needs to be started."""

    recipe: Recipe
    out: Path
    lock: int
    """Descriptor of the folder's lock."""
    say: Callable[[str], None]
    identity: Identity
    """Of the base as it is now: what was measured on another is not mixed with it."""

    def record(self, folder: Path) -> RunRecord | None:
        """What an earlier call left in `folder`; raises IdentityError if the base has changed."""
        record = read_record(folder)
        if record is not None:
            check_base(record, self.identity, folder)
        return record

    def run(self, arm: str, *task: str) -> Failure | None:
        """Run a piece; a failure is the arm's own, and said."""
        failure = start(self.out, *task, lock=self.lock)
        if failure:
            self.say(f"{arm}: failed: {failure.message}")
        return failure


def _base(work: _Work) -> ArmRuns:
    """Measure the untouched base first: what is bad input here is so for every method."""
    folder = work.out / "base"
    record = work.record(folder)
    if record is not None and record.status == "ok":
        work.say("base: measured before, kept")
        return ArmRuns(folders=[folder])
    work.say("base: evaluating the untouched model")
    failure = start(work.out, "base", lock=work.lock)
    if failure is None:
        return ArmRuns(folders=[folder])
    if failure.is_bad_input:
        raise BadInputError(failure.message)
    work.say(f"base: failed: {failure.message}")
    return ArmRuns(error=failure.message)


def _method(work: _Work, method: Method) -> ArmRuns:
    """Search the learning rate, then train and evaluate once a seed."""
    searched: SearchResult | None = None
    rates = grid(work.recipe, method)
    rate = rates[0]
    if work.recipe.compare.search_trials > 1:
        file = work.out / method / RESULT
        if not file.exists():
            listed = ", ".join(f"{rate:g}" for rate in rates)
            work.say(f"{method}: searching the learning rate among {listed}")
            failure = work.run(f"{method}: learning-rate search", "search", method)
            if failure:
                return ArmRuns(error=f"learning-rate search: {failure.message}")
        searched = read_json(SearchResult, file, "is no search's result; remove it")
        rate = searched.learning_rate
    folders, errors = [], []
    for seed in work.recipe.compare.seeds:
        folder = seed_folder(work.out, method, seed)
        failure = _trained(work, method, folder, seed, rate)
        if failure:
            errors.append(f"seed {seed}: {failure.message}")
        else:
            folders.append(folder)
    return ArmRuns(folders=folders, search=searched, error="\n".join(errors) or None)


def _trained(work: _Work, method: Method, folder: Path, seed: int, rate: float) -> Failure | None:
    """Train and evaluate one seed, as far as that is not done."""
    record = work.record(folder)
    if record is not None and record.status == "ok":
        work.say(f"{method}: seed {seed} trained before, kept")
        return None
    if record is not None and record.status == "trained":
        work.say(f"{method}: seed {seed} trained before, kept; evaluating it")
    else:
        work.say(f"{method}: training with learning rate {rate:g}, seed {seed}")
    return work.run(method, "train", method, str(seed), repr(rate))


def _facts(data: Data, arms: dict[Arm, ArmRuns]) -> DataFacts:
    """What a reader of the comparison needs to know of its data."""
    tokens = sum(len(example.input_ids) for example in data.train)
    supervised = sum(int(example.supervised.sum()) for example in data.train)
    folders = [folder for runs in arms.values() for folder in runs.folders]
    record = read_record(folders[0])
    return DataFacts(
        train_examples=len(data.train),
        eval_examples=len(data.eval),
        labels=None if data.labels is None else len(data.labels),
        majority_share=record.majority_share if record else None,
        supervised_share=supervised / tokens,
        tokens=tokens,
    )
