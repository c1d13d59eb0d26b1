"""What `train.deterministic` costs on a GPU: the same steps with it and without, in turns.

    python -m benchmarks.h200_deterministic

A Llama of 1B's shape with random weights, 8 x 512 random tokens a step, every token supervised.
Each form is a process of its own, because cuBLAS reads its workspace's size once.
"""

import itertools
import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import results

FORMS = ("lora", "lora_dropout", "qlora", "full")
_STEPS, _WARM_UP, _ROUNDS = 15, 4, 2


def measure(form: str, wanted: bool) -> dict[str, Any]:
    """Seconds of each step after the warm-up."""
    import time

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tunefork.data.example import Encoded
    from tunefork.model.build import build
    from tunefork.recipe import LoraSection, Method
    from tunefork.train.adamw_lora import LoraAdamW
    from tunefork.train.deterministic import deterministic, prepare
    from tunefork.train.loop import train
    from tunefork.train.optim import ShadowAdamW

    prepare(wanted)
    device = torch.device("cuda", 0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    method = Method(form.partition("_")[0])
    lora = LoraSection(dropout=0.05 if form == "lora_dropout" else 0.0)
    build(model, method, lora, seed=0, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.0}
    optimizer: LoraAdamW | ShadowAdamW = LoraAdamW(trained, **adamw)
    if method is Method.FULL:
        optimizer = ShadowAdamW(trained, keep_shadows=True, eight_bit=False, **adamw)
    draw = np.random.default_rng(0)
    examples = [
        Encoded(f"row {i}", draw.integers(3, 128_256, 512).astype(np.int32), np.full(512, True))
        for i in range(16)
    ]
    ends: list[float] = []

    def on_step(_: object) -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())

    with deterministic(wanted):
        train(
            model,
            examples,
            [list(range(8 * (n % 2), 8 * (n % 2) + 8)) for n in range(_STEPS)],
            optimizer,
            learning_rates=[1e-5] * _STEPS,
            micro_batch_tokens=4096,
            packing=False,
            pad_id=0,
            max_grad_norm=1.0,
            seed=0,
            on_step=on_step,
        )
    steps = [b - a for a, b in itertools.pairwise(ends)][_WARM_UP - 1 :]
    return {"steps_s": steps, "device": torch.cuda.get_device_name(device)}


def main() -> None:
    """Each form with and without, in turns; the results go to results/h200_deterministic.json."""
    if len(sys.argv) > 1:
        print("RESULT " + json.dumps(measure(sys.argv[1], sys.argv[2] == "on")))
        return
    rows, name = [], ""
    for form in FORMS:
        steps: dict[str, list[float]] = {"off": [], "on": []}
        for turn in [*steps] * _ROUNDS:
            command = [sys.executable, "-m", "benchmarks.h200_deterministic", form, turn]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                raise SystemExit(f"{form} {turn}: {done.stderr[-2000:]}")
            result = json.loads(found[-1].removeprefix("RESULT "))
            steps[turn] += result["steps_s"]
            name = result["device"]
        median = {turn: statistics.median(values) for turn, values in steps.items()}
        row = {
            "case": form,
            "step_s": median["off"],
            "deterministic_step_s": median["on"],
            "ratio": median["on"] / median["off"],
            "spread_s": {turn: [min(values), max(values)] for turn, values in steps.items()},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    results.write("h200_deterministic", rows, device=name)


if __name__ == "__main__":
    main()
