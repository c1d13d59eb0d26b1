"""Elementwise kernels from plain PyTorch: the definition runs on a CPU, its compiled form on a GPU.

torch.compile fuses such a function into one or two kernels, so the definition needs no second
source beside it. Compilation is put off until the first call on a GPU: importing the compiler takes
seconds.

A plan runs the same code on the meta device, where tensors have shapes and nothing else. While
`standing_for_gpu` is entered they count as tensors of a GPU, and a compiled function as one kernel.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def compiled_on_cuda(
    *, dynamic: bool | None = None
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorate a function of tensors: compiled where its first tensor argument is on a GPU.

    Within a function that is itself being compiled, it is part of that one. `dynamic` is
    torch.compile's.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        compiled: list[Callable[_Arguments, _Result]] = []

        @wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            first = None if torch.compiler.is_compiling() else _first(args)
            if first is None or not is_on_gpu(first):
                return function(*args, **kwargs)
            if first.is_meta:
                planned: _Result = _stand_ins[-1](function, args, kwargs)
                return planned
            if not compiled:
                compiled.append(torch.compile(function, dynamic=dynamic))
            return compiled[0](*args, **kwargs)

        return call

    return decorate


_stand_ins: list[Callable[..., Any]] = []
"""Of the entered `standing_for_gpu`: what runs a compiled function (function, args, kwargs)."""


@contextmanager
def standing_for_gpu(run_fused: Callable[..., Any]) -> Iterator[None]:
    """Within, tensors on the meta device are taken for ones on a GPU.

    `run_fused(function, args, kwargs)` is called where a GPU would run a compiled function.
    """
    _stand_ins.append(run_fused)
    try:
        yield
    finally:
        _stand_ins.pop()


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether a GPU's code is taken for `tensor`: it is on one, or stands for one that is."""
    return tensor.is_cuda or (tensor.is_meta and bool(_stand_ins))


def _first(args: tuple[Any, ...]) -> Tensor | None:
    for argument in args:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
            return argument[0]
    return None
