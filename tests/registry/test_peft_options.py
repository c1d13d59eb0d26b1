"""DoRA, patterns, modules_to_save and trained tokens: interchangeable with the PEFT library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file

from tests.tiny import VOCABULARY, tiny_model
from tunefork.errors import AdapterError, ModelError
from tunefork.model.build import add_deltas, build
from tunefork.model.dora import Delta, DoraLinear
from tunefork.model.tokens import TokenEmbedding, TokenHead, grow
from tunefork.recipe import LoraSection, Method
from tunefork.registry.peft_format import CONFIG, WEIGHTS, load_adapter, save_adapter

IDS = torch.arange(3, 40)[None]
TYING = "ignore:Model has `tie_word_embeddings=True`"
NEW = (VOCABULARY, VOCABULARY + 1)
NEW_IDS = torch.tensor([[5, NEW[0], 7, NEW[1], 9]])


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(ids).logits
    return logits


def _shake(model: Any) -> Any:
    """Change everything that is trained, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise.to(parameter.dtype)
    return model


THEIRS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 3},
        "alpha_pattern": {"v_proj": 3, "0.self_attn.q_proj": 5},
    },
    "exclude": {
        "target_modules": r".*\.(q_proj|v_proj|down_proj)",
        "exclude_modules": r".*layers\.0\.mlp\.down_proj",
    },
    "exclude-list": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "layers-pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 11]},
    "rows-both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 11], "lm_head": [5, 11]},
    },
    "rows-differ": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 11], "lm_head": [6]},
    },
    "rows-head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [6, 9]}},
}


@pytest.mark.filterwarnings(TYING, "ignore:ensure_weight_tying=True but")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize(  # tied, untied, scaled
    "architecture", ["llama", "qwen3", pytest.param("gemma3", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", THEIRS)
def test_theirs_loads_here(case: str, architecture: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=7, **THEIRS[case])
    theirs = _shake(get_peft_model(tiny_model(architecture), config))
    theirs.save_pretrained(str(tmp_path))
    base = tiny_model(architecture)
    # What the adapter file says is the oracle, not the shaken model: "tied" shares a tensor.
    again = PeftModel.from_pretrained(tiny_model(architecture), str(tmp_path))
    ours = tiny_model(architecture)
    assert load_adapter(ours, tmp_path) is False
    assert (_logits(ours) - _logits(again)).abs().max() < 1e-5 * _logits(again).abs().max()
    assert (_logits(ours) - _logits(base)).abs().max() > 1e-2
    assert not any(p.requires_grad for p in ours.parameters())


OURS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True, "dropout": 0.1},
    "dora-rslora": {"dora": True, "scaling": "rslora", "targets": "attention"},
    "embedding": {"modules_to_save": ("embed_tokens",)},
    "head": {"modules_to_save": ("lm_head",)},
    "whole": {"modules_to_save": ("lm_head", "embed_tokens", "model.norm")},
}


@pytest.mark.filterwarnings(TYING)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("case", OURS)
def test_ours_loads_in_peft(case: str, architecture: str, tmp_path: Path) -> None:
    lora = LoraSection.model_validate({"rank": 4} | OURS[case])
    ours = tiny_model(architecture)
    add_deltas(ours, lora, seed=0)
    save_adapter(_shake(ours), tmp_path, lora, base="tiny")
    theirs = PeftModel.from_pretrained(tiny_model(architecture), str(tmp_path))
    assert (_logits(ours) - _logits(theirs)).abs().max() < 1e-5 * _logits(theirs).abs().max()
    assert (_logits(ours) - _logits(tiny_model(architecture))).abs().max() > 1e-2
    again = tiny_model(architecture)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(_logits(again), _logits(ours))


@pytest.mark.filterwarnings(TYING)
@pytest.mark.parametrize("whole", [(), ("embed_tokens", "lm_head")], ids=["rows", "whole"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_added_tokens_load_in_peft(
    architecture: str, whole: tuple[str, ...], tmp_path: Path
) -> None:
    lora = LoraSection(rank=4, modules_to_save=whole)
    ours = tiny_model(architecture)
    grow(ours, NEW)
    add_deltas(ours, lora, seed=0, new_ids=NEW)
    save_adapter(_shake(ours), tmp_path, lora, base="tiny")
    resized = tiny_model(architecture)
    resized.resize_token_embeddings(NEW[-1] + 1, mean_resizing=False)  # as AutoPeftModel does
    theirs = PeftModel.from_pretrained(resized, str(tmp_path))
    expected = _logits(ours, NEW_IDS)
    assert (_logits(theirs, NEW_IDS) - expected).abs().max() < 1e-5 * expected.abs().max()
    again = tiny_model(architecture)
    assert load_adapter(again, tmp_path) is True
    torch.testing.assert_close(_logits(again, NEW_IDS), expected)


def test_untying_is_said_by_the_configuration() -> None:
    model = tiny_model("llama")
    add_deltas(model, LoraSection(rank=2, modules_to_save=("lm_head",)), seed=0)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


def test_dora_over_nf4_loads_in_peft_over_the_same_weights(tmp_path: Path) -> None:
    lora = LoraSection(rank=4, dora=True)
    ours = tiny_model("llama")
    build(ours, Method.QLORA, lora, seed=0)
    save_adapter(_shake(ours), tmp_path, lora, base="tiny")
    rounded = tiny_model("llama")
    for path, module in ours.named_modules():
        if isinstance(module, DoraLinear):
            rounded.get_submodule(path).weight.data.copy_(module.materialize())
    theirs = PeftModel.from_pretrained(rounded, str(tmp_path))
    assert (_logits(ours) - _logits(theirs)).abs().max() < 1e-4


def test_dropout_in_dora_is_pefts() -> None:
    lora = LoraSection(rank=4, dora=True, dropout=0.5, targets=("q_proj",))
    ours = tiny_model("llama")
    add_deltas(ours, lora, seed=0)
    layer = _shake(ours).model.layers[0].self_attn.q_proj
    config = LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.5, use_dora=True, target_modules=["q_proj"]
    )
    theirs = get_peft_model(tiny_model("llama"), config).base_model.model.model.layers[0]
    other = theirs.self_attn.q_proj
    assert isinstance(other, LoraLayer)
    other.lora_A["default"].weight.data.copy_(layer.lora_a)
    other.lora_B["default"].weight.data.copy_(layer.lora_b)
    other.lora_magnitude_vector["default"].weight.data.copy_(layer.magnitude)
    x = torch.randn(6, 32)
    outputs = []
    for module in (layer.train(), other.train()):
        torch.manual_seed(3)
        outputs.append(module(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_what_equals_the_base_is_dead(tmp_path: Path) -> None:
    for lora in (
        LoraSection(rank=4, dora=True),
        LoraSection(rank=4, modules_to_save=("model.norm", "lm_head")),
    ):
        model = tiny_model("llama")
        add_deltas(model, lora, seed=0)
        save_adapter(model, tmp_path, lora, base="tiny")
        with pytest.raises(AdapterError, match="would change nothing"):
            load_adapter(tiny_model("llama"), tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        key = min(k for k in tensors if "magnitude" in k or "norm" in k)
        tensors[key] *= 1.5  # one module alone is alive
        save_file(tensors, tmp_path / WEIGHTS)
        load_adapter(tiny_model("llama"), tmp_path)


def test_a_tied_pair_that_differs_is_refused(tmp_path: Path) -> None:
    lora = LoraSection(rank=4, modules_to_save=("embed_tokens", "lm_head"))
    model = tiny_model("llama")
    add_deltas(model, lora, seed=0)
    save_adapter(_shake(model), tmp_path, lora, base="tiny")
    config = json.loads((tmp_path / CONFIG).read_text()) | {"ensure_weight_tying": True}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_only_the_new_rows_are_trained_and_tied_ones_are_one() -> None:
    for architecture, num_rows in (("llama", 1), ("qwen3", 2)):
        model = tiny_model(architecture)
        grow(model, NEW)
        before = _logits(model, NEW_IDS)
        add_deltas(model, LoraSection(rank=2, targets=("q_proj",)), seed=0, new_ids=NEW)
        torch.testing.assert_close(_logits(model, NEW_IDS), before)
        assert isinstance(model.model.embed_tokens, TokenEmbedding)
        assert isinstance(model.lm_head, TokenHead)
        trained = [p for p in model.parameters() if p.requires_grad]
        deltas = sum(isinstance(m, Delta) for m in model.modules())
        assert len(trained) == 2 * deltas + num_rows
        model(NEW_IDS, labels=NEW_IDS).loss.backward()
        rows = model.model.embed_tokens.rows
        assert rows.grad is not None and bool(rows.grad.any(1).all())
        base = model.lm_head.base.weight.clone()
        torch.optim.SGD(trained, lr=0.1).step()
        assert torch.equal(model.lm_head.base.weight, base)


def test_recipes_that_leave_new_rows_untrained_are_refused() -> None:
    model = tiny_model("qwen3")
    grow(model, NEW)
    lora = LoraSection(rank=2, modules_to_save=("embed_tokens",))
    with pytest.raises(ModelError, match="would stay untrained; name both, or neither"):
        add_deltas(model, lora, seed=0, new_ids=NEW)


@pytest.mark.parametrize(
    ("lora", "method", "message"),
    [
        ({"modules_to_save": ("lm_haed",)}, Method.LORA, "did you mean 'lm_head'"),
        ({"modules_to_save": ("q_proj",)}, Method.LORA, "leave it out of one of the two"),
        ({"modules_to_save": ("q_proj",), "targets": "mlp"}, Method.QLORA, "4 bits"),
    ],
)
def test_modules_that_cannot_be_saved_are_refused(
    lora: dict[str, Any], method: Method, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build(tiny_model("llama"), method, LoraSection.model_validate({"rank": 2} | lora), seed=0)
