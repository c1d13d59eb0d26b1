"""An adapter made elsewhere gets a record of its base, once it is shown to work there.

Loading it refuses keys and shapes that do not fit, NaN, and a B that is zero. That the adapter does
something is seen in the logits of a few prompts, computed before and after it is put on the base:
by an exact zero of A, a scale of nothing or a module that is never reached it would not.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunefork.data.chat import Renderer
from tunefork.data.example import Message
from tunefork.errors import AdapterError, DataError
from tunefork.home import home
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.fingerprint import check_identity, check_rendering, identify
from tunefork.model.golden import CONVERSATIONS
from tunefork.model.load import load_model, load_tokenizer
from tunefork.recipe import DataSection, ModelSection
from tunefork.registry.peft_format import load_adapter
from tunefork.registry.provenance import Provenance, read_provenance, write_provenance
from tunefork.registry.version import views

_MAX_PROMPT_TOKENS = 512


def adopt(
    folder: Path,
    base: ModelSection,
    *,
    prompts: Sequence[str] | None = None,
    precision: str = "fp32",
    say: Callable[[str], None] = print,
) -> Provenance:
    """Check the adapter in `folder` on `base`, and write its tunefork.json, which is returned.

    `prompts` are user turns that stand in for the golden ones; `precision` is as
    `train.precision`: in fp32 smaller effects are told from rounding, at twice bf16's memory. An
    adapter that has its record already is checked against it. Raises AdapterError for one that
    does not fit, is not finite or changes nothing; IdentityError where it records another base.
    """
    if views(home().resolve() / "store") in folder.resolve().parents:
        raise AdapterError(
            f"{folder}: lies in the store, where no version ever changes; copy it (cp -rL), adopt "
            "the copy and publish that"
        )
    identity = identify(base)
    known = read_provenance(folder)
    if known is not None:
        check_identity(known.identity, identity, what=str(folder), base=base.id)
    check_rendering(folder, base)
    device = pick_device()
    dtype = pick_dtype(precision, device)
    ids = _prompt_ids(load_tokenizer(base), prompts)
    model = load_model(base, dtype=dtype, device=device).requires_grad_(False).eval()
    before = _logits(model, ids)
    load_adapter(model, folder)
    change, floor = _change(before, _logits(model.eval(), ids), dtype, folder)
    if change <= floor:
        raise AdapterError(
            f"{folder}: changes no logit of {base.id} by more than rounding does ({change:.2g}, "
            f"where {dtype} rounds by {floor:.2g}): a dead adapter, or one of another base"
        )
    say(f"{folder}: changes the logits of {base.id} by up to {change:.3g}")
    if known is not None:
        return known
    provenance = Provenance(identity=identity)
    write_provenance(folder, provenance)
    return provenance


def _prompt_ids(tokenizer: Any, prompts: Sequence[str] | None) -> list[list[int]]:
    """Ids of each prompt as chat would send it; those that the template refuses are left out."""
    renderer = Renderer(tokenizer, DataSection(train="-"))
    conversations = [turns for turns in CONVERSATIONS if turns[-1].role == "user"]
    if prompts is not None:
        conversations = [(Message("user", prompt),) for prompt in prompts]
    found = []
    for turns in conversations:
        try:
            found.append(renderer.prompt_ids(turns)[:_MAX_PROMPT_TOKENS])
        except DataError:
            if prompts is not None:
                raise
    if not any(found):
        raise AdapterError("prompts: give at least one that is not empty")
    return [ids for ids in found if ids]


@torch.no_grad()
def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """fp32 logits, (L, V) a prompt, on the CPU."""
    return [
        model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in prompts
    ]


def _change(
    before: Sequence[Tensor], after: Sequence[Tensor], dtype: torch.dtype, folder: Path
) -> tuple[float, float]:
    """The largest change of a logit, and what rounding alone may come to.

    Without the adapter both passes would do the same sums, so that a dead one changes nothing, or
    as much as another order of the same sums: a few units in the last place of a hidden state,
    which the head's sum brings to the scale of the largest logit. Four of them, then. Training
    moves logits by tenths at the least: in fp32 a thousand times the floor.
    """
    for logits in after:
        if not bool(torch.isfinite(logits).all()):
            raise AdapterError(f"{folder}: makes logits NaN or infinite")
    change = max(float((b - a).abs().max()) for a, b in zip(before, after, strict=True))
    largest = max(float(logits.abs().max()) for logits in before)
    return change, 4 * torch.finfo(dtype).eps * largest
