"""Model files that are absent, damaged or incomplete become ModelErrors.

transformers and its readers raise whatever their own parsing runs into, and start at random the
weights that a checkpoint lacks, with no more than a warning.
"""

import contextlib
import struct
import textwrap
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from tunefork.errors import ModelError

_DAMAGE = (
    HFValidationError,
    LookupError,
    NotImplementedError,
    OSError,
    OverflowError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    struct.error,
)
"""What the libraries raise for files that are absent, damaged or not theirs."""


@contextlib.contextmanager
def unreadable(what: str, hint: str = "") -> Iterator[None]:
    """Turn what a bad model file makes the libraries raise into a ModelError: `what: why hint`."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises Exception itself; memory errors are no fault of the file.
        if not isinstance(error, _DAMAGE) and type(error) is not Exception:
            raise
        why = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise ModelError(f"{what}: {why}{hint}") from error


def check_filled(model: nn.Module, loaded: dict[str, Any], what: str) -> None:
    """Raise ModelError if weights of `model` were not in its files, or in another shape.

    `loaded` is transformers' `output_loading_info`.
    """
    absent = sorted(set(loaded["missing_keys"]) & {name for name, _ in model.named_parameters()})
    misfit = sorted(name for name, *_ in loaded["mismatched_keys"])
    for names, fault in (
        (absent, "lacks"),
        (misfit, "has in another shape than its configuration"),
    ):
        if names:
            more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
            raise ModelError(
                f"{what} {fault} {names[0]}{more} of {type(model).__name__}; give a complete "
                "checkpoint with its own configuration"
            )
