"""`tunefork train-many`: an adapter for each of many customers, from one pass over one base.

Each entry has its own data, lengths and hyper-parameters, finishes on its own, is published on its
own, and fails on its own: what is wrong with one is reported, and the others train on. The same
command goes on where it was stopped, trains what was added to the file since, and keeps what is
done.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tunefork.errors import BadInputError, TuneforkError
from tunefork.installed import OWN_VERSION
from tunefork.model.fingerprint import identify
from tunefork.model.load import load_skeleton, load_tokenizer
from tunefork.model.onednn import bound_shapes
from tunefork.page.estimate import Estimate
from tunefork.recipe import Recipe
from tunefork.registry.claim import held
from tunefork.registry.provenance import now
from tunefork.registry.run import write_atomically
from tunefork.registry.store import Store
from tunefork.sweep.bank import open_group
from tunefork.sweep.bench import Bench
from tunefork.sweep.entries import Entry
from tunefork.sweep.fleet import Fleet, Outcome
from tunefork.sweep.group import Group, Member
from tunefork.sweep.live import LiveView
from tunefork.sweep.many_file import save_entries
from tunefork.sweep.many_result import RESULT, EntryResult, ManyResult
from tunefork.sweep.members import alone, refuse
from tunefork.sweep.moments import Moments, preemption_file
from tunefork.sweep.room import plan_room
from tunefork.trial.check import check_recipe

ENTRIES = "entries.json"
"""What was asked for, resolved: `--resume` goes on from it."""


def train_many(
    entries: Sequence[Entry],
    out: Path,
    *,
    together: int | None = None,
    ignore_plan: bool = False,
    say: Callable[[str], None] = print,
    make_group: Callable[[Recipe, Sequence[Member]], Group] = open_group,
) -> ManyResult:
    """Train the entries' adapters in run folders below `out`; publish those that name a name.

    At most `together` train at one time; None: as many as fit in memory. Never raises for what is
    one entry's own fault: its result says it. Raises BadInputError where all of them are wrong
    before training, or the base is; KeyboardInterrupt on Ctrl-C, each adapter in training having
    left what it learnt.
    """
    first, out = entries[0].recipe, out.resolve()
    bound_shapes(len(entries))
    with held(out, "train-many"):
        save_entries(entries, out / ENTRIES)
        ledger = _Ledger(out, entries, say)
        identity, tokenizer = identify(first.model), load_tokenizer(first.model)
        members = ledger.members(load_skeleton(first.model), tokenizer)
        room = plan_room(members, cap=together, say=say, ignore_plan=ignore_plan)
        kind = room.recipe.train.checkpointing
        members = [replace(member, checkpointing=kind) for member in members]
        bench = Bench.of(identity, tokenizer, say)
        view = LiveView({m.name: m.num_steps for m in members}, every_s=first.train.log_every_s)
        with view:
            fleet = Fleet(
                make_group(room.recipe, members),
                bench,
                view,
                room.has,
                Moments.of(out, first),
                preemption_file(first),
                on_done=ledger.ended,
            )
            outcomes = fleet.run(members)
        if any(outcome.status == "interrupted" for outcome in outcomes.values()):
            raise KeyboardInterrupt
        return ledger.result()


class _Ledger:
    """Who ended how: on the disk as soon as it is known."""

    def __init__(self, out: Path, entries: Sequence[Entry], say: Callable[[str], None]) -> None:
        self.out, self.say = out, say
        self.entries = {entry.name: entry for entry in entries}
        file = out / RESULT
        before = ManyResult.load(file).entries if file.is_file() else ()
        # What is done stays said, also where this call is killed before it has looked.
        self.results = {e.name: e for e in before if e.status == "ok" and e.name in self.entries}

    def members(self, skeleton: PreTrainedModel, tokenizer: Any) -> list[Member]:
        """Of the entries that can be trained; the others have failed. The base is all entries'.

        Raises BadInputError, with every entry's fault, where none can be.
        """
        found = []
        for entry in self.entries.values():
            try:
                refuse(entry.recipe)
                data = check_recipe(
                    entry.recipe,
                    (entry.recipe.method,),
                    self._say_of(entry),
                    ignore_plan=True,  # the group is planned, in room.py
                    skeleton=skeleton,
                    tokenizer=tokenizer,
                )
                found.append(alone(entry.name, entry.recipe, self.out / entry.name, data))
            except TuneforkError as error:
                self._record(entry, Outcome("failed", None, str(error)))
        if not found:
            errors = [f"{e.where} ({e.name}): {e.error}" for e in self.results.values()]
            raise BadInputError("no adapter can be trained:\n" + "\n".join(errors))
        return found

    def ended(self, member: Member, outcome: Outcome) -> None:
        """A member ended: publish it, and say it on the disk."""
        self._record(self.entries[member.name], outcome)

    def result(self) -> ManyResult:
        """Of all that have ended."""
        return ManyResult(
            tunefork_version=OWN_VERSION,
            created=now(),
            entries=tuple(self.results[name] for name in self.entries if name in self.results),
        )

    def _record(self, entry: Entry, outcome: Outcome) -> None:
        record, error, published = outcome.record, outcome.error, None
        if outcome.status == "ok" and entry.publish is not None:
            try:
                published = self._published(entry) or self._publish(entry)
            except (TuneforkError, OSError) as fault:
                error = f"trained, but not published: {fault}"
        if error is not None:
            self.say(f"{entry.where} ({entry.name}): failed: {error}")
        self.results[entry.name] = EntryResult(
            name=entry.name,
            where=entry.where,
            status="failed" if outcome.status == "dropped" else outcome.status,
            folder=entry.name,
            num_steps=0 if record is None else record.num_steps,
            tokens=0 if record is None else record.tokens,
            train_s=outcome.seconds if record is None or not record.train_s else record.train_s,
            metrics={}
            if record is None
            else {
                metric: Estimate(value=value, low=low, high=high)  # type: ignore[misc]
                for metric, (value, low, high) in record.metrics.items()
                if metric != "forgetting_loss"
            },
            published=published,
            error=error,
        )
        write_atomically(self.out / RESULT, self.result().model_dump_json(indent=2) + "\n")

    def _published(self, entry: Entry) -> str | None:
        """The version that an earlier call made of it, under the name that it names now."""
        before = self.results.get(entry.name)
        version = None if before is None else before.published
        return version if version and version.rpartition(":")[0] == entry.publish else None

    def _publish(self, entry: Entry) -> str:
        assert entry.publish is not None
        with Store.open() as store:
            found = store.publish(self.out / entry.name, entry.publish, tags=entry.tags)
        return str(found)

    def _say_of(self, entry: Entry) -> Callable[[str], None]:
        return lambda line: self.say(f"{entry.name}: {line}")
