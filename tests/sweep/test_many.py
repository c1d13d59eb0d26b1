"""An adapter for each of many customers, over a group whose members each have their own model."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import rows
from tests.sweep.solo_group import SoloGroup
from tunefork.errors import BadInputError, RunFolderError
from tunefork.recipe import Recipe
from tunefork.recipe_file import load
from tunefork.registry.run import read_record
from tunefork.registry.store import Store
from tunefork.sweep.entries import Entry
from tunefork.sweep.group import Stepped
from tunefork.sweep.many import train_many
from tunefork.sweep.many_result import RESULT, ManyResult
from tunefork.trial.trial import train_run

Make = Callable[..., Recipe]


@pytest.fixture
def entries(make_recipe: Make, tmp_path: Path) -> list[Entry]:
    """Three customers: other data, ranks, lengths of training; the first two are published."""
    found = []
    for at, name in enumerate(("acme", "bolt", "coil")):
        file = tmp_path / f"{name}.jsonl"
        given = rows(10 + 4 * at, 100 * at + 1000)
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        recipe = make_recipe(
            data={"train": str(file)},
            lora={"rank": 2 + at},
            train={"max_steps": 2 + at, "learning_rate": 1e-3, "seed": at},
        )
        publish = None if at == 2 else f"customers/{name}"
        found.append(Entry(name=name, recipe=recipe, where=f"customers.yaml:{at}", publish=publish))
    return found


def _train(entries: Sequence[Entry], out: Path, group: SoloGroup | None = None) -> ManyResult:
    own, said = group or SoloGroup(), list[str]()
    result = train_many(entries, out, say=said.append, make_group=lambda recipe, members: own)
    assert ManyResult.load(out / RESULT).entries == result.entries
    return result


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "adapter" / "adapter_model.safetensors")
    return found


@pytest.mark.slow
def test_each_is_trained_as_alone_and_published(entries: list[Entry], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _train(entries, out)
    assert not result.has_failed
    assert [(e.name, e.status, e.num_steps) for e in result.entries] == [
        ("acme", "ok", 2),
        ("bolt", "ok", 3),
        ("coil", "ok", 4),
    ]
    assert [e.published for e in result.entries] == ["customers/acme:v1", "customers/bolt:v1", None]
    for entry in entries:
        recipe = load(out / entry.name / "recipe.yaml")
        assert recipe == entry.recipe
        alone = train_run(recipe, tmp_path / "alone" / entry.name, say=lambda line: None)
        record = read_record(out / entry.name)
        assert record is not None and record.metrics == alone.metrics
        ours, theirs = _weights(out / entry.name), _weights(tmp_path / "alone" / entry.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = _train(entries, out)  # nothing is trained or published again
    assert [e.published for e in again.entries] == [e.published for e in result.entries]
    with Store.open() as store:
        assert len(store.list("customers")) == 2


def test_bad_data_and_divergence_are_their_own_entries_fault(
    entries: list[Entry], tmp_path: Path
) -> None:
    whole = _train(entries, tmp_path / "whole")
    Path(entries[0].recipe.data.train).write_text('{"text": "secret", "label": 3')
    for entry in entries:  # the others' data is as it was
        if entry.publish:
            with Store.open() as store:
                store.remove(f"{entry.publish}:v1")
    result = _train(entries, tmp_path / "out", SoloGroup({"coil": 3}))
    acme, bolt, coil = result.entries
    assert result.has_failed
    assert acme.status == "failed" and acme.error is not None and "acme.jsonl:1" in acme.error
    assert "secret" not in acme.error
    assert coil.status == "failed" and coil.error == "step 3: the loss is nan"
    assert bolt.status == "ok" and bolt.metrics == whole.entries[1].metrics
    assert bolt.published == "customers/bolt:v2" and acme.published is None
    ours, theirs = (_weights(tmp_path / at / "bolt") for at in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with Store.open() as store:
        assert [v.name for v in store.list("customers")] == ["customers/bolt"]


def test_an_adapter_that_cannot_be_published_is_kept_and_said(
    entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "publish", full)
        result = _train(entries, tmp_path / "out")
    assert [e.status for e in result.entries] == ["ok"] * 3 and result.has_failed
    assert (result.entries[0].error or "").startswith("trained, but not published")
    assert _train(entries, tmp_path / "out").entries[0].published == "customers/acme:v1"


def test_where_none_can_be_trained_that_is_bad_input(entries: list[Entry], tmp_path: Path) -> None:
    wrong = [
        e.model_copy(update={"recipe": e.recipe.model_copy(update={"lora": _dora(e.recipe)})})
        for e in entries
    ]
    with pytest.raises(BadInputError, match=r"customers.yaml:0 \(acme\): lora.dora"):
        _train(wrong, tmp_path / "out")


def _dora(recipe: Recipe) -> Any:
    return recipe.lora.model_copy(update={"dora": True})


def test_what_is_added_later_is_trained_beside_what_is_done(
    entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_tokenizer", "load_skeleton"):  # read once, not for each of hundreds
        monkeypatch.delattr(f"tunefork.trial.check.{name}")
    _train(entries[:1], tmp_path / "out")
    group = SoloGroup()
    result = _train(entries, tmp_path / "out", group)
    assert [e.status for e in result.entries] == ["ok"] * 3
    assert all("acme" not in names for names in group.together)


def test_stopped_the_same_call_goes_on(entries: list[Entry], tmp_path: Path) -> None:
    class Stopping(SoloGroup):
        def step(self) -> Sequence[Stepped]:
            stepped = super().step()
            if len(self.together) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return stepped

    whole = _train(entries, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(entries, tmp_path / "out", Stopping())
    partial = ManyResult.load(tmp_path / "out" / RESULT)
    assert [e.status for e in partial.entries] == ["ok", "interrupted", "interrupted"]
    assert partial.entries[1].num_steps == 3  # its evaluation would have taken time
    result = _train(entries, tmp_path / "out")
    assert [e.metrics for e in result.entries] == [e.metrics for e in whole.entries]
    assert result.entries[0].published == "customers/acme:v2"  # once: v1 is the whole run's
    with Store.open() as store:
        assert len(store.list("customers/acme")) == 2


def test_a_folder_of_something_else_is_left_alone(entries: list[Entry], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(RunFolderError, match="no folder of tunefork train-many"):
        _train(entries, tmp_path / "out")
