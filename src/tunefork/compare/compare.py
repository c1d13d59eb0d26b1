"""`tunefork compare`: the same model and data by every method, evaluated alike, and an answer.

What makes it fair: the same examples in the same order and batches; a learning rate searched for
each method with equally many trials on a validation split of the training data; the evaluation
examples untouched until the end. What makes it safe: the recipe, the data and the targets are
checked before anything is trained; each piece runs in a process of its own; a piece that is done
stays done, so the same command goes on where it was stopped.
"""

from collections.abc import Callable
from pathlib import Path

from tunefork.compare.assemble import ArmRuns, assemble, primary_metric
from tunefork.compare.comparison import Arm, Comparison
from tunefork.compare.comparison import Data as DataFacts
from tunefork.compare.report import write_report
from tunefork.compare.search import RESULT, SearchResult, grid
from tunefork.compare.worker import Failure, seed_folder, start
from tunefork.data.loader import Data, load_data
from tunefork.errors import BadInputError, RecipeError, RunFolderError, TuneforkError
from tunefork.evaluate.evaluate import check_metrics
from tunefork.evaluate.statistics import METRICS
from tunefork.model.build import check_lora
from tunefork.model.load import load_skeleton, load_tokenizer
from tunefork.recipe import Method, Recipe, anchor
from tunefork.registry.run import claim, read_record, write_atomically

DATA = "data.sha256"
COMPARISON = "comparison.json"
REPORT = "report.html"


def compare(recipe: Recipe, out: Path, *, say: Callable[[str], None] = print) -> Comparison:
    """Compare the recipe's methods in the folder `out`; `say` gets one line a piece of work.

    Writes comparison.json and report.html, also when a method failed. Raises BadInputError before
    any training where the recipe, the data or the model cannot be used, TuneforkError where no
    piece succeeded, KeyboardInterrupt on Ctrl-C (the same call goes on from there).
    """
    recipe = anchor(recipe, Path.cwd())
    data = check(recipe)
    claim(out, recipe)
    _claim_data(out, data)
    arms: dict[Arm, ArmRuns] = {"base": _base(out, say)}
    for method in recipe.compare.methods:
        arms[method.value] = _method(recipe, method, out, say)
    if not any(runs.folders for runs in arms.values()):
        errors = "\n".join(f"{arm}: {runs.error}" for arm, runs in arms.items())
        raise TuneforkError(f"nothing succeeded:\n{errors}")
    comparison = assemble(recipe, out, arms, _facts(data, arms))
    comparison.save(out / COMPARISON)
    write_report(comparison, out / REPORT)
    return comparison


def check(recipe: Recipe) -> Data:
    """Everything about the recipe that can be found wrong without training; returns its data."""
    skeleton = load_skeleton(recipe.model)
    if any(method is not Method.FULL for method in recipe.compare.methods):
        check_lora(skeleton, recipe.lora)
    data = load_data(recipe, load_tokenizer(recipe.model))
    metrics = check_metrics(recipe, data)
    primary = primary_metric(recipe, data.labels is not None)
    if primary not in metrics:
        raise RecipeError(
            f"compare.primary_metric: {primary} is not measured; evaluate.metrics has "
            f"{', '.join(metrics)} of {', '.join(METRICS)}"
        )
    return data


def _claim_data(out: Path, data: Data) -> None:
    """Raise RunFolderError where the data is no longer what the comparison in `out` began with."""
    file, digest = out / DATA, data.fingerprint()
    if not file.exists():
        write_atomically(file, digest + "\n")
    elif file.read_text(encoding="utf-8").strip() != digest:
        raise RunFolderError(
            f"{out}: data.train, data.eval or the tokenizer has changed since this comparison "
            "began, and what is done could not be compared with what is not; give another folder "
            "with --out, or remove this one"
        )


def _base(out: Path, say: Callable[[str], None]) -> ArmRuns:
    folder = out / "base"
    if _is_done(folder):
        say("base: measured before, kept")
        return ArmRuns(folders=[folder])
    say("base: evaluating the untouched model")
    failure = _start(out, "base")
    if failure:
        return ArmRuns(error=failure.message)
    return ArmRuns(folders=[folder])


def _method(recipe: Recipe, method: Method, out: Path, say: Callable[[str], None]) -> ArmRuns:
    """Search the learning rate, then train and evaluate once a seed."""
    searched: SearchResult | None = None
    rate = grid(recipe, method)[0]
    if recipe.compare.search_trials > 1:
        file = out / method / RESULT
        if not file.exists():
            rates = ", ".join(f"{rate:g}" for rate in grid(recipe, method))
            say(f"{method}: searching the learning rate among {rates}")
            failure = _start(out, "search", method)
            if failure:
                return ArmRuns(error=f"learning-rate search: {failure.message}")
        searched = SearchResult.model_validate_json(file.read_text(encoding="utf-8"))
        rate = searched.learning_rate
    folders, errors = [], []
    for seed in recipe.compare.seeds:
        folder = seed_folder(out, method, seed)
        if _is_done(folder):
            say(f"{method}: seed {seed} trained before, kept")
        else:
            say(f"{method}: training with learning rate {rate:g}, seed {seed}")
            failure = _start(out, "train", method, str(seed), repr(rate))
            if failure:
                say(f"{method}: failed: {failure.message}")
                errors.append(f"seed {seed}: {failure.message}")
                continue
        folders.append(folder)
    return ArmRuns(folders=folders, search=searched, error="\n".join(errors) or None)


def _start(out: Path, *task: str) -> Failure | None:
    """Run a piece; bad input ends the comparison, any other failure is the piece's own."""
    failure = start(out, *task)
    if failure and failure.is_bad_input:
        raise BadInputError(failure.message)
    return failure


def _is_done(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.status == "ok"


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
