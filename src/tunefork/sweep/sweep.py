"""`tunefork sweep`: many variants of one recipe, trained together, ranked, and an answer.

Recipe, data and every variant are checked before anything is loaded. What is done stays done: the
same command goes on where it was stopped or killed, and a folder that is finished is only read.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tunefork.errors import RunFolderError, TuneforkError
from tunefork.evaluate.evaluate import check_primary_metric
from tunefork.model.build import check_method
from tunefork.model.fingerprint import identify
from tunefork.model.identity import Identity
from tunefork.model.load import load_skeleton, load_tokenizer
from tunefork.model.onednn import bound_shapes
from tunefork.recipe import Recipe
from tunefork.recipe_file import anchor
from tunefork.registry.claim import Claim, claimed
from tunefork.registry.run import read_record
from tunefork.sweep.assemble import assemble
from tunefork.sweep.bank import open_group
from tunefork.sweep.bench import Bench
from tunefork.sweep.fleet import Fleet, Outcome
from tunefork.sweep.group import Group, Member
from tunefork.sweep.live import LiveView
from tunefork.sweep.members import Shelf, members_of, refuse
from tunefork.sweep.moments import Moments, preemption_file
from tunefork.sweep.report import write_report
from tunefork.sweep.result import RESULT, SweepResult
from tunefork.sweep.room import Room, plan_room
from tunefork.sweep.rungs import FOLDER as RUNGS
from tunefork.sweep.rungs import Rungs
from tunefork.sweep.variants import Variant, variants
from tunefork.trial.check import check_recipe, check_servers
from tunefork.trial.record import check_base
from tunefork.trial.trial import run_trial

REPORT = "report.html"
BASE = "base"


def sweep(
    recipe: Recipe,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    ignore_plan: bool = False,
    make_group: Callable[[Recipe, Sequence[Member]], Group] = open_group,
) -> SweepResult:
    """Train the variants of `recipe.sweep` in the folder `out`, evaluate, rank.

    Writes sweep.json and report.html. Raises BadInputError before any training; TuneforkError where
    no variant came to its end; KeyboardInterrupt on Ctrl-C, each variant that was in training
    having left what it learnt (the same call goes on from there).
    """
    recipe = anchor(recipe, Path.cwd())
    found = variants(recipe)
    bound_shapes(len(found))
    refuse(recipe)
    largest = max(found, key=lambda variant: variant.recipe.lora.rank).recipe
    data = check_recipe(largest, (recipe.method,), say, ignore_plan=True)  # the group has a plan
    check_primary_metric(recipe, data)
    _check_deltas(recipe, found)
    tokenizer = load_tokenizer(recipe.model)
    shelf = Shelf(tokenizer)
    shelf.put(largest, data)
    members = {m.name: m for m in members_of(recipe, found, out.resolve(), shelf)}
    room = plan_room(
        list(members.values()), cap=recipe.sweep.together, say=say, ignore_plan=ignore_plan
    )
    with claimed(out, recipe, Claim(verb="sweep", data_sha256=data.fingerprint())):
        identity = identify(recipe.model)
        _base(recipe, out, say, identity=identity)
        rungs = _rungs(recipe, found, out)
        bench = Bench.of(identity, tokenizer, say)
        outcomes, together = _train(recipe, out, members, bench, rungs, room, make_group)
        with suppress(RunFolderError):  # nothing may have been left to train
            together = max(together, SweepResult.load(out / RESULT).together)
        if any(outcome.status == "interrupted" for outcome in outcomes.values()):
            raise KeyboardInterrupt
        result = assemble(
            recipe,
            out.resolve(),
            found,
            members,
            outcomes,
            rungs=rungs,
            base=out / BASE,
            together=together,
        )
        result.save(out / RESULT)
        write_report(result, out / REPORT)
    if result.chosen is None:
        errors = "\n".join(f"{v.name}: {v.error}" for v in result.variants if v.error)
        raise TuneforkError(f"no variant came to its end:\n{errors}")
    return result


def _check_deltas(recipe: Recipe, found: Sequence[Variant]) -> None:
    """Raise BadInputError where a variant's deltas do not suit the model, or `lora.serve_with`."""
    skeleton = load_skeleton(recipe.model)
    for variant in {variant.recipe.lora: variant for variant in found}.values():
        check_method(skeleton, recipe.method, variant.recipe.lora)
        check_servers(variant.recipe)


def _base(recipe: Recipe, out: Path, say: Callable[[str], None], *, identity: Identity) -> None:
    """Measure the untouched base, unless that was done."""
    record = read_record(out / BASE)
    if record is not None and record.status == "ok":
        check_base(record, identity, out / BASE)
        return
    say("base: evaluating the untouched model")
    run_trial(recipe, None, out / BASE, seed=recipe.train.seed, learning_rate=None, say=say)


def _rungs(recipe: Recipe, found: Sequence[Variant], out: Path) -> Rungs | None:
    halving = recipe.sweep.halving
    if halving is None:
        return None
    by_rank = halving.within == "rank"
    return Rungs(
        out / RUNGS,
        halving.keep,
        {variant.name: variant for variant in found},
        lambda variant: variant.recipe.lora.rank if by_rank else 0,
    )


def _train(
    recipe: Recipe,
    out: Path,
    members: dict[str, Member],
    bench: Bench,
    rungs: Rungs | None,
    room: Room,
    make_group: Callable[[Recipe, Sequence[Member]], Group],
) -> tuple[dict[str, Outcome], int]:
    """How each member ended, and how many trained at one time at most."""
    kind = room.recipe.train.checkpointing
    settled = [replace(member, checkpointing=kind) for member in members.values()]
    view = LiveView({m.name: m.num_steps for m in settled}, every_s=recipe.train.log_every_s)
    with view:
        fleet = Fleet(
            make_group(room.recipe, settled),
            bench,
            view,
            room.has,
            Moments.of(out, recipe),
            preemption_file(recipe),
            rungs,
        )
        outcomes = fleet.run(settled)
    return outcomes, max(fleet.most, 1)
