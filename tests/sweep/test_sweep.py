"""A sweep from recipe to result, over a group whose members each have a model of their own."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.sweep.solo_group import SoloGroup
from tunefork.errors import RecipeError, TuneforkError
from tunefork.recipe import Recipe
from tunefork.recipe_file import load
from tunefork.registry.opening import open_model
from tunefork.registry.run import ADAPTER, read_record
from tunefork.registry.store import Store
from tunefork.sweep.bank import stops_of
from tunefork.sweep.group import Member, Stepped
from tunefork.sweep.markdown import sweep_markdown
from tunefork.sweep.result import RESULT, SweepResult
from tunefork.sweep.sweep import sweep
from tunefork.train.events import EVENTS, StateChanged, read_events, read_steps
from tunefork.train.state import State
from tunefork.trial.trial import train_run

Make = Callable[..., Recipe]


@pytest.fixture
def make(make_recipe: Make) -> Make:
    """A recipe of a sweep of four variants, each of four steps."""

    def build(**sections: Any) -> Recipe:
        sections = {
            "train": {"max_steps": 4, "batch_size": 2, "epochs": 4},
            "sweep": {"rank": [2, 4], "learning_rate": [1e-4, 1e-3], "validation_share": 0.3},
        } | sections
        return make_recipe(**sections)

    return build


@pytest.fixture(autouse=True)
def page_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures take longer than the training here, and have tests of their own."""
    monkeypatch.setattr("tunefork.sweep.sweep.write_report", lambda result, path: None)


def _sweep(recipe: Recipe, out: Path, group: SoloGroup | None = None) -> SweepResult:
    own = group or SoloGroup()
    return sweep(recipe, out, say=lambda line: None, make_group=lambda recipe, members: own)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / ADAPTER / "adapter_model.safetensors")
    return found


@pytest.mark.slow
def test_each_variant_is_a_run_as_train_would_leave_it(make: Make, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("\n\n".join(f"It was said {n} times." for n in range(12)))
    recipe = make(evaluate={"forgetting": str(tmp_path / "general.txt")})
    result = _sweep(recipe, tmp_path / "sweep")
    assert [v.status for v in result.variants] == ["ok"] * 4
    assert all(v.forgetting is not None and v.forgetting.value for v in result.variants)
    assert all(c.forgetting is not None for c in result.configurations)
    folder = tmp_path / "sweep" / "variants" / "r4-lr1e-3"
    alone = train_run(load(folder / "recipe.yaml"), tmp_path / "alone", say=lambda line: None)
    record = read_record(folder)
    assert record is not None and record.status == "ok"
    assert record.metrics == alone.metrics
    assert record.validation_loss == alone.validation_loss
    assert record.tokens == alone.tokens and record.num_steps == alone.num_steps == 4
    ours, theirs = _weights(folder), _weights(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps, steps_alone = (read_steps(f / EVENTS) for f in (folder, tmp_path / "alone"))
    assert [s.loss for s in steps] == [s.loss for s in steps_alone]
    assert train_run(load(folder / "recipe.yaml"), folder) == record  # done, says train too
    open_model(str(folder), precision="fp32")
    with Store.open() as store:
        store.publish(folder, "sweeps/best")


def test_the_result_says_who_won_and_can_be_read_again(make: Make, tmp_path: Path) -> None:
    result = _sweep(make(sweep=_SEEDED), tmp_path / "out")
    assert SweepResult.load(tmp_path / "out" / RESULT) == result
    assert len(result.variants) == 8 and len(result.configurations) == 4
    assert result.chosen is not None and result.recommended is not None
    assert result.primary_metric == "accuracy" and result.eval_examples == 6
    losses = {c.name: c.validation_loss for c in result.configurations}
    assert result.chosen == min(losses, key=lambda name: losses[name] or 9.0)
    assert {c.seeds for c in result.configurations} == {(0, 1)}
    assert result.rank_effect is not None and result.rate_effect is not None
    assert {knob.knob for knob in result.knobs} == {"rank", "learning_rate", "seed"}
    markdown = sweep_markdown(result, "tunefork sweep x")
    assert "Recommended: rank" in markdown and all(name in markdown for name in losses)


_SEEDED = {
    "rank": [2, 4],
    "learning_rate": [1e-4, 1e-3],
    "seed": [0, 1],
    "validation_share": 0.3,
}


@pytest.mark.slow
def test_variants_of_all_seeds_choose_and_are_judged_by_the_same_examples(
    make: Make, tmp_path: Path
) -> None:
    group, seen = SoloGroup(), dict[str, list[list[int]]]()

    def make_group(recipe: Recipe, members: Sequence[Member]) -> SoloGroup:
        for member in members:
            seen[member.name] = [example.input_ids.tolist() for example in member.validation]
        return group

    sweep(make(sweep=_SEEDED), tmp_path / "out", say=lambda line: None, make_group=make_group)
    assert len(seen) == 8 and all(ids == seen["r2-lr1e-4-s0"] for ids in seen.values())


def test_halving_drops_the_worse_of_each_rank_and_fills_their_places(
    make: Make, tmp_path: Path
) -> None:
    recipe = make(
        sweep={
            "rank": [2, 4],
            "learning_rate": [1e-5, 1e-2],
            "halving": {"rungs": 1},
            "validation_share": 0.3,
            "together": 2,
        }
    )
    group = SoloGroup()
    result = _sweep(recipe, tmp_path / "out", group)
    assert max(len(names) for names in group.together) == 2 == result.together
    by_name = {v.name: v for v in result.variants}
    assert [v.status for v in result.variants].count("dropped") == 2
    for rank in (2, 4):
        own = [v for v in result.variants if v.rank == rank]
        assert sorted(v.status for v in own) == ["dropped", "ok"]
        [dropped] = [v for v in own if v.status == "dropped"]
        [kept] = [v for v in own if v.status == "ok"]
        assert (dropped.num_steps, kept.num_steps) == (2, 4)
        [rung] = dropped.rungs
        assert (rung.step, rung.place, rung.of, rung.is_kept) == (2, 2, 2, False)
        assert rung.behind is not None and rung.behind.value > 0
    # One that was dropped can be gone on with alone, and ends as if it never had been.
    [name] = [v.name for v in result.variants if v.status == "dropped" and v.rank == 4]
    folder = tmp_path / "out" / by_name[name].folder
    whole = train_run(load(folder / "recipe.yaml"), tmp_path / "whole", say=lambda line: None)
    later = train_run(load(folder / "recipe.yaml"), folder, say=lambda line: None)
    assert later.metrics == whole.metrics and later.num_steps == 4


@pytest.mark.slow
def test_what_is_dropped_does_not_depend_on_how_many_train_at_a_time(
    make: Make, tmp_path: Path
) -> None:
    found = []
    for together in (1, 3):
        sweeping = {
            "rank": [2, 4],
            "learning_rate": [1e-4, 1e-2],
            "halving": {"within": "all", "rungs": 2},
            "validation_share": 0.3,
            "together": together,
        }
        result = _sweep(make(sweep=sweeping), tmp_path / str(together))
        found.append([(v.name, v.status, v.num_steps) for v in result.variants])
    assert found[0] == found[1]
    assert [status for _, status, _ in found[0]].count("ok") == 1


def test_one_that_fails_leaves_the_others_untouched(make: Make, tmp_path: Path) -> None:
    whole = _sweep(make(), tmp_path / "whole")
    result = _sweep(make(), tmp_path / "failing", SoloGroup({"r2-lr1e-3": 3}))
    by_name = {v.name: v for v in result.variants}
    failed = by_name["r2-lr1e-3"]
    assert failed.status == "failed" and failed.error == "step 3: the loss is nan"
    record = read_record(tmp_path / "failing" / failed.folder)
    assert record is not None and record.status == "failed" and record.num_steps == 2
    for variant in whole.variants:
        if variant.name != failed.name:
            assert by_name[variant.name].metrics == variant.metrics
            ours, theirs = (_weights(tmp_path / at / variant.folder) for at in ("failing", "whole"))
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "r2-lr1e-3: step 3" in sweep_markdown(result)


def test_where_all_fail_that_is_an_error(make: Make, tmp_path: Path) -> None:
    names = {f"r{rank}-lr{rate}": 1 for rank in (2, 4) for rate in ("1e-4", "1e-3")}
    with pytest.raises(TuneforkError, match=r"no variant came to its end:\nr2-lr1e-4: step 1"):
        _sweep(make(), tmp_path / "out", SoloGroup(names))
    assert SweepResult.load(tmp_path / "out" / RESULT).chosen is None


class _Stopping(SoloGroup):
    """Sends a signal in, or dies after, a pass."""

    def __init__(self, at: int, *, dies: bool) -> None:
        super().__init__()
        self.at, self.dies = at, dies

    def step(self) -> Sequence[Stepped]:
        stepped = super().step()
        if len(self.together) == self.at:
            if self.dies:
                raise SystemExit
            os.kill(os.getpid(), signal.SIGINT)
        return stepped


_HALVING = {"rungs": 1}
_EVERY = [
    pytest.param(at, dies, halving, marks=pytest.mark.slow)
    for at in (1, 2, 3, 4, 5)
    for dies in (False, True)
    for halving in (None, _HALVING)
]


@pytest.mark.parametrize(("at", "dies", "halving"), _EVERY)
def test_stopped_or_killed_the_same_call_goes_on_to_the_same_end(
    make: Make, tmp_path: Path, at: int, dies: bool, halving: dict[str, Any] | None
) -> None:
    recipe = make(
        train={"max_steps": 4, "batch_size": 2, "epochs": 4, "checkpoint_every_steps": 1},
        sweep={
            "rank": [2, 4],
            "learning_rate": [1e-4, 1e-2],
            "validation_share": 0.3,
            "together": 3,
            "halving": halving,
        },
        lora={"dropout": 0.0},
    )
    whole = _sweep(recipe, tmp_path / "whole")
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit if dies else KeyboardInterrupt):
        _sweep(recipe, out, _Stopping(at, dies=dies))
    if not dies and at == 2:
        record = read_record(out / "variants" / "r2-lr1e-4")
        assert record is not None and record.status == "interrupted" and record.num_steps == 2
        states = [
            line.what.state
            for line in read_events(out / "variants" / "r2-lr1e-4" / EVENTS)
            if isinstance(line.what, StateChanged)
        ]
        assert states[-1] == "interrupted"
    result = _sweep(recipe, out)
    for one, other in zip(result.variants, whole.variants, strict=True):
        assert (one.name, one.status, one.num_steps) == (
            other.name,
            other.status,
            other.num_steps,
        )
        assert one.metrics == other.metrics and one.validation_loss == other.validation_loss
        ours, theirs = (_weights(where / one.folder) for where in (out, tmp_path / "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), one.name


def test_a_finished_sweep_is_only_read(make: Make, tmp_path: Path) -> None:
    first = _sweep(make(), tmp_path / "out")
    again = _sweep(make(), tmp_path / "out", SoloGroup({"r2-lr1e-3": 1}))
    assert again.variants == first.variants and again.together == first.together == 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"dora": True}}, "lora.dora: needs a pass of its own"),
        ({"lora": {"modules_to_save": ["norm"]}}, "lora.modules_to_save: .* train it alone"),
        ({"train": {"keep": "best", "validate_every_steps": 1}}, "train.keep: best"),
        ({"train": {"on_loss_spike": "rollback"}}, "train.on_loss_spike: rollback"),
        ({"sweep": {"rank": [2, 4096]}}, "lora.rank: 4096 is above the size"),
        (
            {"sweep": {"rank": [2], "halving": {"rungs": 6}}, "train": {"max_steps": 3}},
            "sweep.halving: r2 has 3 steps, too few for 6 rungs",
        ),
        ({"compare": {"primary_metric": "rouge_l"}}, "compare.primary_metric: rouge_l"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    make: Make, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises((RecipeError, TuneforkError), match=message):
        _sweep(make(**sections), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Late(_Stopping):
    """Tells of a step when the next one is taken, as a group on a GPU does."""

    def __init__(self, at: int = 0) -> None:
        super().__init__(at, dies=False)
        self.waiting: list[Stepped] = []
        self.stops: dict[str, Callable[[int], bool]] = {}

    def add(self, member: Member, start: State | None) -> None:
        super().add(member, start)
        self.stops[member.name] = stops_of(member)

    def step(self) -> Sequence[Stepped]:
        told, self.waiting = self.waiting, list(super().step())
        records = [(each.name, each.record) for each in self.waiting if each.record is not None]
        if any(self.stops[name](record.step) for name, record in records):
            return [*told, *self.sync()]
        return told

    def sync(self) -> Sequence[Stepped]:
        told, self.waiting = self.waiting, []
        return told


@pytest.mark.parametrize("stopped_at", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_steps_that_are_told_late_are_all_told(make: Make, tmp_path: Path, stopped_at: int) -> None:
    recipe = make(
        train={"max_steps": 6, "batch_size": 2, "epochs": 9, "checkpoint_every_steps": 2},
        sweep={
            "rank": [2, 4],
            "learning_rate": [1e-4, 1e-2],
            "validation_share": 0.3,
            "together": 3,
            "halving": {"rungs": 1},
        },
    )
    whole = _sweep(recipe, tmp_path / "whole")
    if stopped_at:
        with pytest.raises(KeyboardInterrupt):
            _sweep(recipe, tmp_path / "late", _Late(stopped_at))
    late = _sweep(recipe, tmp_path / "late", _Late())
    for one, other in zip(late.variants, whole.variants, strict=True):
        assert (one.name, one.status, one.num_steps) == (other.name, other.status, other.num_steps)
        assert one.metrics == other.metrics and one.validation_loss == other.validation_loss
        steps = read_steps(tmp_path / "late" / one.folder / EVENTS)
        assert [step.step for step in steps] == list(range(1, one.num_steps + 1))
