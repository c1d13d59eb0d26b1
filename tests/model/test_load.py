"""What a recipe's `model` may name, and how everything else is refused."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from tests.folders import EOS, save_model
from tests.model.packed_models import REFUSE, made
from tests.tiny import CONFIGS
from tunefork.errors import ModelError
from tunefork.model.attention import NAME
from tunefork.model.build import check_lora, quantize_nf4
from tunefork.model.load import find, load_model, load_skeleton, load_tokenizer
from tunefork.model.onednn import MOST
from tunefork.model.packed_probe import takes_segments
from tunefork.recipe import LoraSection, ModelSection

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]
WEIGHTS = "model.safetensors"


MAPS = Path("/proc/self/maps")


def _load(location: Path | str, **options: Any) -> Any:
    section = ModelSection(id=str(location), **options)
    return load_model(section, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to do damage to."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# What loads


@torch.no_grad()
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_folder_loads_as_it_was_saved(architecture: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, architecture)
    loaded = _load(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_the_dtype_is_the_one_asked_for(saved: Path) -> None:
    model = load_model(ModelSection(id=str(saved)), dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_few_shapes_of_products_are_remembered(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, untold = "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(told, "7")
    monkeypatch.setenv(untold, "7")  # so that it is put back afterwards
    monkeypatch.delenv(untold)
    _load(saved)
    assert (os.environ[told], os.environ[untold]) == ("7", str(MOST))


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux says what is mapped into memory")
def test_a_quantised_model_lets_go_of_its_file(folder: Path) -> None:
    model = _load(folder)
    assert str(folder) in MAPS.read_text()
    before = model.get_input_embeddings().weight.clone()
    quantize_nf4(model)
    assert str(folder) not in MAPS.read_text()
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_skeleton_has_shapes_and_no_weights(saved: Path) -> None:
    skeleton = load_skeleton(ModelSection(id=str(saved)))
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    names = {name: p.shape for name, p in _load(saved).named_parameters()}
    assert {name: p.shape for name, p in skeleton.named_parameters()} == names


def test_dropout_of_the_base_is_off(folder: Path) -> None:
    _change_config(folder, attention_dropout=0.5)
    attention = _load(folder).model.layers[0].self_attn
    assert attention.attention_dropout == 0.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_device_has_our_attention(saved: Path, device: str) -> None:
    section = ModelSection(id=str(saved))
    on = torch.device(device)
    model = load_model(section, dtype=torch.float32, device=on, in_host_memory=True)
    assert model.config._attn_implementation == NAME
    assert takes_segments(model)


def test_soft_capping_is_never_left_to_sdpa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)  # so says version 5.17
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_attention_backend", True)
    model = made(REFUSE["soft-capping"])
    model.save_pretrained(tmp_path)
    loaded = _load(tmp_path)
    assert loaded.config._attn_implementation == "eager"
    assert not takes_segments(loaded)


def test_the_tokenizer_comes_with_its_template(saved: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(id=str(saved)))
    assert tokenizer.is_fast and tokenizer.eos_token == EOS
    assert "im_start" in tokenizer.chat_template


# What names no model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/gone/model", "is no model: give a Hugging Face folder, a .gguf file, a hub id"),
        ("./gone", "is no model"),
        ("a/b/c", "is no model"),
        ("gone.gguf", "gone.gguf: no such file"),
        ("~nobody-at-all/x", "is no model: Could not determine home"),
        ("x" * 300, "xxx "),  # a name too long for a file, and for the hub
        ("two words", "two words cannot be loaded: Repo id must use"),
        ("smollm2-135m", "cannot be loaded; did you mean 'smollm2-135m-instruct'?"),
    ],
)
def test_names_of_nothing(name: str, message: str, offline: None) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelSection(id=name))
    assert str(caught.value).startswith("model.id: ") and message in str(caught.value)


def test_an_unknown_hub_id_offline_says_what_it_needs(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"owner/nothing cannot be loaded: .*needs the network"):
        _load("owner/nothing")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"loaded; the folder runs has no gone, and as a hub id: "):
        _load("runs/gone")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is no model: give a Hugging Face folder"):
        find(ModelSection(id=str(file)))


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "model.gguf", "folder"])
def test_only_hub_models_have_revisions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match=r"model.revision: 'v2' is given, but .* is no hub id"):
        find(ModelSection(id=name, revision="v2"))


# Folders that are damaged or lack something


def _cut_in_half(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _drop_a_layer(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    "unknown type": (lambda f: _change_config(f, model_type="novel"), "`novel`"),
    "wrong field": (lambda f: _change_config(f, num_hidden_layers="x"), "expected int, got str"),
    "quantised": (
        lambda f: _change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "already quantised; give the unquantised weights",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no file named model.safetensors"),
    "half the weights": (_cut_in_half, "cannot be loaded: Error while deserializing header"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), "header too large"),
    "a layer lacks": (_drop_a_layer, r"lacks model\.layers\.1\.mlp\.down_proj.* and 2 more"),
    "no head": (lambda f: _change_config(f, tie_word_embeddings=False), r"lacks lm_head\.weight"),
    "other width": (
        lambda f: _change_config(f, intermediate_size=64),
        r"has in another shape .* model\.layers\.0\.mlp\.down_proj\.weight and 5 more",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused(case: str, folder: Path) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        _load(folder)
    assert str(folder) in str(caught.value) and "network" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", '{"a": 1}', '{"added_tokens": [], "model": {}}'])
def test_a_tokenizer_that_cannot_be_read(folder: Path, text: str | None) -> None:
    file = folder / "tokenizer.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(ModelSection(id=str(folder)))


# Code, and architectures that are not trained


@pytest.mark.parametrize("model_type", ["llama", "novel"])
def test_remote_code_is_never_run(folder: Path, model_type: str) -> None:
    """Of a type that transformers knows its own class is taken; any other folder is refused."""
    trace = folder / "was-run"
    classes = "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (folder / "novel.py").write_text(f"open({str(trace)!r}, 'w')\n{classes}")
    code = {"AutoConfig": "novel.C", "AutoModelForCausalLM": "novel.M"}
    _change_config(folder, model_type=model_type, auto_map=code)
    tokenizer = folder / "tokenizer_config.json"
    fields = {"auto_map": {"AutoTokenizer": ["novel.T", "novel.T"]}, "tokenizer_class": "T"}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | fields))
    if model_type == "llama":
        assert type(_load(folder)).__module__.startswith("transformers.")
    else:
        with pytest.raises(ModelError, match="contains custom code"):
            _load(folder)
    with contextlib.suppress(ModelError):  # refused, or read from tokenizer.json
        load_tokenizer(ModelSection(id=str(folder)))
    assert not trace.exists()


_SIZES: dict[str, Any] = {"vocab_size": 50, "num_attention_heads": 2, "num_hidden_layers": 1}


def _bert() -> Any:
    return BertForMaskedLM(BertConfig(**_SIZES, hidden_size=16, intermediate_size=16))


def _bart() -> Any:
    sizes = {f"{side}_{x}": 2 for side in ("encoder", "decoder") for x in ("layers", "ffn_dim")}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    return BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=16, **sizes, **heads))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_bert, r"is a bert model \(BertForMaskedLM\), not a decoder-only"),
        (_bart, r"is a bart model \(BartForConditionalGeneration\), not a decoder-only"),
        (T5Config, "is a t5 model .* not a decoder-only"),
    ],
)
def test_encoders_are_refused_by_name(make: Any, message: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    for load in (_load, lambda path: load_skeleton(ModelSection(id=str(path)))):
        with pytest.raises(ModelError, match=message):
            load(tmp_path)


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16))


def _mixtral() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**_SIZES, **sizes, num_key_value_heads=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_gpt2, r"GPT2LMHeadModel: transformer\.h\.0\.attn\.c_attn is a Conv1D"),
        (_mixtral, r"MixtralForCausalLM: .*experts.* holds the weights of several experts"),
    ],
)
def test_layers_that_deltas_do_not_cover_are_refused_before_any_weight_is_read(
    make: Any, message: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=message):
        check_lora(load_skeleton(ModelSection(id=str(tmp_path))), LoraSection())
