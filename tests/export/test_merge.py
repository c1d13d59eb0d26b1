"""Merging: exact but for one rounding, in the way that loses least, and proven."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.conftest import MakeRun
from tunefork.errors import RunFolderError
from tunefork.export.dense import merge_deltas
from tunefork.export.merge import DEQUANTISED, ORIGINAL, load_reference, merge
from tunefork.export.proof import Agreement, Gate, Proof, TaskMetric, agreement
from tunefork.export.publish import ExportFailedError, publish, staged
from tunefork.model.linear import LoraLinear
from tunefork.recipe import Method
from tunefork.registry.opening import find_parts, load_parts

GATE = Gate(num_tokens=256)
IDS = torch.arange(5, 37)[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merged_weight_is_rounded_once(
    make_run: MakeRun, tmp_path: Path, dtype: torch.dtype
) -> None:
    run = make_run(dtype=dtype)
    before = load_parts(find_parts(str(run)), dtype=dtype, device=torch.device("cpu"))
    wanted = {
        path: layer.merged_weight().to(dtype)
        for path, layer in before.named_modules()
        if isinstance(layer, LoraLinear)
    }
    merge(str(run), tmp_path / "out", gate=GATE)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.dtype == dtype and len(wanted) == 14
    for path, weight in wanted.items():
        assert torch.equal(after.get_submodule(path).weight, weight), path
    assert after.config.tie_word_embeddings and after.lm_head.weight is (
        after.model.embed_tokens.weight
    )


def test_an_fp32_merge_answers_as_the_adapter_in_plain_transformers(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(dtype=torch.float32)
    proof = merge(str(run), tmp_path / "out", gate=GATE)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reference = load_reference(find_parts(str(run)))
    torch.testing.assert_close(merged(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)
    assert proof.passed and proof.agreement.mean_kl < 1e-6 and proof.agreement.top1 == 1.0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and head["base_model"].endswith("base-llama")
    assert "sha256 `" + "0" * 64 in card and "| loss | 1.25 | 1 to 1.5 |" in card
    assert Proof.model_validate_json((tmp_path / "out" / "proof.json").read_bytes()) == proof


def test_a_qlora_run_is_merged_both_ways_and_the_better_is_kept(
    make_run: MakeRun, tmp_path: Path
) -> None:
    proof = merge(str(make_run(Method.QLORA)), tmp_path / "out", gate=Gate(max_kl=100))
    assert DEQUANTISED in proof.exported and list(proof.alternatives) == [ORIGINAL]
    assert proof.agreement.mean_kl < proof.alternatives[ORIGINAL].mean_kl
    assert f"not taken: merged into {ORIGINAL}" in (tmp_path / "out" / "README.md").read_text()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in files and not any("attempt" in f for f in files)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16 and type(merged.lm_head) is torch.nn.Linear


def test_what_fails_its_proof_is_not_published(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ExportFailedError, match="out.failed") as caught:
        merge(str(make_run()), tmp_path / "out", gate=Gate(max_mean_kl=0.0, num_tokens=64))
    assert caught.value.exit_status == 1
    assert not (tmp_path / "out").exists()
    proof = json.loads((tmp_path / "out.failed" / "proof.json").read_text())
    assert proof["passed"] is False and "mean KL" in proof["reasons"][0]
    assert not list(tmp_path.glob(".out*"))


def test_a_lost_delta_fails_the_gate(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraLinear, "merged_weight", lambda layer: layer.materialize().float())
    with pytest.raises(ExportFailedError):
        merge(str(make_run()), tmp_path / "out", gate=GATE)


def test_there_must_be_an_adapter_and_a_free_place(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(RunFolderError, match="nothing to merge"):
        merge(str(tmp_path / "base-llama"), tmp_path / "out", gate=GATE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(RunFolderError, match="exists already"):
        merge(str(run), tmp_path / "out", gate=GATE)


def test_a_trained_head_is_untied_and_the_config_says_so(make_run: MakeRun) -> None:
    model = load_reference(find_parts(str(make_run())))
    head = torch.nn.Linear(32, model.config.vocab_size, bias=False)
    model.set_output_embeddings(head)
    merge_deltas(model, torch.float32)
    assert model.config.tie_word_embeddings is False


def test_agreement_is_kl_and_top1() -> None:
    p = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    same = agreement([p], [p + 3])  # a constant changes no distribution
    assert same.mean_kl < 1e-6 and same.top1 == 1.0 and same.num_tokens == 2
    q = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
    kl = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"
    )
    found = agreement([p], [q])
    assert found.mean_kl == pytest.approx(float(kl) / 2) and found.top1 == 0.5
    assert agreement([p], [p * torch.nan]).mean_kl == 1e6


def test_the_gate_lies_between_rounding_and_another_base() -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "export_clients.json"
    rows = json.loads(file.read_text())["rows"]
    measured = [row.get("proof", row) | {"case": row["case"]} for row in rows]
    judged = {
        row["case"]: (
            row["mean_kl"] > Gate().max_mean_kl,
            row["max_kl"] > Gate().max_kl,
            row["top1"] < Gate().min_top1,
        )
        for row in measured
        if "mean_kl" in row
    }
    assert all(judged.pop("merged QLoRA, not taken: into the original base"))
    assert len(judged) == 7 and not any(any(failed) for failed in judged.values())
    assert Gate().min_top1 < 0.92  # three steps' adapter, rounded to bf16: proof.py


def test_a_task_metric_may_lose_its_margin_and_no_more() -> None:
    def lost(name: str, reference: float, exported: float) -> bool:
        return TaskMetric(name=name, reference=reference, exported=exported, margin=0.01).is_worse

    assert lost("accuracy", 0.9, 0.88) and not lost("accuracy", 0.9, 0.895)
    assert not lost("accuracy", 0.9, 0.99) and lost("loss", 1.0, 1.02)
    assert not lost("loss", 1.0, 0.5)


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        (folder / "a").touch()
        publish(folder, tmp_path / "out", None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").exists()
    assert Agreement(mean_kl=0, max_kl=0, top1=1, num_tokens=1).num_tokens == 1
