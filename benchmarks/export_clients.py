"""Do real programs answer from an export as what was trained does?

    python -m benchmarks.export_clients --run RUN --qlora-run RUN --client PYTHON_WITH_LLAMA_CPP

The adapter in the PEFT library, the merged folder in plain transformers, GGUF files in llama.cpp
(llama-cpp-python, in an interpreter of its own). Greedy tokens are compared over 20 of the run's
own evaluation prompts and 32 tokens each, past any end of turn. Where f16 or Q8_0 leaves the
tokens of fp32, the difference of the two best fp32 logits there is reported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks import results
from tunefork.data.loader import load_data
from tunefork.export.export import Options, export
from tunefork.export.merge import load_reference, merge
from tunefork.export.prompts import recipe_of
from tunefork.export.proof import Gate, Proof
from tunefork.model.device import describe
from tunefork.model.load import find
from tunefork.registry.opening import find_parts, tokenizer_of

NUM_PROMPTS, NUM_NEW = 20, 32
TEXTS = [
    "Hello 12345 world 1 2 3 2024-01-01",
    "def f(x):\n    return x * 2\n\n\n",
    "naïve café - 你好 🙂",
    " 3.14159",
    "<|im_start|>user\nhi 42<|im_end|>\n",
]
GATE = Gate(num_tokens=256)


def main() -> None:
    """Measure and write results/export_clients.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--qlora-run", required=True)
    parser.add_argument("--client", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        rows = _adapter_rows(arguments.run, out)
        rows += _merge_rows(arguments.run, arguments.qlora_run, out)
        rows += _gguf_rows(arguments.run, out, arguments.client)
    device = str(describe(torch.device("cpu"))["name"])
    print(results.write("export_clients", rows, device=device))


def _adapter_rows(run: str, out: Path) -> list[dict[str, Any]]:
    """Logits of the exported adapter in PEFT, beside ours, on the first prompt."""
    export(run, "peft", out / "peft", options=Options(), gate=GATE)
    export(run, "peft", out / "bf16", options=Options(dtype="bf16"), gate=GATE)
    export(run, "vllm", out / "padded", options=Options(pad_rank=24), gate=GATE)
    ids = torch.tensor([_prompts(run)[0]])
    ours = load_reference(find_parts(run))(ids).logits
    base = find(find_parts(run).section).location
    rows = []
    for name in ("peft", "bf16", "padded"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(model, out / name).eval()(ids).logits
        size = (out / name / "adapter_model.safetensors").stat().st_size
        row = {"case": f"adapter, {name}, in PEFT", "adapter_bytes": size}
        rows.append(row | {"max_logit_difference": float((theirs - ours).abs().max())})
        print(rows[-1], flush=True)
    return rows


def _merge_rows(run: str, qlora_run: str, out: Path) -> list[dict[str, Any]]:
    lora = merge(run, out / "merged", gate=GATE)
    open_gate = Gate(max_mean_kl=10, max_kl=1e6, min_top1=0)  # to see the figures of both ways
    qlora = merge(qlora_run, out / "merged-qlora", gate=open_gate)
    rows = [_proof_row("merged LoRA in transformers", lora)]
    rows.append(_proof_row("merged QLoRA in transformers", qlora))
    for way, other in qlora.alternatives.items():
        row = {"case": f"merged QLoRA, not taken: into {way}"}
        rows.append(row | other.model_dump(exclude={"num_tokens"}))
    print(*rows, sep="\n", flush=True)
    return rows


def _proof_row(case: str, proof: Proof) -> dict[str, Any]:
    found = proof.agreement
    row = {"case": case, "exported": proof.exported, "reference": proof.reference}
    return row | found.model_dump()


def _gguf_rows(run: str, out: Path, client: str) -> list[dict[str, Any]]:
    prompts = _prompts(run)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    references = {"gguf": _greedy(merged, prompts)}
    del merged
    references["gguf-lora"] = _greedy(load_reference(find_parts(run)), prompts)
    tokenizer = tokenizer_of(find_parts(run))
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    rows = []
    for form, kind in [
        ("gguf", "f32"),
        ("gguf", "f16"),
        ("gguf", "q8_0"),
        ("gguf-lora", "f32"),
        ("gguf-lora", "f16"),
    ]:
        folder = out / f"{form}-{kind}"
        made = export(run, form, folder, options=Options(kind=kind), gate=GATE)  # type: ignore[arg-type]
        is_lora = form == "gguf-lora"
        job = {
            "model": str(folder / f"{'base' if is_lora else 'model'}-{kind}.gguf"),
            "lora": str(folder / f"lora-{kind}.gguf") if is_lora else None,
            "prompts": prompts,
            "num_new": NUM_NEW,
            "texts": TEXTS,
        }
        found = ask(client, job)
        row: dict[str, Any] = {
            "case": f"{form} {kind} in llama.cpp",
            "tool": f"llama-cpp-python {found['version']}",
        }
        row |= _agreement(references[form], found["tokens"])
        row |= {
            "same_token_ids": found["texts"] == texts,
            "proof": made.proof.agreement.model_dump(),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def ask(client: str, job: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp answers to `job`, by benchmarks/llama_cpp_client.py."""
    script = Path(__file__).parent / "llama_cpp_client.py"
    done = subprocess.run([client, script], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _agreement(
    reference: list[tuple[list[int], list[float]]], found: list[list[int]]
) -> dict[str, Any]:
    """Prompts whose tokens are the same, and the fp32 gap where the others first differ."""
    gaps = []
    for (wanted, gap), tokens in zip(reference, found, strict=True):
        first = next(
            (i for i, (a, b) in enumerate(zip(wanted, tokens, strict=True)) if a != b), None
        )
        if first is not None:
            gaps.append(gap[first])
    return {
        "num_prompts": len(found),
        "tokens_each": NUM_NEW,
        "same_prompts": len(found) - len(gaps),
        "gaps_where_they_part": gaps,
    }


def _prompts(run: str) -> list[list[int]]:
    parts = find_parts(run)
    recipe = recipe_of(parts)
    assert recipe is not None, f"{run} has no recipe"
    data = load_data(recipe, tokenizer_of(parts))
    return [e.input_ids[: e.prompt_length].tolist() for e in data.eval[:NUM_PROMPTS]]


@torch.inference_mode()
def _greedy(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Each prompt's NUM_NEW likeliest tokens, with the gap between the two best logits."""
    answers = []
    for prompt in prompts:
        tokens, gaps, given, past = list[int](), list[float](), prompt, None
        for _ in range(NUM_NEW):
            output = model(torch.tensor([given]), past_key_values=past, use_cache=True)
            past, best = output.past_key_values, output.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            given = tokens[-1:]
        answers.append((tokens, gaps))
    return answers


if __name__ == "__main__":
    main()
