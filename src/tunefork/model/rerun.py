"""A layer that keeps little, and runs again in the backward pass: what the two runs leave out.

With full checkpointing what is left of a layer's activations is its input (Chen et al. 2016,
https://arxiv.org/abs/1604.06174). PyTorch's `checkpoint` has one function for both runs. Here they
are two: the first keeps nothing for a backward pass, the second makes nothing that its backward
pass does not read.

Where the inputs wait is the shelf's affair (`shelf.py`): they stay, or lie in host memory, 4 GiB of
16,384 tokens of an 8B model. A layer runs for several milliseconds, and copying its input over PCIe
takes fewer, so the copies hide behind it. There is time left to take attention's result along
(`kept_attention.py`), which spares the second run its forward pass.

Shape legend: T tokens in any layout, D features.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from tunefork.errors import ModelError
from tunefork.model.kept_attention import Results
from tunefork.model.shelf import Held, Shelf

IS_OURS = "cu_seq_lens_q"
"""The keyword argument that attention is given where it is `packed_attention.py`'s."""


class _Rerun(torch.autograd.Function):
    """`first` now, without a graph; in the backward pass `again`, with a graph of its own, which is
    differentiated there and then."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Callable[[Tensor], tuple[Tensor, list[Tensor]]],
        again: Callable[[Tensor, list[Tensor]], Tensor],
        shelf: Shelf | Held,
        draws: bool,
        x_d: Tensor,
        _anchor: Tensor,
    ) -> Tensor:
        ctx.again, ctx.shelf = again, shelf
        ctx.random = _random_states(x_d) if draws else None
        # The first layer's input needs no gradient. Were that to show, here or in the second run,
        # its runs would be compiled apart from all others', which takes longer than the gradient.
        y_d, kept = first(x_d.detach())
        if not isinstance(y_d, Tensor):
            raise ModelError(_REFUSED.format(f"return a {type(y_d).__name__}, not one tensor"))
        ctx.kept = shelf.put(x_d, *kept)
        return y_d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_d: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError("a layer that runs again has one backward pass, and this is another")
        x_d, *kept = ctx.shelf.take(ctx.kept)
        ctx.kept = None  # the graph outlives its backward pass
        x_d.requires_grad_()
        with torch.enable_grad(), _drawing(ctx.random, x_d):
            y_d = ctx.again(x_d, kept)
        torch.autograd.backward(y_d, dy_d)
        return None, None, None, None, x_d.grad if ctx.needs_input_grad[4] else None, None


_REFUSED = (
    "train.activation_checkpointing: offload, and full where layers are compiled, is for layers of "
    "one tensor, and this model's {}; set full, or beside full train.compile: never"
)


def _random_states(x_d: Tensor) -> tuple[Any, ...]:
    """Of the CPU's generator and of that of `x_d`'s device."""
    return (torch.get_rng_state(), *get_device_states(x_d))


@contextmanager
def _drawing(states: tuple[Any, ...] | None, x_d: Tensor) -> Iterator[None]:
    """Within, random numbers are drawn from these states on."""
    if states is None:
        yield
        return
    now = _random_states(x_d)
    try:
        torch.set_rng_state(states[0])
        set_device_states(*states[1:])
        yield
    finally:
        torch.set_rng_state(now[0])
        set_device_states(*now[1:])


class _Unread(torch.autograd.Function):
    """Stands for a result whose values nobody reads, and takes its gradient to where it was made.

    What only they were made of is then dead code to a compiler.
    """

    @staticmethod
    def forward(ctx: Any, y_d: Tensor) -> Tensor:
        return torch.empty(y_d.shape, dtype=y_d.dtype, device=y_d.device)  # of its size alone

    @staticmethod
    def backward(ctx: Any, dy_d: Tensor) -> Tensor:
        return dy_d


def plainly(run: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two runs of `rerun` as `run` twice, which keeps nothing beside the input."""

    def first(*args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        return run(*args, **kwargs), []

    def again(layer: nn.Module, x_d: Tensor, kept: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        return run(layer, x_d, *args, **kwargs)

    return first, again


def sparingly(
    run: Callable[..., Any], keeps_attention: bool, has_cudnn: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two runs of `rerun`, each to be compiled: the second is spared what it can be.

    The second passes the gradient, and the values of its result are not made: a decoder layer ends
    with the MLP's last product, a quarter of its arithmetic, of which its own backward pass needs
    the input alone. With `keeps_attention` the first keeps what attention made, where that is ours.
    """

    def first(*args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        if not keeps_attention or IS_OURS not in kwargs:
            return run(*args, **kwargs), []
        results = Results(has_cudnn, [])
        return run(*args, attention_results=results, **kwargs), results.kept

    def again(layer: nn.Module, x_d: Tensor, kept: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        if kept:
            kwargs["attention_results"] = Results(has_cudnn, list(kept))
        y_d = run(layer, x_d, *args, **kwargs)
        if not isinstance(y_d, Tensor):
            return y_d
        apply: Callable[..., Tensor] = _Unread.apply
        return apply(y_d)

    return first, again


def shares_gradients(*given: Any) -> bool:
    """Whether any of them is, or holds, a tensor that needs a gradient."""
    return any(x.requires_grad for x in _tensors(given))


def may_hand_on(*given: Any) -> bool:
    """Whether a layer may leave tensors for others in one of them, as Gemma 4's layers do keys and
    values. A first run keeps no graph, so gradients would be lost on that way."""
    return any(isinstance(one, MutableMapping) for one in given)


def _tensors(given: Any) -> list[Tensor]:
    """Those that it is or holds."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, Mapping):
        given = list(given.values())
    return [x for part in given for x in _tensors(part)] if isinstance(given, list | tuple) else []


def returns_one_tensor(layer: nn.Module) -> bool:
    """Whether the layer's code says so."""
    return inspect.signature(type(layer).forward).return_annotation in (Tensor, "torch.Tensor")


def rerun(
    first: Callable[..., Any],
    again: Callable[..., Any],
    shelf: Shelf | Held,
    draws: bool,
    layer: nn.Module,
    x_d: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The (..., D) tensor that `first(layer, x_d, *args, **kwargs)` returns with a list of what it
    keeps. The backward pass runs `again(layer, x_d, kept, *args, **kwargs)`, which returns the
    same, but that its values may be anything.

    `x_d` and what is kept wait on the `shelf` until then. Gradients of `layer`'s parameters add up
    in their `grad` (never through `torch.autograd.grad`), in one backward pass. With `draws` the
    second run draws the same random numbers. Raises ModelError where something else than `x_d`
    would need a gradient, where the layer leaves tensors in its arguments, or where the result is
    no tensor.
    """
    if shares_gradients(*args, *kwargs.values()):
        raise ModelError(_REFUSED.format("share another tensor that needs a gradient"))
    if not (x_d.requires_grad or any(p.requires_grad for p in layer.parameters())):
        with torch.no_grad():  # below the first layer that is trained
            return cast(Tensor, first(layer, x_d, *args, **kwargs)[0])
    # Its gradient is not asked for, but without an input that has one there is no backward pass.
    anchor = torch.empty(0, device=x_d.device, requires_grad=True)
    apply: Callable[..., Tensor] = _Rerun.apply
    before = _tensors((args, kwargs))
    y_d = apply(
        lambda x_d: first(layer, x_d, *args, **kwargs),
        lambda x_d, kept: again(layer, x_d, kept, *args, **kwargs),
        shelf,
        draws,
        x_d,
        anchor,
    )
    after = _tensors((args, kwargs))
    if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
        raise ModelError(_REFUSED.format("hand others on"))
    return y_d
