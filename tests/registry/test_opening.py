"""What a run, an adapter, a comparison's piece or a plain model opens as."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import save_model
from tests.registry.conftest import make_record, save_run, trained
from tests.tiny import CONFIGS
from tunefork.errors import (
    AdapterError,
    IdentityError,
    ModelError,
    RecipeError,
    RunFolderError,
    StoreError,
)
from tunefork.model.fingerprint import identify, identify_trained
from tunefork.model.linear import LoraLinear, Nf4Linear
from tunefork.model.load import load_model
from tunefork.recipe import Method, ModelSection
from tunefork.recipe_file import load
from tunefork.registry.lineage import read_lineage
from tunefork.registry.opening import Opened, open_model
from tunefork.registry.peft_format import CONFIG, WEIGHTS
from tunefork.registry.provenance import Provenance, write_provenance
from tunefork.registry.run import ADAPTER, MODEL, RECIPE, RECORD, write_record
from tunefork.registry.store import Store

IDS = torch.arange(3, 40)[None]


def _plain(base: Path) -> Any:
    section = ModelSection(id=str(base))
    return load_model(section, dtype=torch.float32, device=torch.device("cpu")).eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(IDS).logits
    return logits


def _open(target: Path | str) -> Opened:
    return open_model(str(target), precision="fp32")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A LoRA run with a system turn in its recipe."""
    folder = tmp_path / "run"
    save_run(folder, trained(_plain(base), Method.LORA), base, Method.LORA, system="Be kind")
    return folder


# What opens


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_an_adapter_run_opens_as_it_was_trained(method: Method, base: Path, tmp_path: Path) -> None:
    model = trained(_plain(base), method)
    recipe = save_run(tmp_path / "run", model, base, method)
    opened = _open(tmp_path / "run")
    torch.testing.assert_close(_logits(opened.model), _logits(model))
    assert (_logits(opened.model) - _logits(_plain(base))).abs().max() > 1e-3
    layer = opened.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LoraLinear)
    assert isinstance(layer.base, Nf4Linear) == (method is Method.QLORA)
    assert opened.section.id == str(base)
    assert opened.data is not None and opened.data.model_dump() | {"train": ""} == (
        recipe.data.model_dump() | {"train": ""}
    )


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_a_published_adapter_opens_as_its_run_does(
    method: Method, base: Path, tmp_path: Path
) -> None:
    model = trained(_plain(base), method)
    recipe = save_run(tmp_path / "run", model, base, method, system="Be kind")
    made = Provenance(
        identity=identify(ModelSection(id=str(base))),
        method=method,
        recipe=recipe.model_dump(mode="json"),
    )
    write_provenance(tmp_path / "run" / ADAPTER, made)
    with Store.open() as store:
        store.publish(tmp_path / "run", "support/acme", tags=("prod",))
    shutil.rmtree(tmp_path / "run")
    opened = _open("support/acme:prod")
    torch.testing.assert_close(_logits(opened.model), _logits(model))
    assert isinstance(opened.model.model.layers[0].mlp.up_proj.base, Nf4Linear) == (
        method is Method.QLORA
    )
    assert opened.data == recipe.data


def test_a_version_that_the_store_lacks_is_named() -> None:
    with pytest.raises(StoreError, match="support/acme:prod: nothing is published under"):
        _open("support/acme:prod")


def test_a_published_adapter_whose_recipe_cannot_be_read(base: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "run", trained(_plain(base), Method.LORA), base, Method.LORA)
    made = Provenance(identity=identify(ModelSection(id=str(base))), recipe={"data": {"trian": ""}})
    write_provenance(tmp_path / "run" / ADAPTER, made)
    shutil.copytree(tmp_path / "run" / ADAPTER, tmp_path / "alone")
    with pytest.raises(AdapterError, match=r"tunefork.json: recipe.data: is none of this"):
        _open(tmp_path / "alone")


def test_a_full_run_opens_its_own_model(base: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "run", None, base, Method.FULL)
    opened = _open(tmp_path / "run")
    torch.testing.assert_close(_logits(opened.model), _logits(_plain(tmp_path / "run" / "model")))
    assert opened.section.id == str(tmp_path / "run" / "model")
    assert not any(isinstance(m, LoraLinear) for m in opened.model.modules())


def test_a_plain_model_opens_without_data(base: Path) -> None:
    opened = _open(base)
    torch.testing.assert_close(_logits(opened.model), _logits(_plain(base)))
    assert opened.data is None and opened.tokenizer.chat_template is not None


def test_what_is_open_is_frozen_and_in_eval_mode(run: Path) -> None:
    model = _open(run).model
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("inner", [ADAPTER, "."])
def test_the_adapters_folder_in_a_run_is_the_run(run: Path, inner: str) -> None:
    opened = _open(run / inner)
    assert opened.data is not None and opened.data.system == "Be kind"


def test_an_adapter_elsewhere_opens_over_the_base_it_names(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / ADAPTER, alone)
    opened = _open(alone)
    torch.testing.assert_close(_logits(opened.model), _logits(_open(run).model))
    assert opened.data is None


def test_a_comparisons_run_takes_its_data_from_the_comparison(run: Path, tmp_path: Path) -> None:
    comparison = tmp_path / "comparison"
    piece = comparison / "lora" / "seed-0"
    shutil.copytree(run, piece)
    (piece / RECIPE).rename(comparison / RECIPE)
    opened = _open(piece)
    assert opened.data is not None and opened.data.system == "Be kind"
    with pytest.raises(RunFolderError, match=r"no finished run of its own; give one of .*seed-0$"):
        _open(comparison)


def test_a_comparisons_base_is_the_base(base: Path, tmp_path: Path) -> None:
    write_record(tmp_path, make_record(method=None, model_id=str(base), artifact=None))
    opened = _open(tmp_path)
    torch.testing.assert_close(_logits(opened.model), _logits(_plain(base)))


# What belongs together


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A base that the test may change."""
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture
def recorded(own_base: Path, tmp_path: Path) -> Path:
    """A LoRA run over `own_base` whose adapter records what it was trained on."""
    folder = tmp_path / "recorded"
    save_run(folder, trained(_plain(own_base), Method.LORA), own_base, Method.LORA)
    identity = identify(ModelSection(id=str(own_base)))
    write_provenance(folder / ADAPTER, Provenance(identity=identity))
    return folder


def test_an_adapter_on_its_own_base_opens_in_silence(
    recorded: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _open(recorded)
    assert capsys.readouterr().err == ""
    _open(run)
    assert f"adapters adopt {run / ADAPTER}" in capsys.readouterr().err
    said: list[str] = []
    open_model(str(run), precision="fp32", say=said.append)
    assert len(said) == 1 and said[0].startswith(f"warning: {run}: records no identity")


def test_a_base_that_lies_elsewhere_in_other_files_is_the_base(
    recorded: Path, own_base: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(own_base, elsewhere)
    (elsewhere / "model.safetensors").unlink()
    _plain(own_base).save_pretrained(elsewhere, max_shard_size="16KB")
    assert len(list(elsewhere.glob("*.safetensors"))) > 2
    write_record(recorded, make_record(model_id=str(elsewhere)))
    _open(recorded)


def test_an_adapter_on_another_base_of_the_same_shapes_is_refused(
    recorded: Path, own_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    save_model(other, seed=1)
    one, two = (identify(ModelSection(id=str(f))).weights_sha256[:12] for f in (own_base, other))
    assert one != two
    write_record(recorded, make_record(model_id=str(other)))
    message = f"{recorded}: does not belong to {other} .* weights {one} recorded, {two} found;"
    with pytest.raises(IdentityError, match=message):
        _open(recorded)
    alone = recorded / ADAPTER
    config = json.loads((alone / CONFIG).read_text()) | {"base_model_name_or_path": str(other)}
    (alone / CONFIG).write_text(json.dumps(config))
    shutil.copytree(alone, tmp_path / "alone")
    with pytest.raises(IdentityError, match=f"weights {one} recorded, {two} found;"):
        _open(tmp_path / "alone")


def test_the_runs_record_counts_where_the_adapter_has_none(recorded: Path, own_base: Path) -> None:
    (recorded / ADAPTER / "tunefork.json").unlink()
    identity = identify(ModelSection(id=str(own_base)))
    record = make_record(model_id=str(own_base), identity=identity)
    write_record(recorded, record)
    _open(recorded)
    save_model(own_base, seed=1)
    with pytest.raises(IdentityError, match="weights"):
        _open(recorded)


def test_a_base_with_an_edited_template_is_refused(recorded: Path, own_base: Path) -> None:
    file = own_base / "chat_template.jinja"
    file.write_text(file.read_text().replace("Be helpful", "Be kind"))
    with pytest.raises(IdentityError, match=r"now: chat template \w{12} recorded, \w{12} found;"):
        _open(recorded)


def test_a_base_with_one_more_token_is_refused(recorded: Path, own_base: Path) -> None:
    tokenizer = _open(own_base).tokenizer
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(own_base)
    with pytest.raises(IdentityError, match=r"now: tokenizer \w{12} recorded, \w{12} found;"):
        _open(recorded)


def test_an_adapter_whose_tokenizer_renders_otherwise_is_refused(
    recorded: Path, own_base: Path
) -> None:
    tokenizer = _open(own_base).tokenizer
    tokenizer.save_pretrained(recorded / ADAPTER)
    _open(recorded)
    file = recorded / ADAPTER / "chat_template.jinja"
    file.write_text(file.read_text().replace("Be helpful", "Be kind"))
    with pytest.raises(IdentityError, match=rf"{ADAPTER}: its tokenizer .* {own_base} \("):
        _open(recorded)


def test_a_full_model_is_the_one_that_was_trained(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_run(run, None, base, Method.FULL)
    model = run / MODEL
    own = identify_trained(model, _open(model).tokenizer)
    identity = identify(ModelSection(id=str(base)))
    write_provenance(model, Provenance(identity=identity, own=own))
    for target in (run, model):
        _open(target)
    save_model(model, seed=5)
    for target in (run, model):
        with pytest.raises(IdentityError, match=f"does not belong to {model}"):
            _open(target)


# What does not


def test_an_unfinished_run_is_no_model(run: Path) -> None:
    (run / RECORD).unlink()
    with pytest.raises(RunFolderError, match="holds no finished run of its own"):
        _open(run)


def test_a_run_whose_adapter_is_gone_says_so(run: Path) -> None:
    shutil.rmtree(run / ADAPTER)
    with pytest.raises(RunFolderError, match="its adapter folder is gone"):
        _open(run)


def test_a_run_whose_base_is_gone_names_the_base(run: Path) -> None:
    write_record(run, make_record(model_id="/gone/base"))
    with pytest.raises(ModelError, match="/gone/base is no model"):
        _open(run)


def test_a_run_with_a_broken_recipe_names_it(run: Path) -> None:
    (run / RECIPE).write_text("- no recipe")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: must be a mapping"):
        _open(run)


def test_a_run_of_when_there_was_fp8_opens_and_keeps_saying_so(run: Path) -> None:
    written = (run / RECIPE).read_text()
    (run / RECIPE).write_text(written.replace("precision: auto", "precision: fp8"))
    with pytest.raises(RecipeError, match=r"train\.precision: fp8 is no more; set int8"):
        load(run / RECIPE)
    opened = _open(run)
    assert opened.data is not None and opened.data.system == "Be kind"
    recipe = read_lineage(run / ADAPTER, run=run).recipe
    assert recipe is not None and recipe["train"]["precision"] == "fp8"


def test_an_adapter_over_another_architecture_is_refused(run: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", "gpt_neox")
    write_record(run, make_record(model_id=str(tmp_path / "other")))
    with pytest.raises(AdapterError, match="belongs to another base"):
        _open(run)


def test_an_adapter_over_a_deeper_base_is_refused(
    base: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIGS["llama"], "num_hidden_layers", 3)
    save_model(tmp_path / "deeper")
    write_record(run, make_record(model_id=str(tmp_path / "deeper")))
    with pytest.raises(AdapterError, match=r"no tensors for model\.layers\.2"):
        _open(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"base_model_name_or_path": "/gone/base"}, "/gone/base is no model"),
        ({"peft_type": "IA3"}, "only LORA is supported"),
    ],
)
def test_an_adapter_that_says_too_little_is_refused(
    run: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / ADAPTER, alone)
    config = json.loads((alone / CONFIG).read_text()) | change
    (alone / CONFIG).write_text(json.dumps(config))
    with pytest.raises((RunFolderError, ModelError, AdapterError), match=message):
        _open(alone)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_damaged_adapter_is_refused(run: Path, name: str) -> None:
    file = run / ADAPTER / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AdapterError, match=f"{name}: cannot be read"):
        _open(run)
    file.write_text("[]")
    with pytest.raises(AdapterError, match=f"{name}: (cannot be read|must hold a JSON object)"):
        _open(run)


@pytest.mark.parametrize("target", ["~nobody-at-all/run", "/gone/run", "./gone"])
def test_a_target_of_nothing_is_refused(target: str) -> None:
    with pytest.raises((RunFolderError, ModelError), match=target):
        _open(target)


def test_a_whole_model_in_the_store_opens_by_its_name(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    with Store.open() as store:
        store.publish(tmp_path / "model", "some/model")
    assert open_model("some/model:v1").model is not None
