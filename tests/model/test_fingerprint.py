"""Equal content gives an equal identity however it is stored, and any other content another."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer

import tunefork.model.fingerprint as fingerprint
import tunefork.model.fingerprint_tokenizer as fingerprint_tokenizer
from tests.folders import save_model, save_tokenizer
from tunefork.errors import IdentityError, ModelError
from tunefork.model.fingerprint import (
    Identity,
    check_identity,
    check_rendering,
    identify,
    identify_trained,
)
from tunefork.model.fingerprint_weights import weights_sha256
from tunefork.model.golden import text_ids
from tunefork.recipe import ModelSection


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A tiny llama's folder, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _identify(folder: Path) -> Identity:
    return identify(ModelSection(id=str(folder)))


# The base


def test_a_copy_is_the_same_base(saved: Path, model: Path) -> None:
    assert _identify(saved) == _identify(model)


def test_another_seed_is_another_base_with_the_same_tokenizer(saved: Path, tmp_path: Path) -> None:
    save_model(tmp_path, seed=1)
    one, other = _identify(saved), _identify(tmp_path)
    assert one.weights_sha256 != other.weights_sha256
    assert one.model_dump(exclude={"weights_sha256"}) == other.model_dump(
        exclude={"weights_sha256"}
    )


def test_a_tied_head_is_known_by_the_configuration(model: Path) -> None:
    aliases = fingerprint._aliases(ModelSection(id=str(model)))
    assert aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    assert fingerprint._aliases(ModelSection(id=str(model))) == {}


def test_an_edited_template_and_an_added_token_show(saved: Path, model: Path) -> None:
    before = _identify(saved)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("Be helpful", "Be kind"))
    edited = _identify(model)
    assert edited.template_sha256 != before.template_sha256
    assert edited.tokenizer_sha256 == before.tokenizer_sha256
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(model)
    added = _identify(model)
    assert added.tokenizer_sha256 != edited.tokenizer_sha256
    assert added.weights_sha256 == before.weights_sha256


def test_a_model_without_a_template_has_no_template_digest(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert _identify(model).template_sha256 is None
    assert _identify(model).template_sha256 is None  # from the cache, too


def test_a_trained_model_comes_back_as_it_was(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert identify_trained(model, tokenizer) == _identify(model)
    tokenizer.add_tokens(["<tool>"])
    assert identify_trained(model, tokenizer) != _identify(model)


# The cache


def _fail(*_: object, **__: object) -> None:
    raise AssertionError("read again")


def _forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", _fail)
    monkeypatch.setattr(fingerprint, "weights_sha256", _fail)
    monkeypatch.setattr(fingerprint, "load_tokenizer", _fail)
    monkeypatch.setattr(fingerprint, "load_skeleton", _fail)


def test_the_second_reading_reads_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _identify(model)
    _forbid_reading(monkeypatch)
    assert _identify(model) == first


def test_the_same_files_by_another_path_are_known(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the hub's cache, whose snapshots are links."""
    first = _identify(model)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    _forbid_reading(monkeypatch)
    assert _identify(linked) == first


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja"])
def test_a_change_that_hides_its_time_is_seen(model: Path, name: str) -> None:
    before, file = _identify(model), model / name
    was = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as stream:  # in place: the same inode and size
        stream.write(content)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
    assert _identify(model) != before


def test_files_that_change_while_they_are_read_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def change(*arguments: Any) -> str:
        os.utime(model / "model.safetensors", ns=(1, 1))
        return weights_sha256(*arguments)

    monkeypatch.setattr(fingerprint, "weights_sha256", change)
    with pytest.raises(ModelError, match="changed while they were read"):
        _identify(model)


# The refusal


def test_a_mismatch_names_both_sides_and_what_differs(saved: Path, tmp_path: Path) -> None:
    save_model(tmp_path, seed=1)
    one, other = _identify(saved), _identify(tmp_path)
    check_identity(one, one, what="run", base="base")
    with pytest.raises(IdentityError) as raised:
        check_identity(one, other, what="runs/a", base="models/b")
    message = str(raised.value)
    assert message.startswith("runs/a: does not belong to models/b")
    assert one.weights_sha256[:12] in message and other.weights_sha256[:12] in message
    assert "tokenizer" not in message and "template" not in message
    bare = other.model_copy(update={"template_sha256": None})
    with pytest.raises(IdentityError, match="chat template .* recorded, none found"):
        check_identity(other, bare, what="runs/a", base="models/b")


def test_a_tokenizer_beside_an_adapter_must_render_the_bases_ids(
    model: Path, tmp_path: Path
) -> None:
    base = ModelSection(id=str(model))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    check_rendering(adapter, base)  # holds no tokenizer
    save_tokenizer(adapter)
    check_rendering(adapter, base)
    template = adapter / "chat_template.jinja"
    template.write_text("{# a note #}" + template.read_text())
    check_rendering(adapter, base)  # the same ids
    template.write_text(template.read_text().replace("Be helpful", "Be kind"))
    with pytest.raises(IdentityError, match=rf"{adapter}: .* than those of {model} \("):
        check_rendering(adapter, base)


def _edit_config(model: Path, **fields: Any) -> Identity:
    config = json.loads((model / "config.json").read_text()) | fields
    (model / "config.json").write_text(json.dumps(config))
    return _identify(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
    ],
)
def test_equal_weights_computed_with_otherwise_are_another_base(
    model: Path, fields: dict[str, Any]
) -> None:
    before = _identify(model)
    edited = _edit_config(model, **fields)
    assert edited.weights_sha256 == before.weights_sha256
    with pytest.raises(IdentityError, match="configuration .* recorded, .* found"):
        check_identity(before, edited, what="adapter", base="model")


def test_what_changes_no_logit_is_no_other_configuration(model: Path) -> None:
    before = _identify(model)
    edited = _edit_config(
        model, dtype="bfloat16", use_cache=False, max_position_embeddings=64, unheard_of=1
    )
    assert edited == before


def test_a_record_without_a_configuration_is_compared_by_the_rest(model: Path) -> None:
    found = _identify(model)
    older = found.model_copy(update={"config_sha256": None})
    check_identity(older, found, what="adapter", base="model")
    other = older.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(IdentityError, match="weights"):
        check_identity(other, found, what="adapter", base="model")


def test_what_is_known_of_a_tokenizer_is_of_no_other(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()

    def noted(tokenizer: Any) -> Any:
        asked.append(tokenizer)
        return text_ids(tokenizer)

    monkeypatch.setattr(fingerprint_tokenizer, "text_ids", noted)
    monkeypatch.setattr(fingerprint_tokenizer, "_KNOWN", {})

    def digest(change: Callable[[Any], object] = id) -> str:
        tokenizer = AutoTokenizer.from_pretrained(saved)
        change(tokenizer)
        return fingerprint_tokenizer.tokenizer_sha256(tokenizer)

    assert digest() == digest() and len(asked) == 1
    changes: list[Callable[[Any], object]] = [
        lambda tokenizer: tokenizer.add_tokens("<new>"),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<|im_start|>"),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", Lowercase()),
    ]
    assert len({digest(), *map(digest, changes)}) == len(asked) == 4
    digest(lambda tokenizer: setattr(tokenizer, "split_special_tokens", True))
    assert len(asked) == 5  # no golden text has a special token in it
    theirs = type("Theirs", (type(asked[0]),), {"__module__": "theirs"})
    for _ in range(2):  # whose code may do anything
        digest(lambda tokenizer: setattr(tokenizer, "__class__", theirs))
    assert len(asked) == 7
