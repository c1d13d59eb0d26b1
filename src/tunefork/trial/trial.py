"""One run of one method, from recipe to artefact and evaluation; or of the base, untrained.

`tunefork train` is one trial; `tunefork compare` is a base trial and one for each method and seed.
run.json is written once the artefact is saved, and again once it is evaluated: stopped in between,
by Ctrl-C or an error, the same call goes on at the evaluation. Stopped or killed while it trains,
the same call goes on from the newest checkpoint.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tunefork.data.example import Encoded
from tunefork.data.loader import load_data
from tunefork.evaluate.evaluate import (
    evaluate,
    pad_id,
    plan_evaluation,
)
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.fingerprint import identify
from tunefork.model.load import (
    load_model,
    load_tokenizer,
)
from tunefork.plan.auto import settle
from tunefork.plan.gate import predict
from tunefork.recipe import Method, Recipe
from tunefork.recipe_file import anchor
from tunefork.registry.claim import Claim, claimed
from tunefork.registry.opening import open_model
from tunefork.registry.run import (
    RunRecord,
    read_record,
)
from tunefork.train.checkpoints import FOLDER as CHECKPOINTS
from tunefork.train.out_of_memory import Remedies, phase
from tunefork.train.precision import settle_precision
from tunefork.train.precision_choice import PrecisionChoice
from tunefork.trial.artifact import save
from tunefork.trial.check import check_recipe, check_tokens
from tunefork.trial.following import Following, following
from tunefork.trial.record import (
    begin_record,
    check_base,
    finish,
    metric_intervals,
    with_prediction,
)
from tunefork.trial.training import failure_recorded, held_back, train


def train_run(
    recipe: Recipe,
    folder: Path,
    *,
    say: Callable[[str], None] = print,
    ignore_plan: bool = False,
) -> RunRecord:
    """`tunefork train`: the recipe's method in a run folder of its own; `say` gets warnings.

    A run that cannot fit in memory is refused unless `ignore_plan`.

    Ctrl-C ends training after the step at hand and saves what was learnt; the same call goes on
    from there. Raises BadInputError before any training; RunFolderError for a folder with an
    interrupted run whose checkpoints are gone, to overwrite none.
    """
    recipe = anchor(recipe, Path.cwd())
    method = recipe.method
    data = check_recipe(recipe, (method,), say, ignore_plan=ignore_plan)
    with claimed(folder, recipe, Claim(verb="train", data_sha256=data.fingerprint())):
        done = read_record(folder)
        if done is not None and done.status == "ok":
            check_base(done, identify(recipe.model), folder)
            return done
        rate = recipe.learning_rate(method)
        return run_trial(
            recipe, method, folder, seed=recipe.train.seed, learning_rate=rate, say=say
        )


def run_trial(
    recipe: Recipe,
    method: Method | None,
    folder: Path,
    *,
    seed: int,
    learning_rate: float | None,
    keep_interrupted: bool = True,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> RunRecord:
    """Train `method` on all training examples (None: leave the base as it is), save, evaluate.

    What lies trained in `folder` is only evaluated, what lies half trained is gone on with; either
    is refused where the base has changed since. An interrupted run is saved but not evaluated;
    unless `keep_interrupted`, it raises KeyboardInterrupt at once, its checkpoint written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with following(folder, say) as told:
        record = _run(
            recipe,
            method,
            folder,
            told,
            seed=seed,
            learning_rate=learning_rate,
            keep_interrupted=keep_interrupted,
        )
        told.log.state("interrupted" if record.status == "interrupted" else "finished")
        return record


def _run(
    recipe: Recipe,
    method: Method | None,
    folder: Path,
    told: Following,
    *,
    seed: int,
    learning_rate: float | None,
    keep_interrupted: bool,
) -> RunRecord:
    identity = identify(recipe.model)  # before training: a base that cannot be read shows now
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer, is_checked=True)
    record = read_record(folder)
    if record is not None and record.status == "trained":
        check_base(record, identity, folder)
        model = open_model(str(folder), precision=recipe.train.precision).model
    elif method is None:
        dtype = pick_dtype(recipe.train.precision, pick_device())
        model = load_model(recipe.model, dtype=dtype, device=pick_device())
        record = begin_record(recipe, None, identity, seed=seed)
    else:
        assert learning_rate is not None
        examples = held_back(data, recipe)[0]
        recipe, precision = _settle(
            recipe,
            method,
            examples,
            pad_id(tokenizer),
            folder,
            told,
            seed=seed,
        )
        prediction = predict(recipe, method, examples)
        with failure_recorded(
            recipe, method, identity, folder, seed=seed, learning_rate=learning_rate
        ):
            model, result = train(
                recipe,
                method,
                identity,
                data,
                tokenizer,
                folder,
                told,
                seed=seed,
                learning_rate=learning_rate,
            )
        if result.status == "interrupted" and not keep_interrupted:
            raise KeyboardInterrupt
        record = begin_record(
            recipe,
            method,
            identity,
            seed=seed,
            learning_rate=learning_rate,
            result=result,
            precision=precision,
        )
        if prediction is not None:
            record = with_prediction(record, prediction, result)
        told.log.state("saving")
        with phase("save", Remedies.of(recipe, method)):
            record = save(model, tokenizer, recipe, record, folder, data)
        if record.status == "interrupted":
            return record
        if recipe.train.checkpoints_when_done == "remove":
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        if result.is_asked_to_stop:  # during the last step: the same call goes on here
            raise KeyboardInterrupt
    told.log.state("evaluating")
    if method is not None:
        told.say(f"evaluating on {len(data.eval)} examples")
    with phase("evaluation", None if method is None else Remedies.of(recipe, method)):
        evaluation = evaluate(model, tokenizer, data, recipe)
    return finish(evaluation, recipe, record, folder)


def _settle(
    recipe: Recipe,
    method: Method,
    examples: Sequence[Encoded],
    pad: int,
    folder: Path,
    told: Following,
    *,
    seed: int,
) -> tuple[Recipe, PrecisionChoice | None]:
    """The recipe with what it left to the program (`auto`) settled, in the run's precision first:
    what fits depends on it."""
    chosen = settle_precision(
        recipe,
        method,
        examples,
        seed=seed,
        pad_id=pad,
        device=pick_device(),
        folder=folder,
        checkpoints=folder / CHECKPOINTS,
    )
    told.precision_settled(chosen.choice)
    settled = settle(chosen.recipe, method, examples, folder / CHECKPOINTS)
    told.settled = settled.why
    return settled.recipe, chosen.choice


def evaluate_target(
    target: str, recipe: Recipe, *, say: Callable[[str], None] = print
) -> dict[str, tuple[float, float, float]]:
    """Metrics (value, low, high) of a run, adapter or model on the recipe's evaluation examples."""
    opened = open_model(target, precision=recipe.train.precision, say=say)
    data = load_data(recipe, opened.tokenizer)
    plan = plan_evaluation(recipe, data, opened.tokenizer)
    check_tokens(opened.model, recipe, data, plan, opened.tokenizer, say)
    return metric_intervals(evaluate(opened.model, opened.tokenizer, data, recipe), recipe)
