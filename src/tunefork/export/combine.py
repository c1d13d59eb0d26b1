"""Several adapters of one base become one, by the definitions of the PEFT library.

    linear       A = sum_i a_i A_i and B = sum_i b_i B_i, b_i = sqrt(|w_i s_i|), a_i = b_i with the
                 sign of w_i s_i: w the weight given, s the adapter's own scale
    cat          A and B side by side: exactly sum_i w_i s_i B_i A_i, at the sum of the ranks
    ties         linear, over values trimmed to the largest and without those whose sign lost
                 (Yadav et al. 2023, https://arxiv.org/abs/2306.01708)
    dare_linear  linear, over values dropped at random and the rest scaled up
                 (Yu et al. 2023, https://arxiv.org/abs/2311.03099)
    dare_ties    the two together

All but cat mix A with A and B with B, so that the product also holds B_i A_j: rough, as PEFT's own
documentation says. The order of layers and of random draws is PEFT's, so that one seed gives the
same tensors there (peft/tuners/lora/model.py, add_weighted_adapter, and utils/merge_utils.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunefork.errors import AdapterError, BadInputError
from tunefork.export.adapter import Adapter, read_adapter, write_adapter
from tunefork.export.card import write_card
from tunefork.export.origin import write_combined_origin
from tunefork.export.publish import publish, staged
from tunefork.model.load import load_skeleton, load_tokenizer
from tunefork.registry.opening import Parts, check_parts, find_parts

KINDS = ("linear", "ties", "dare_linear", "dare_ties", "cat")
_Prune = Callable[[Tensor], Tensor]


def parse_weights(text: str | None, count: int) -> list[float]:
    """`0.5,0.5` as numbers, one an adapter; 1 each by default."""
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInputError(f"--weights: {text!r} is no list of numbers such as 0.5,0.5") from error
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise BadInputError(f"--weights: needs one finite number for each of {count} adapters")
    return weights


def combine_adapters(
    targets: Sequence[str],
    out: Path,
    *,
    kind: str | None,
    weights: Sequence[float],
    density: float | None = None,
    seed: int = 0,
) -> None:
    """Write the combination of `targets` to the adapter folder `out`; raises BadInputError."""
    _check(targets, kind, density)
    parts = [find_parts(target) for target in targets]
    folders = _adapter_folders(targets, parts)
    for target, part in zip(targets, parts, strict=True):
        check_parts(part, target)
    skeleton = load_skeleton(parts[0].section)
    order = [path for path, _ in skeleton.named_modules()]
    combined = combine(
        [read_adapter(folder) for folder in folders],
        order,
        kind=str(kind),
        weights=weights,
        density=density,
        generator=torch.Generator().manual_seed(seed),
    )
    with staged(out) as folder:
        write_adapter(combined, folder)
        load_tokenizer(parts[0].section).save_pretrained(folder)
        write_combined_origin(folder, targets, parts)
        write_card(folder, replace(parts[0], run=None, adapter=folder), out.name, kind="peft")
        publish(folder, out, None)


def combine(
    adapters: Sequence[Adapter],
    order: Sequence[str],
    *,
    kind: str,
    weights: Sequence[float],
    density: float | None,
    generator: torch.Generator,
) -> Adapter:
    """One adapter of scale 1; `order` lists the base's layers, in the order they are drawn for."""
    ranks = [adapter.rank for adapter in adapters]
    if kind != "cat" and len(set(ranks)) > 1:
        raise AdapterError(
            f"--combine {kind}: needs adapters of one rank, but they have {ranks}; use cat, or pad "
            "the lower ones (tunefork export --to peft --pad-rank)"
        )
    deltas = {}
    for path in order:
        chosen = [
            (*adapter.deltas[path], weight * adapter.scale)
            for adapter, weight in zip(adapters, weights, strict=True)
            if path in adapter.deltas
        ]
        if not chosen:
            continue
        deltas[path] = _cat(chosen) if kind == "cat" else _mix(chosen, kind, density, generator)
    if kind == "cat":
        deltas = {path: _at_rank(pair, sum(ranks)) for path, pair in deltas.items()}
    rank = sum(ranks) if kind == "cat" else ranks[0]
    targets = sorted({path for adapter in adapters for path in adapter.deltas})
    scale_one = {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": targets}
    return Adapter({**adapters[0].config, **scale_one}, deltas)


def _cat(chosen: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    a_rd = torch.cat([a * weight for a, _, weight in chosen])
    return a_rd, torch.cat([b for _, b, _ in chosen], dim=1)


def _at_rank(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Zeros for the adapters that have no delta on this layer."""
    a_rd, b_or = pair
    more = rank - a_rd.shape[0]
    zero_rd, zero_or = a_rd.new_zeros(more, a_rd.shape[1]), b_or.new_zeros(b_or.shape[0], more)
    return torch.cat([a_rd, zero_rd]), torch.cat([b_or, zero_or], dim=1)


def _mix(
    chosen: Sequence[tuple[Tensor, Tensor, float]],
    kind: str,
    density: float | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    signs = [math.copysign(1.0, weight) if weight else 1.0 for _, _, weight in chosen]
    roots = [math.sqrt(abs(weight)) for _, _, weight in chosen]
    prune = _pruner(kind, density, generator)
    a_nrd = torch.stack([prune(a) for a, _, _ in chosen])
    a_rd = _sum(a_nrd, [r * s for r, s in zip(roots, signs, strict=True)], kind)
    b_nor = torch.stack([prune(b) for _, b, _ in chosen])
    return a_rd, _sum(b_nor, roots, kind)


def _pruner(kind: str, density: float | None, generator: torch.Generator) -> _Prune:
    if kind == "linear":
        return lambda tensor: tensor
    assert density is not None
    if kind == "ties":
        return lambda tensor: _trim(tensor, density)
    return lambda tensor: _drop(tensor, density, generator)


def _trim(tensor: Tensor, density: float) -> Tensor:
    """The share `density` of the values that is largest; the rest zero."""
    kept = torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[kept] = 1
    return tensor * mask.reshape(tensor.shape)


def _drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each value kept with probability `density`, and scaled up by 1 / `density`."""
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density


def _sum(stacked_n: Tensor, weights: Sequence[float], kind: str) -> Tensor:
    """The weighted sum over N; for ties the mean over those with the elected sign."""
    shape = (-1,) + (1,) * (stacked_n.dim() - 1)
    weighted_n = stacked_n * torch.tensor(weights, dtype=stacked_n.dtype).view(shape)
    if not kind.endswith("ties"):
        return weighted_n.sum(dim=0)
    elected = torch.where(stacked_n.sum(dim=0) >= 0, 1, -1)
    agrees_n = stacked_n.sign() == elected
    return (weighted_n * agrees_n).sum(dim=0) / agrees_n.sum(dim=0).clamp(min=1.0)


def _check(targets: Sequence[str], kind: str | None, density: float | None) -> None:
    if kind not in KINDS:
        raise BadInputError(f"--combine: {kind} is none of {', '.join(KINDS)}")
    if len(targets) < 2:
        raise BadInputError("--combine: needs two adapters or more")
    needs_density = kind not in ("linear", "cat")
    if needs_density and (density is None or not 0.0 < density < 1.0):
        raise BadInputError(f"--density: {kind} needs a share between 0 and 1, such as 0.5")
    if density is not None and not needs_density:
        raise BadInputError(f"--density: {kind} keeps every value; leave it out")


def _adapter_folders(targets: Sequence[str], parts: Sequence[Parts]) -> list[Path]:
    folders: list[Path] = []
    for target, part in zip(targets, parts, strict=True):
        if part.adapter is None:
            raise AdapterError(f"{target}: is no adapter, and only adapters can be combined")
        if part.section != parts[0].section or part.is_nf4 != parts[0].is_nf4:
            raise AdapterError(
                f"{target}: belongs to {_base(part)}, but {targets[0]} to {_base(parts[0])}; only "
                "adapters of one base can be combined"
            )
        folders.append(part.adapter)
    return folders


def _base(parts: Any) -> str:
    at = f" at {parts.section.revision}" if parts.section.revision else ""
    return f"{parts.section.id}{at}{' quantised to NF4' if parts.is_nf4 else ''}"
