"""Elementwise kernels from plain PyTorch: the definition runs on a CPU, its compiled form on a GPU.

torch.compile fuses such a function into one or two kernels, so the definition needs no second
source beside it. Compilation is put off until the first call on a GPU: importing the compiler takes
seconds.
"""

from collections.abc import Callable
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
            if torch.compiler.is_compiling() or not _is_on_cuda(args):
                return function(*args, **kwargs)
            if not compiled:
                compiled.append(torch.compile(function, dynamic=dynamic))
            return compiled[0](*args, **kwargs)

        return call

    return decorate


def _is_on_cuda(args: tuple[Any, ...]) -> bool:
    for argument in args:
        if isinstance(argument, Tensor):
            return argument.is_cuda
        if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
            return argument[0].is_cuda
    return False
