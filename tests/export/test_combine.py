"""Combining adapters: PEFT's add_weighted_adapter, tensor by tensor."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.export.conftest import MakeRun
from tests.folders import save_model
from tunefork.errors import AdapterError, BadInputError, IdentityError
from tunefork.export.adapter import pad_rank, read_adapter, write_adapter
from tunefork.export.combine import combine_adapters, parse_weights
from tunefork.recipe import Method
from tunefork.registry.opening import find_parts
from tunefork.registry.provenance import read_provenance

WEIGHTS = [0.7, -0.4]


def _peft(first: Path, second: Path, base: Path, kind: str, density: float | None) -> dict:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), first, adapter_name="a"
    )
    model.load_adapter(second, adapter_name="b")
    torch.manual_seed(3)
    # PEFT draws the new adapter's own initial values first, from the same generator: skip them.
    state = torch.get_rng_state()
    injecting = type(model.base_model).inject_adapter

    def inject(self, *arguments, **options):  # type: ignore[no-untyped-def]
        injecting(self, *arguments, **options)
        torch.set_rng_state(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.base_model), "inject_adapter", inject)
        model.base_model.add_weighted_adapter(
            ["a", "b"], WEIGHTS, "mixed", combination_type=kind, density=density
        )
    return {
        name.replace(".mixed", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".mixed." in name
    }


@pytest.mark.parametrize(
    ("kind", "density"),
    [("linear", None), ("cat", None), ("ties", 0.4), ("dare_linear", 0.5), ("dare_ties", 0.5)],
)
def test_it_is_pefts_tensor_by_tensor(
    make_run: MakeRun, tmp_path: Path, kind: str, density: float | None
) -> None:
    first, second = make_run(name="one") / "adapter", make_run(name="two") / "adapter"
    wanted = _peft(first, second, tmp_path / "base-llama", kind, density)
    combine_adapters(
        [str(first), str(second)],
        tmp_path / "mixed",
        kind=kind,
        weights=WEIGHTS,
        density=density,
        seed=3,
    )
    found = load_file(tmp_path / "mixed" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys() and len(found) == 28
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    mixed = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base-llama"), tmp_path / "mixed"
    )
    assert mixed.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 1.0


def test_cat_is_the_exact_sum_of_the_deltas(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run(name="one") / "adapter", make_run(name="two") / "adapter"]
    combine_adapters(list(map(str, folders)), tmp_path / "m", kind="cat", weights=WEIGHTS)
    mixed, parts = read_adapter(tmp_path / "m"), [read_adapter(f) for f in folders]
    for path, (a_rd, b_or) in mixed.deltas.items():
        total = sum(
            w * p.scale * p.deltas[path][1] @ p.deltas[path][0]
            for w, p in zip(WEIGHTS, parts, strict=True)
        )
        torch.testing.assert_close(mixed.scale * b_or @ a_rd, total)


def test_what_cannot_be_combined_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    one, other = make_run(name="one") / "adapter", make_run(name="two", architecture="qwen3")
    quantised = make_run(Method.QLORA, name="three")

    def refuse(
        message: str, *targets: Path, kind: str = "linear", density: float | None = None
    ) -> None:
        with pytest.raises(BadInputError, match=message):
            combine_adapters(
                list(map(str, targets)), tmp_path / "m", kind=kind, weights=[1, 1], density=density
            )
        assert not (tmp_path / "m").exists()

    refuse("belongs to .*qwen3, but .* to .*llama", one, other)
    refuse("quantised to NF4", one, quantised)
    refuse("--combine: svd is none of", one, one, kind="svd")
    refuse("--density: ties needs a share", one, one, kind="ties")
    refuse("--density: linear keeps", one, one, density=0.5)
    refuse("is no adapter", one, tmp_path / "base-llama")
    padded = tmp_path / "padded"
    write_adapter(pad_rank(read_adapter(one), 8), padded)
    with pytest.raises(AdapterError, match=r"needs adapters of one rank, but they have \[4, 8\]"):
        combine_adapters([str(one), str(padded)], tmp_path / "m", kind="linear", weights=[1, 1])


def test_weights_are_read() -> None:
    assert parse_weights(None, 2) == [1.0, 1.0]
    assert parse_weights("0.5,-1", 2) == [0.5, -1.0]
    for wrong in ("a,b", "1", "nan,1"):
        with pytest.raises(BadInputError, match="--weights"):
            parse_weights(wrong, 2)


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_a_combination_knows_its_base(make_run: MakeRun, tmp_path: Path, method: Method) -> None:
    folders = [str(make_run(method, name=name) / "adapter") for name in ("one", "two")]
    out = tmp_path / "out"
    combine_adapters(folders, out, kind="cat", weights=[1.0, 1.0])
    origin = read_provenance(out)
    assert origin is not None and origin.parent == ", ".join(folders)
    assert find_parts(str(out)).is_nf4 == (method is Method.QLORA)
    card = (out / "README.md").read_text()
    assert f"Made from: {folders[0]}" in card and "No proof was made" in card
    save_model(tmp_path / "base-llama", seed=5)
    with pytest.raises(IdentityError, match="weights"):
        combine_adapters([str(out), str(out)], tmp_path / "again", kind="cat", weights=[1.0, 1.0])
