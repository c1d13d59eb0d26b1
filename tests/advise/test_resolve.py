"""Models by folder, by size and by name; and how each is said to have been found."""

from pathlib import Path

import pytest

from tests.advise.fake import FakePlanner
from tests.folders import save_model
from tunefork.advise.planner import TracedPlanner
from tunefork.advise.resolve import resolve
from tunefork.advise.situation import Situation, SituationError
from tunefork.errors import ModelError
from tunefork.plan.catalogue import CatalogueError, load_catalogue
from tunefork.recipe import FullSection, Method

CATALOGUE = load_catalogue()


def test_a_folder_is_read(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    params = sum(p.numel() for p in model.parameters())
    found = resolve(Situation(model=str(tmp_path), task="chat"), CATALOGUE)
    assert found.facts.params == params and found.facts.is_size_known
    assert found.model == str(tmp_path) and len(found.assumptions) == 1
    with pytest.raises(SituationError, match="model_params: 8e.09 is not the size of"):
        resolve(Situation(model=str(tmp_path), model_params=8e9), CATALOGUE)


def test_the_planner_itself_is_asked_by_default() -> None:
    facts = resolve(Situation(model_params=0.1345e9, task="chat", examples=100), CATALOGUE).facts
    planner = facts.estimates.planner
    assert isinstance(planner, TracedPlanner)
    plan = planner.plan(
        CATALOGUE.machine(["l4"]),
        facts.amount,
        (Method.LORA,),
        rank=16,
        full=FullSection(),
        has_details=False,
    )
    lora = plan.methods["lora"]
    assert plan.work.tokens == facts.amount.tokens
    assert lora.fits and lora.trainable_params == planner.lora_params(16)


def test_a_name_gives_its_size_without_asking_a_hub() -> None:
    found = resolve(Situation(model="owner/Some-13B-Instruct"), CATALOGUE, (), FakePlanner)
    assert found.facts.params == 13e9 and found.model == "owner/Some-13B-Instruct"
    assert "not on this machine: the shape is that of a Llama of 13B" in found.assumptions[0]
    found = resolve(Situation(model="owner/name", model_params=3e9), CATALOGUE, (), FakePlanner)
    assert found.facts.params == 3e9


def test_a_bare_size_names_no_model() -> None:
    found = resolve(Situation(model="8B"), CATALOGUE, (), FakePlanner)
    assert (found.facts.params, found.model) == (8e9, "OWNER/MODEL-8B")
    found = resolve(Situation(), CATALOGUE, (), FakePlanner)
    assert not found.facts.is_size_known and "a model of 8B parameters" in found.assumptions


def test_what_cannot_be_resolved() -> None:
    with pytest.raises(ModelError, match="say how large it is"):
        resolve(Situation(model="./gone"), CATALOGUE)
    with pytest.raises(CatalogueError, match="did you mean 'h100'"):
        resolve(Situation(gpus=("H100",)), CATALOGUE, (), FakePlanner)
