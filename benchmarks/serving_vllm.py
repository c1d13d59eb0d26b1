"""vLLM as a peer of benchmarks/h200_serving.py: the same shape, adapters and prompts, in a process
and with packages of its own.

    PYTHONPATH=ITS_SITE python benchmarks/serving_vllm.py BASE ADAPTERS LOAD.json SLOTS

Its own best public settings for this load: dummy weights, bf16, no prefix cache (no two prompts
begin alike), CUDA graphs, 64 sequences, as many slots as adapters. Prints one JSON line.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_FLASHINFER_SAMPLER="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_WORKER_MULTIPROC_METHOD="spawn",
)


def main(base: str, adapters: str, load_file: str, slots: int) -> None:
    """Four rounds, of which the first is not counted."""
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    load = json.loads(Path(load_file).read_text())
    options = {}
    if slots:
        options = {
            "enable_lora": True,
            "max_loras": slots,
            "max_lora_rank": 16,
            "max_cpu_loras": 2 * slots,
        }
    engine = LLM(
        base,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        gpu_memory_utilization=0.85,
        max_num_seqs=64,
        enable_prefix_caching=False,
        **options,
    )
    prompts = [{"prompt_token_ids": ids} for ids in load["prompts"]]
    sampling = SamplingParams(
        max_tokens=load["new"], ignore_eos=True, temperature=0, detokenize=False
    )
    asked = None
    if slots:
        numbers = [at % slots for at in range(len(prompts))]
        asked = [LoRARequest(f"a{n}", n + 1, f"{adapters}/{n}") for n in numbers]
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        engine.generate(prompts, sampling, lora_request=asked, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
    total = len(prompts) * load["new"]
    rates = sorted(total / one for one in seconds[1:])
    median = statistics.median(rates)
    found = {
        "tokens_per_s": round(median, 1),
        "spread": round((rates[-1] - rates[0]) / median, 4),
        "first_round_s": round(seconds[0], 2),
        "version": vllm.__version__,
    }
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
