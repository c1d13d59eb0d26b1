"""What can be set of the embedded engine."""

from typing import Annotated, Literal

from pydantic import Field

from tunefork.recipe import PositiveInt, Section


class EmbeddedSettings(Section):
    """The embedded engine."""

    device: Annotated[str, Field(pattern=r"auto|cpu|cuda(:\d+)?")] = "auto"
    """`auto`: the first CUDA device, else the CPU."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of weights, activations and the cache. auto: bf16 where the device multiplies it quickly."""

    base_storage: Literal["dense", "nf4", "fp8"] = "dense"
    """`nf4`: linear layers in 4 bits, as QLoRA trains; an adapter that was trained over NF4 answers
    best over NF4. `fp8` (a GPU that has it): in 8 bits, multiplied in 8 bits."""

    fuse: bool = True
    """Layers that read the same input (q, k, v; gate, up) as one product; on a GPU only in bf16."""

    slots: PositiveInt = 8
    """Adapters that can be computed with at the same time. Each takes, of every linear layer but
    the head, `max_rank` (the next multiple of 16) x (features in + features out) x bytes of a
    number, used or not. In bf16 at rank 64: 39 MB for SmolLM2-135M, 336 MB for Llama 3's 8B."""

    max_rank: PositiveInt = 64
    """Largest rank of an adapter; a slot is as large as it."""

    host_memory_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30
    """Host memory for adapters, as large as their files; the least recently used go first."""

    max_requests: PositiveInt = 64
    """Answers computed at the same time."""

    max_queued: PositiveInt = 1024
    """Answers that wait within the engine (for an adapter, a slot, room in the cache)."""

    max_model_len: PositiveInt | None = None
    """Most tokens of prompt and answer together. None: the model's own, at most `cache_tokens`."""

    cache_tokens: PositiveInt | None = None
    """Tokens whose keys and values fit into the cache. None: what 85 % of a GPU's free memory
    holds, at most 2^20; on a CPU 4 GiB, at most 2^17."""

    prefill_tokens: PositiveInt | None = None
    """Most prompt tokens of one pass: more is quicker for a prompt, and holds others up for longer.
    None: 2048 on a GPU, 256 on a CPU."""

    cuda_graphs: bool = True
    """Replay a pass as a CUDA graph: one that decodes as one of a few numbers of rows, one with
    prompts (up to 2048 tokens of them) as one of a few numbers of tokens."""

    compile: bool = True
    """Compile the decoder layers of the passes that are replayed (torch.compile, GPU): a quarter
    less time a token for an 8B model. Its first start takes longer (55 s in all on an H200), later
    ones less (18 s), as what was compiled is kept (TORCHINDUCTOR_CACHE_DIR). What cannot be
    compiled runs as written. Without `cuda_graphs` nothing is compiled."""

    ahead: bool = True
    """Launch the next pass before the tokens of the last one are on the host: it reads them on the
    GPU, which so does not wait between the two. With `cuda_graphs`, and while nobody who runs asks
    for penalties, a bias, a grammar or log probabilities, for which the host must see the logits or
    the tokens before. While any such request runs, all are served as without. Temperature, top-p,
    top-k and seeds wait for nothing: of the same logits a token is the same with and without."""
