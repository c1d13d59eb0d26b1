"""Two versions compared, against the deltas made in full."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.registry.artefacts import LAYER, save_artefact
from tunefork.registry.difference import delta_norm, diff
from tunefork.registry.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "home") as store:
        yield store


def _delta(folder: Path, scale: float) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"{LAYER}.lora_{which}.weight"].double() for which in "AB")
    return torch.matmul(scale * b, a)


def test_the_same_is_the_same(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a")
    store.publish(artefact, "a"), store.publish(artefact, "a")
    found = diff(store, "a:v1", "a:v2")
    assert (found.lineage, found.config, found.files, found.layers) == ({}, {}, {}, ())


def test_layers_are_compared_by_what_they_do(store: Store, tmp_path: Path) -> None:
    """Ranks and alphas differ: it is s B A that counts, against the (O, D) product."""
    one = save_artefact(tmp_path / "a", seed=1, rank=2, alpha=4.0)
    two = save_artefact(tmp_path / "b", seed=2, rank=3, alpha=9.0)
    store.publish(one, "a"), store.publish(two, "b")
    (layer,) = diff(store, "a", "b").layers
    assert layer.layer == "model.layers.0.self_attn.q_proj"
    first, second = _delta(one, 2.0), _delta(two, 3.0)
    assert layer.a_norm == pytest.approx(float(first.norm()), rel=1e-12)
    assert layer.b_norm == pytest.approx(float(second.norm()), rel=1e-12)
    expected = float((first - second).norm() / first.norm())
    assert layer.change == pytest.approx(expected, rel=1e-12)


def test_rslora_and_a_pattern_scale_as_in_peft(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a", rank=4, alpha=8.0)
    store.publish(artefact, "a")
    config = json.loads((artefact / "adapter_config.json").read_text())
    weights = load_file(artefact / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.ones(2)
    save_file(weights, artefact / "adapter_model.safetensors")
    for extra, scale in (({"use_rslora": True}, 4.0), ({"alpha_pattern": {"q_proj": 2}}, 0.5)):
        (artefact / "adapter_config.json").write_text(json.dumps(config | extra))
        version = store.publish(artefact, "b")
        found = diff(store, "a", str(version))
        assert set(found.config) == set(extra) and list(found.files) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert found.other_tensors == ("base_model.model.lm_head.weight",)
        assert found.layers[0].b_norm == pytest.approx(float(_delta(artefact, scale).norm()))


def test_another_alpha_alone_is_another_delta(store: Store, tmp_path: Path) -> None:
    for name, alpha in (("a", 4.0), ("b", 6.0)):
        store.publish(save_artefact(tmp_path / "a", alpha=alpha), name)
    found = diff(store, "a", "b")
    assert list(found.files) == ["adapter_config.json"] and found.config == {
        "lora_alpha": (4.0, 6.0)
    }
    assert found.layers[0].change == pytest.approx(0.5)


def test_nearly_equal_deltas_keep_their_digits() -> None:
    """By Gram matrices in float64 a relative change of 1e-10 would drown."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 50).double(), torch.randn(40, 4).double()
    near = b * (1 + 1e-10)
    change = delta_norm(torch.cat([a, a]), torch.cat([b, -near], dim=1)) / delta_norm(a, b)
    assert change == pytest.approx(1e-10, rel=1e-4)


def test_a_layer_that_only_one_has(store: Store, tmp_path: Path) -> None:
    one, two = (save_artefact(tmp_path / name) for name in "ab")
    weights = load_file(two / "adapter_model.safetensors")
    moved = {key.replace("q_proj", "v_proj"): tensor for key, tensor in weights.items()}
    save_file(moved, two / "adapter_model.safetensors")
    store.publish(one, "a"), store.publish(two, "b")
    layers = {layer.layer[-6:]: layer for layer in diff(store, "a", "b").layers}
    assert layers["q_proj"].b_norm is None and layers["v_proj"].a_norm is None
    assert layers["q_proj"].change is None and layers["q_proj"].a_norm


def test_lineage_and_recipes_are_compared_field_by_field(store: Store, tmp_path: Path) -> None:
    for name, rank in (("a", 2), ("b", 8)):
        artefact = save_artefact(tmp_path / name)
        told = {"recipe": {"lora": {"rank": rank, "alpha": 1}}, "data_sha256": name * 64}
        (artefact / "tunefork.json").write_text(json.dumps(told))
        store.publish(artefact, name)
    found = diff(store, "a", "b")
    assert found.lineage == {
        "recipe.lora.rank": (2, 8),
        "data_sha256": ("a" * 64, "b" * 64),
    }
