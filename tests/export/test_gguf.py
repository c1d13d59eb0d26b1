"""GGUF: names, permutations, tokenizer and metadata, as transformers reads them too."""

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tests.export.conftest import MakeRun
from tests.tiny import CONFIGS
from tunefork.errors import ModelError
from tunefork.export.adapter import read_adapter
from tunefork.export.gguf_file import read_lora, read_model, write_lora, write_model
from tunefork.export.gguf_layout import Layout
from tunefork.export.gguf_tokenizer import pre_tokenizer

IDS = torch.arange(5, 37)[None]


def _written(folder: Path, file: Path, kind: str = "f32") -> Any:
    config = AutoConfig.from_pretrained(folder)
    write_model(folder, config, AutoTokenizer.from_pretrained(folder), file, kind=kind)
    return config


def test_transformers_reads_back_the_same_model(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(dtype=torch.float32)
    folder = tmp_path / "base-llama"
    _written(folder, tmp_path / "m.gguf")
    options: dict[str, Any] = {"gguf_file": "m.gguf"}
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(read(IDS).logits, wanted(IDS).logits, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **options)
    text = "the quick brown fox<|im_end|>"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "error"), [("f32", 0), ("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 2e-2)]
)
def test_what_is_read_back_is_off_by_its_type_only(
    make_run: MakeRun, tmp_path: Path, kind: str, error: float
) -> None:
    make_run(dtype=torch.float32)
    config = _written(tmp_path / "base-llama", tmp_path / "m.gguf", kind)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "base-llama").state_dict()
    found = read_model(tmp_path / "m.gguf", config, list(wanted))
    assert found.keys() == wanted.keys() - {"lm_head.weight"}
    for path, tensor in found.items():
        off = (tensor - wanted[path]).abs().max() / wanted[path].abs().max()
        assert off <= (0 if tensor.dim() == 1 else error), path
    if error:
        assert not torch.equal(
            found["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"]
        )


def test_a_tensor_left_out_is_noticed(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(dtype=torch.float32)
    config = _written(tmp_path / "base-llama", tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.bias"):
        read_model(tmp_path / "m.gguf", config, ["model.layers.0.self_attn.q_proj.bias"])


def test_qwen3_keeps_its_rows_and_its_head_size(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(dtype=torch.float32, architecture="qwen3")
    _written(tmp_path / "base-qwen3", tmp_path / "m.gguf")
    stored = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: torch.tensor(t.data.copy()) for t in stored.tensors}
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "base-qwen3").state_dict()
    for ours, theirs in {"q_proj": "attn_q", "k_norm": "attn_k_norm"}.items():
        weight = wanted[f"model.layers.1.self_attn.{ours}.weight"]
        assert torch.equal(tensors[f"blk.1.{theirs}.weight"], weight)
    assert (
        "output.weight" in tensors and stored.fields["qwen3.attention.key_length"].contents() == 8
    )


def test_a_lora_file_permutes_b_with_its_base(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(dtype=torch.float32)
    adapter, config = (
        read_adapter(run / "adapter"),
        AutoConfig.from_pretrained(tmp_path / "base-llama"),
    )
    write_lora(adapter, config, tmp_path / "lora.gguf", kind="f32")
    back = read_lora(tmp_path / "lora.gguf", config, adapter)
    for path, (a_rd, b_or) in adapter.deltas.items():
        assert torch.equal(back.deltas[path][0], a_rd) and torch.equal(back.deltas[path][1], b_or)
    stored = gguf.GGUFReader(tmp_path / "lora.gguf")
    tensors = {t.name: torch.tensor(t.data.copy()) for t in stored.tensors}
    # Permuting B's rows permutes those of the delta: as the merged weight is permuted.
    path = "model.layers.0.self_attn.q_proj"
    a_rd, b_or = adapter.deltas[path]
    wanted = Layout(config).to_gguf(path, b_or @ a_rd)
    found = tensors["blk.0.attn_q.weight.lora_b"] @ tensors["blk.0.attn_q.weight.lora_a"]
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(tensors["blk.0.attn_q.weight.lora_b"], b_or)
    assert float(stored.fields["adapter.lora.alpha"].contents()) == adapter.scale * adapter.rank
    assert stored.fields["general.type"].contents() == "adapter"


def test_other_architectures_are_refused_by_name() -> None:
    for name, message in (("gemma3", "Gemma3ForCausalLM"), ("phi3", "Phi3ForCausalLM")):
        config = copy.deepcopy(CONFIGS[name])
        config.architectures = [message]
        with pytest.raises(ModelError, match=f"{message} is not converted here, only Llama"):
            Layout(config)
    config = copy.deepcopy(CONFIGS["llama"])
    config.architectures = ["LlamaForCausalLM"]
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match="rope type 'yarn'"):
        Layout(config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    config.sliding_window = 64
    with pytest.raises(ModelError, match="sliding-window"):
        Layout(config)


def test_llama3s_frequencies_are_those_of_transformers() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.architectures = ["LlamaForCausalLM"]
    config.head_dim = 64
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.rope_parameters = rope
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, 64, 2) / 64)  # type: ignore[operator]
    [(name, factors)] = Layout(config).extra_tensors().items()
    assert name == "rope_freqs.weight" and len(set(factors.tolist())) > 3
    torch.testing.assert_close(plain / factors, scaled)


def _stored(pre: Any, **model: Any) -> dict[str, Any]:
    return {
        "model": {"type": "BPE", "byte_fallback": False} | model,
        "pre_tokenizer": pre,
        "normalizer": None,
    }


def test_the_splitting_rule_is_known_or_refused() -> None:
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    gpt2 = bytes_only | {"use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}

    def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"type": "Sequence", "pretokenizers": list(parts)}

    assert pre_tokenizer(_stored(gpt2)) == "gpt-2"
    assert pre_tokenizer(_stored(sequence(digits, gpt2))) == "smollm"
    for wrong in (
        bytes_only,
        gpt2 | {"add_prefix_space": True},
        sequence(digits | {"individual_digits": False}, gpt2),
        {"type": "Whitespace"},
        None,
    ):
        with pytest.raises(ModelError, match="splitting rule is not known"):
            pre_tokenizer(_stored(wrong))
    with pytest.raises(ModelError, match="SentencePiece BPE tokenizer is not"):
        pre_tokenizer(_stored(gpt2, byte_fallback=True))
    with pytest.raises(ModelError, match="Unigram tokenizer"):
        pre_tokenizer(_stored(gpt2, type="Unigram"))
    with pytest.raises(ModelError, match="ignore_merges=True"):
        pre_tokenizer(_stored(gpt2, ignore_merges=True))
    assert json.dumps(_stored(gpt2))
