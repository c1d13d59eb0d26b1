"""The PEFT library as oracle: its adapters load here, ours load there, with the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.folders import save_gguf, save_model
from tests.tiny import CONFIGS, tiny_model
from tunefork.errors import AdapterError
from tunefork.model.build import add_deltas
from tunefork.model.linear import LoraLinear
from tunefork.model.load import find, load_model
from tunefork.model.packaged import PACKAGED
from tunefork.recipe import LoraSection, ModelSection
from tunefork.registry.peft_format import (
    CONFIG,
    WEIGHTS,
    base_section,
    load_adapter,
    save_adapter,
)

IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(IDS).logits
    return logits


def _trained(architecture: str, lora: LoraSection) -> Any:
    """A model whose deltas are random, as if trained."""
    model = tiny_model(architecture)
    add_deltas(model, lora, seed=0)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_b.data.normal_(std=0.1)
    return model


SECTIONS = [
    LoraSection(rank=4),
    LoraSection.model_validate({"rank": 8, "scaling": "rslora", "targets": "attention"}),
]


@pytest.mark.parametrize("lora", SECTIONS, ids=["standard", "rslora"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_ours_loads_in_peft(architecture: str, lora: LoraSection, tmp_path: Path) -> None:
    ours = _trained(architecture, lora)
    save_adapter(ours, tmp_path, lora, base="tiny")
    theirs = PeftModel.from_pretrained(tiny_model(architecture), str(tmp_path))
    base = tiny_model(architecture)
    assert (_logits(ours) - _logits(theirs)).abs().max() < 1e-4
    assert (_logits(ours) - _logits(base)).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", CONFIGS)
def test_theirs_loads_here(architecture: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", use_rslora=True)
    theirs = get_peft_model(tiny_model(architecture), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    theirs.save_pretrained(str(tmp_path))
    ours = tiny_model(architecture)
    load_adapter(ours, tmp_path)
    assert (_logits(ours) - _logits(theirs.eval())).abs().max() < 1e-4
    assert (_logits(ours) - _logits(tiny_model(architecture))).abs().max() > 1e-2


def test_part_of_a_name_is_written_as_paths(tmp_path: Path) -> None:
    lora = LoraSection(rank=2, targets=("layers.1.mlp.up_proj", "q_proj"))
    model = _trained("llama", lora)
    save_adapter(model, tmp_path, lora, base="tiny")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj", "q_proj"]
    other = tiny_model("llama")
    load_adapter(other, tmp_path)
    torch.testing.assert_close(_logits(other), _logits(model))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_peft_finds_the_base_by_itself(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`AutoPeftModel` takes nothing but the adapter's folder, from whatever directory."""
    monkeypatch.setenv("TUNEFORK_CACHE", str(tmp_path / "cache"))
    base = tmp_path / ("base" if kind == "folder" else "base.gguf")
    save_model(base) if kind == "folder" else save_gguf(base)
    monkeypatch.chdir(tmp_path)
    section, lora = ModelSection(id=f"./{base.name}"), LoraSection(rank=4)
    ours = load_model(section, dtype=torch.float32, device=torch.device("cpu")).eval()
    add_deltas(ours, lora, seed=0)
    for module in ours.modules():
        if isinstance(module, LoraLinear):
            module.lora_b.data.normal_(std=0.1)
    save_adapter(ours, tmp_path / "adapter", lora, base=section.id)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    theirs = AutoPeftModelForCausalLM.from_pretrained(
        str(tmp_path / "adapter"), dtype=torch.float32
    )
    assert (_logits(ours) - _logits(theirs.eval())).abs().max() < 1e-4
    assert (
        find(base_section(tmp_path / "adapter")).location
        == (json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"])
    )


def test_the_revision_of_a_hub_model_is_kept(tmp_path: Path) -> None:
    lora = LoraSection(rank=4)
    save_adapter(_trained("llama", lora), tmp_path, lora, base="owner/name", revision="v2")
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.base_model_name_or_path, config.revision) == ("owner/name", "v2")
    assert base_section(tmp_path) == ModelSection(id="owner/name", revision="v2")


def test_a_base_that_is_gone_costs_no_adapter(tmp_path: Path) -> None:
    lora = LoraSection(rank=4)
    save_adapter(_trained("llama", lora), tmp_path, lora, base="/gone/base.gguf")
    assert base_section(tmp_path) == ModelSection(id="/gone/base.gguf")


def test_a_packaged_base_is_found_on_a_machine_that_has_not_converted_it(
    saved: Path,
) -> None:
    name, packaged = next(iter(PACKAGED.items()))
    converted = f"/home/other/.cache/tunefork/converted/{packaged.sha256}"
    config = json.loads((saved / CONFIG).read_text()) | {"base_model_name_or_path": converted}
    (saved / CONFIG).write_text(json.dumps(config))
    assert base_section(saved) == ModelSection(id=name)
    (saved / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="base_model_name_or_path is missing"):
        base_section(saved)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lora = LoraSection(rank=4)
    save_adapter(_trained("llama", lora), tmp_path, lora, base="tiny")
    return tmp_path


def _change(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def test_dead_or_damaged_adapters_are_refused(saved: Path) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if "lora_B" in key:
                tensors[key].zero_()

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)

    cases: list[tuple[Any, str]] = [
        (lambda t: t.pop(_B), r"no tensors for model\.layers\.0\.self_attn\.q_proj\.lora_B"),
        (lambda t: (t.pop(_A), t.pop(_B)), r"no tensors for model\.layers\.0\.self_attn\.q_proj"),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(1)}), r"unexpected key x\.lora_A"),
        (lambda t: t.update({_A: torch.ones(4, 5)}), r"lora_A has shape \(4, 5\)"),
        (lambda t: t[_A].fill_(float("nan")), "NaN or infinite"),
        (rename, r"no tensors for model\.layers\.0"),
        (zero, "every lora_B is zero"),
    ]
    good = (saved / WEIGHTS).read_bytes()
    for change, message in cases:
        (saved / WEIGHTS).write_bytes(good)
        _change(saved, change)
        with pytest.raises(AdapterError, match=message):
            load_adapter(tiny_model("llama"), saved)


def test_an_adapter_of_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"does not have|no tensors"):
        load_adapter(tiny_model("gpt_neox"), saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_bias", True, "lora_bias=True is not supported"),
        ("init_lora_weights", "pissa", "init_lora_weights='pissa' is not supported"),
        ("an_option_of_2027", 3, "an_option_of_2027=3 is not supported"),
        ("modules_to_save", ["lm_head"], r"no tensors for lm_head"),
        ("modules_to_save", ["mlp"], "a block of modules"),
        ("use_dora", True, "no tensors for .*lora_magnitude_vector"),
        ("peft_type", "IA3", "only LORA"),
        ("r", None, "r is missing"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    saved: Path, key: str, value: Any, message: str
) -> None:
    config = json.loads((saved / CONFIG).read_text()) | {key: value}
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_model("llama"), saved)
