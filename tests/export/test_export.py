"""Each form, written, read back from the disk and proven; and the refusals."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.export.conftest import MakeRun
from tests.folders import save_model
from tunefork.errors import AdapterError, BadInputError, IdentityError, RunFolderError
from tunefork.export.adapter import pad_rank, read_adapter, write_adapter
from tunefork.export.export import FORMS, Exported, Form, Options, export
from tunefork.export.proof import Gate
from tunefork.export.publish import ExportFailedError
from tunefork.model.build import build
from tunefork.model.device import pick_device
from tunefork.model.fingerprint import identify
from tunefork.model.load import load_model
from tunefork.recipe import LoraSection, Method, ModelSection
from tunefork.registry.opening import find_parts, open_model
from tunefork.registry.peft_format import save_adapter
from tunefork.registry.provenance import Provenance, read_provenance, write_provenance

GATE = Gate(num_tokens=128)
IDS = torch.arange(5, 37)[None]


def _export(run: Path, form: Form, out: Path, **options: Any) -> Exported:
    return export(str(run), form, out, options=Options(**options), gate=GATE)


def _peft(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = PeftModel.from_pretrained(model, adapter).eval()(IDS).logits
    return logits


@pytest.mark.parametrize(
    ("form", "files", "command"),
    [
        ("peft", {"adapter_model.safetensors", "adapter_config.json"}, "tunefork chat"),
        ("merged", {"model.safetensors", "generation_config.json"}, "tunefork chat"),
        ("gguf", {"model-f16.gguf"}, "llama-server -m"),
        ("gguf-lora", {"base-f16.gguf", "lora-f16.gguf"}, "--lora"),
        ("ollama", {"model-f16.gguf", "Modelfile"}, "ollama create out"),
        ("vllm", {"adapter_model.safetensors", "tokenizer.json"}, "--max-lora-rank 8"),
        ("sglang", {"adapter_model.safetensors", "tokenizer.json"}, "--max-lora-rank 4"),
    ],
)
def test_each_form_is_written_proven_and_says_how_to_run(
    make_run: MakeRun, tmp_path: Path, form: Form, files: set[str], command: str
) -> None:
    made = _export(make_run(dtype=torch.float32), form, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found >= files | {"README.md", "proof.json"} and not {"merged", "back"} & found
    assert made.proof.passed and made.proof.agreement.mean_kl < 1e-4
    assert command in made.command and form in FORMS


def test_the_exported_adapter_answers_alike_in_peft(make_run: MakeRun, tmp_path: Path) -> None:
    run, base = make_run(dtype=torch.float32), tmp_path / "base-llama"
    wanted = _peft(base, run / "adapter")
    _export(run, "peft", tmp_path / "same")
    torch.testing.assert_close(_peft(base, tmp_path / "same"), wanted, rtol=0, atol=0)
    made = _export(run, "vllm", tmp_path / "padded", pad_rank=0)
    torch.testing.assert_close(_peft(base, tmp_path / "padded"), wanted, rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path / "padded").rank == 8 and "padded" in made.notes[0]


@pytest.mark.parametrize("rslora", [False, True])
def test_padding_keeps_the_scale(make_run: MakeRun, tmp_path: Path, rslora: bool) -> None:
    adapter = read_adapter(make_run() / "adapter")
    adapter.config["use_rslora"] = rslora
    padded = pad_rank(adapter, 7)
    assert padded.scale == pytest.approx(adapter.scale) and padded.rank == 7
    for path, (a_rd, b_or) in adapter.deltas.items():
        a_pad, b_pad = padded.deltas[path]
        assert a_pad.shape[0] == b_pad.shape[1] == 7
        torch.testing.assert_close(b_pad @ a_pad, b_or @ a_rd)
    with pytest.raises(AdapterError, match="cannot be padded to 2"):
        pad_rank(adapter, 2)


def test_bf16_halves_the_file(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(dtype=torch.float32)
    made = _export(run, "peft", tmp_path / "half", dtype="bf16")
    tensors = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert 0 < made.proof.agreement.mean_kl < 1e-3


def test_sglang_gets_rsloras_scale_as_it_reads_it(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(dtype=torch.float32)
    adapter = read_adapter(run / "adapter")
    adapter.config["use_rslora"] = True
    write_adapter(adapter, run / "adapter")
    made = _export(run, "sglang", tmp_path / "out")
    exported = read_adapter(tmp_path / "out")
    assert exported.config["lora_alpha"] / exported.rank == adapter.scale
    assert made.proof.agreement.mean_kl < 1e-6 and "rsLoRA" in made.notes[0]


def test_a_server_refuses_what_it_has_not(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(dtype=torch.float32)
    adapter = read_adapter(run / "adapter")
    adapter.config["init_lora_weights"] = "pissa"
    write_adapter(adapter, run / "adapter")
    with pytest.raises(AdapterError, match="init_lora_weights='pissa' is not supported"):
        _export(run, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["vllm", "gguf-lora", "peft"])
def test_a_qlora_adapter_is_proven_on_the_base_that_the_client_has(
    make_run: MakeRun, tmp_path: Path, form: Form
) -> None:
    run, open_gate = make_run(Method.QLORA), Gate(max_kl=100, max_mean_kl=100, min_top1=0)
    made = export(str(run), form, tmp_path / "out", options=Options(), gate=open_gate)
    is_nf4 = form == "peft"
    assert (made.proof.agreement.mean_kl < 1e-6) == is_nf4
    assert ("original base" in made.proof.exported) != is_nf4


def test_ollama_takes_the_adapter_beside_its_base(make_run: MakeRun, tmp_path: Path) -> None:
    _export(make_run(dtype=torch.float32), "ollama", tmp_path / "out", with_adapter=True)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./base-f16.gguf\nADAPTER ./lora-f16.gguf\n")


def test_full_runs_become_gguf_and_have_no_adapter(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(Method.FULL, dtype=torch.float32)
    made = _export(run, "gguf", tmp_path / "out", kind="f32")
    assert made.proof.agreement.mean_kl < 1e-6
    for form in ("peft", "gguf-lora", "vllm"):
        with pytest.raises(RunFolderError, match="has no adapter"):
            _export(run, form, tmp_path / form)
    assert _export(run, "merged", tmp_path / "merged").proof.exported == "the model's folder"


def test_a_wrong_permutation_fails_the_gate(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tunefork.export.gguf_layout.Layout.from_gguf", lambda self, path, rows: rows
    )
    with pytest.raises(ExportFailedError, match=r"out\.failed"):
        _export(make_run(dtype=torch.float32), "gguf", tmp_path / "out")
    assert (tmp_path / "out.failed" / "proof.json").exists()


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("gguf", {"dtype": "bf16"}, "--dtype: means nothing for gguf"),
        ("peft", {"kind": "f16"}, "--type: means nothing for peft"),
        ("merged", {"pad_rank": 8}, "--pad-rank: means nothing for merged"),
        ("gguf", {"with_adapter": True}, "--with-adapter: means nothing for gguf"),
        ("gguf-lora", {"kind": "q8_0"}, "--type: a LoRA file is"),
        ("onnx", {}, "--to: onnx is none of peft"),
    ],
)
def test_an_option_is_honoured_or_refused(
    tmp_path: Path, form: Form, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        export("nowhere", form, tmp_path / "out", options=Options(**options), gate=GATE)


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_an_exported_adapter_knows_its_base(
    make_run: MakeRun, tmp_path: Path, method: Method
) -> None:
    run, base, out = make_run(method), tmp_path / "base-llama", tmp_path / "out"
    origin = Provenance(identity=identify(ModelSection(id=str(base))), method=method)
    write_provenance(run / "adapter", origin)
    _export(run, "peft", out)
    assert read_provenance(out) == origin
    assert find_parts(str(out)).is_nf4 == (method is Method.QLORA)
    save_model(base, seed=5)
    with pytest.raises(IdentityError, match="weights"):
        open_model(str(out))


def test_a_merged_folder_knows_itself(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(dtype=torch.float32), tmp_path / "out"
    identity = identify(ModelSection(id=str(tmp_path / "base-llama")))
    recipe = {"data": {"train": "rows.jsonl", "system": "Be brief."}}
    write_provenance(run / "adapter", Provenance(identity=identity, recipe=recipe))
    _export(run, "merged", out)
    origin = read_provenance(out)
    assert origin is not None and origin.own == identify(ModelSection(id=str(out)))
    data = find_parts(str(out)).data  # it is asked as it was trained
    assert data is not None and data.system == "Be brief."
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IdentityError, match="weights"):
        open_model(str(out))


def test_peft_gets_what_only_peft_can_hold(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(dtype=torch.float32)
    base, dora = tmp_path / "base-llama", tmp_path / "dora"
    model = load_model(ModelSection(id=str(base)), dtype=torch.float32, device=pick_device())
    lora = LoraSection(rank=4, dora=True, modules_to_save=("norm",))
    build(model, Method.LORA, lora, seed=0)
    for module in model.modules():
        if hasattr(module, "lora_b"):
            module.lora_b.data.normal_(std=0.1)
    save_adapter(model, dora, lora, base=str(base))
    _export(dora, "peft", tmp_path / "out")
    torch.testing.assert_close(_peft(base, tmp_path / "out"), _peft(base, dora), rtol=0, atol=0)
    with pytest.raises(AdapterError, match="vLLM has no DoRA"):
        _export(dora, "vllm", tmp_path / "vllm")
    with pytest.raises(AdapterError, match="merge the adapter into its base"):
        _export(dora, "gguf-lora", tmp_path / "gguf")
    assert run.exists()


def test_the_card_of_an_adapter_away_from_its_run_says_what_it_records(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(dtype=torch.float32)
    away = shutil.copytree(run / "adapter", tmp_path / "away")
    identity = identify(ModelSection(id=str(tmp_path / "base-llama")))
    origin = Provenance(
        identity=identity,
        method=Method.LORA,
        data_sha256="d" * 64,
        metrics={"loss": (1.25, 1.0, 1.5)},
        recipe={"model": {"id": "owner/name"}, "data": {"train": "/home/someone/rows.jsonl"}},
    )
    write_provenance(away, origin)
    _export(away, "peft", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "d" * 64 in card and "| loss | 1.25 | 1 to 1.5 |" in card
    assert identity.weights_sha256 in card and "Method: lora" in card
    assert "train: rows.jsonl" in card and "someone" not in card
