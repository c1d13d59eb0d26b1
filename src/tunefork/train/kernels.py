"""Which of PyTorch's attention kernels a run may take."""

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_kernels() -> AbstractContextManager[None]:
    """All but cuDNN's, for forward and backward passes within.

    PyTorch 2.11 prefers cuDNN on Hopper, which builds a plan for every new shape, and rows of real
    data have a new shape in nearly every step. Where they do not, `model.packed_attention` puts
    cuDNN first by itself; this is for models that keep the mask, and for evaluation.
    """
    manager: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return manager
