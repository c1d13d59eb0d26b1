"""llama.cpp, asked by token ids: greedy answers, with and without a LoRA file.

Runs in an interpreter of its own, one that has llama-cpp-python. Reads a job as JSON from stdin and
prints the answer as JSON:

    {"model": FILE, "lora": FILE or null, "prompts": [[id]], "num_new": 32, "texts": [str]}
    {"tokens": [[id]], "gaps": [[float]], "texts": [[id]], "version": str}

A gap is the difference of the two best logits at a generated position. The key-value cache is kept
in fp32 (llama.cpp's default is f16), so that a difference is the file's.
"""

import json
import sys
from typing import Any

import llama_cpp
import numpy as np


def _greedy(llama: Any, prompt: list[int], num_new: int) -> tuple[list[int], list[float]]:
    llama.reset()
    llama.eval(prompt)
    tokens, gaps = list[int](), list[float]()
    for _ in range(num_new):
        pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),))
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(int(logits.argmax()))
        gaps.append(float(first - second))
        llama.eval(tokens[-1:])
    return tokens, gaps


def main() -> None:
    """One job."""
    job = json.load(sys.stdin)
    fp32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        job["model"],
        lora_path=job["lora"],
        n_ctx=1024,
        n_threads=1,  # its spinning threads stall on a busy machine
        type_k=fp32,
        type_v=fp32,
        verbose=False,
    )
    answers = [_greedy(llama, prompt, job["num_new"]) for prompt in job["prompts"]]
    texts = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
    found = {
        "tokens": [tokens for tokens, _ in answers],
        "gaps": [gaps for _, gaps in answers],
        "texts": texts,
        "version": llama_cpp.__version__,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
