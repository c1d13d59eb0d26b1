"""Many fp32 parameters as views of one flat tensor, and their gradients of another.

Zeroing is then one fill, the global norm one reduction, AdamW one fused call, whatever the number
of parameters (rank 16 on all linear layers of an 8B model: 448 of them). The addresses of both
never change, as the replay of a captured CUDA graph needs. Each view starts at a multiple of 512
bytes; the padding between is zero and stays so: its gradient is.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_ALIGNMENT = 128
"""Elements: 512 bytes, CUDA's allocator's own granularity."""


class FlatParameters:
    """Parameters of one device in fp32, moved into one tensor for good."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.spans: list[slice] = []
        end = 0
        for parameter in self.parameters:
            self.spans.append(slice(end, end + parameter.numel()))
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        device = self.parameters[0].device
        self.values = nn.Parameter(torch.zeros(end, dtype=torch.float32, device=device))
        self.gradient = torch.zeros(end, dtype=torch.float32, device=device)
        self.values.grad = self.gradient
        self.gradients = self.views(self.gradient)
        moved = zip(self.parameters, self.views(self.values.detach()), self.gradients, strict=True)
        for parameter, view, gradient in moved:
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = gradient
            parameter.register_post_accumulate_grad_hook(_into(gradient))  # type: ignore[no-untyped-call]
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of a tensor laid out like the parameters', in its shape."""
        return [
            flat[span].view(parameter.shape)
            for span, parameter in zip(self.spans, self.parameters, strict=True)
        ]

    @torch.no_grad()
    def attach_gradients(self) -> None:
        """Make every `grad` the view again: another tensor is copied in, None becomes zeros."""
        for at, (parameter, gradient) in enumerate(
            zip(self.parameters, self.gradients, strict=True)
        ):
            if parameter.data_ptr() != self._addresses[at]:
                raise RuntimeError(
                    f"trained parameter {at} was moved after its optimiser was made, which would "
                    "go on updating the old one; move the model first"
                )
            held = parameter.grad
            if held is gradient:
                continue
            if held is None:
                gradient.zero_()
            else:
                gradient.copy_(held)
            parameter.grad = gradient

    def norm(self) -> Tensor:
        """Of the gradient. Rows are summed in fp32, the many rows in fp64: CPUs add one by one."""
        rows = torch.linalg.vector_norm(self.gradient.view(-1, _ALIGNMENT), dim=-1)
        norm: Tensor = torch.linalg.vector_norm(rows.double())
        return norm


def _into(gradient: Tensor) -> Callable[[nn.Parameter], None]:
    """A hook that moves a gradient which autograd made anew (the last was None) into its view.

    Otherwise a pass after `zero_grad(set_to_none=True)` would hold all gradients twice. It knows
    the view alone, so that parameter and optimiser do not keep each other alive.
    """

    @torch.no_grad()
    def move(parameter: nn.Parameter) -> None:
        if parameter.grad is not None and parameter.grad is not gradient:
            gradient.copy_(parameter.grad)
            parameter.grad = gradient

    return move
