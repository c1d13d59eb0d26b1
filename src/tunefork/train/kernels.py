"""Which of PyTorch's attention kernels a run may take."""

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_kernels() -> AbstractContextManager[None]:
    """All but cuDNN's, for forward and backward passes within.

    PyTorch 2.11 prefers cuDNN on Hopper, which builds a plan for every new shape. Rows of real data
    have a new length in nearly every step: on an H200 steps of 0.18 s took 0.33 s in the median
    with it, and up to 1.3 s (1B, packed, 8 x 1024 tokens).
    """
    manager: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return manager
