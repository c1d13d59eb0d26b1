"""What operations give on the meta device, found out once for each kind of question.

PyTorch has a tensor's shape, strides and type after `mul`, `cat` or `addmm_` follow from
definitions in Python, which take 0.1 to 1 ms an operation, more than half of a traced step's time.
They depend on nothing but the shapes, strides and types of what is given, and PyTorch's default
type; and layers ask for the same again and again.
"""

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

_ALSO = {
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm_.default,
    torch.ops.aten.cat.default,
    torch.ops.aten.mean.dim,
    torch.ops.aten.slice_backward.default,
    torch.ops.aten.sum.dim_IntList,
}
"""Operations that are not elementwise, and slow to ask for."""

_GIVEN: dict[Any, dict[str, Any]] = {}
"""Of an operation and its arguments' likeness: `torch.empty_strided`'s arguments; of one in place,
which gives its first argument, none."""


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`; where it is a known kind, without asking PyTorch a second time."""
    gives = _gives(func)
    if gives is None or not all(_is_meta(arg) for arg in args):
        return func(*args, **kwargs)
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        return func(*args, **kwargs)
    named = ((name, _likeness(value)) for name, value in kwargs.items())
    key = (func, torch.get_default_dtype(), *map(_likeness, args), *named)
    given = _GIVEN.get(key)
    if given is not None:
        return torch.empty_strided(**given) if gives == "new" else args[0]
    output = func(*args, **kwargs)
    _GIVEN[key] = {}
    if gives == "new":
        _GIVEN[key] = {
            "size": output.shape,
            "stride": output.stride(),
            "dtype": output.dtype,
            "device": output.device,
        }
    return output


@cache
def _gives(func: Any) -> Literal["new", "first"] | None:
    """One new tensor, or the first argument, which alone is changed; None where not known."""
    if torch.Tag.pointwise not in func.tags and func not in _ALSO:
        return None
    schema = func._schema
    if len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor":
        return None
    if not schema.is_mutable:
        return "new" if schema.returns[0].alias_info is None else None
    written = [argument.name for argument in schema.arguments if argument.is_write]
    return "first" if written == ["self"] and schema.arguments[0].name == "self" else None


def _is_meta(argument: Any) -> bool:
    """A tensor there, a number, or several of them."""
    if isinstance(argument, Tensor):
        return argument.is_meta
    if isinstance(argument, list | tuple):
        return all(_is_meta(one) for one in argument)
    return argument is None or isinstance(argument, int | float)


def _likeness(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return (argument.shape, argument.stride(), argument.dtype)
    if isinstance(argument, list | tuple):
        return tuple(_likeness(one) for one in argument)
    return (type(argument), argument)
