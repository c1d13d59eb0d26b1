"""Versions, one version and two compared, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # a list is shown without PyTorch, which takes seconds to import
    from tunefork.registry.difference import Difference
    from tunefork.registry.version import Details, Version

_LAYERS = 10
"""Layers shown of a comparison; --json has all."""


def print_versions(versions: Sequence[Version]) -> None:
    """A line a version."""
    table = Table("version", "tags", "base", "method", "size", "published", "note", box=None)
    for version in versions:
        cells = (
            *(str(version), ", ".join(version.tags), version.base or "", version.method or ""),
            *(_size(version.bytes), version.created, version.note),
        )
        table.add_row(*map(escape, cells))
    Console(soft_wrap=True).print(table)


def print_details(details: Details) -> None:
    """All of a version."""
    version, lineage = details.version, details.lineage
    console = Console(soft_wrap=True, highlight=False, markup=False)
    facts = {
        "version": str(version),
        "tags": ", ".join(version.tags),
        "digest": f"sha256:{version.digest}",
        "base": " ".join(filter(None, (version.base, version.revision))),
        **{name: f"sha256:{value}" for name, value in details.identity.items()},
        "method": version.method,
        "data": lineage.data_sha256,
        "parent": lineage.parent,
        "trained": lineage.created,
        "published": version.created,
        "note": version.note,
        "held by": ", ".join(details.holds),
        "folder": str(version.folder()),
    }
    for name, value in facts.items():
        if value:
            console.print(f"{name.removesuffix('_sha256'):10} {value}")
    for file in details.files:
        console.print(f"{'file':10} {file.path} ({_size(file.bytes)})")
    for tag, number, moved in details.history[-_LAYERS:]:
        console.print(f"{'moved':10} {tag} {'off' if number is None else f'to v{number}'} {moved}")
    if details.metrics:
        from tunefork.cli.record import print_metrics

        print_metrics(details.metrics, console)


def print_difference(found: Difference) -> None:
    """What differs, and the layers that moved most."""
    console = Console(soft_wrap=True, highlight=False)
    if found.a.digest == found.b.digest:
        console.print("the same files", markup=False)
    pairs: dict[str, tuple[Any, Any]] = {}
    pairs |= {f"config.{key}": pair for key, pair in found.config.items()}
    _print_pairs(console, found, found.lineage | pairs)
    if not found.layers:
        return
    table = Table("layer", str(found.a), str(found.b), "relative change", box=None)
    for layer in found.layers[:_LAYERS]:
        norms = (layer.a_norm, layer.b_norm, layer.change)
        table.add_row(layer.layer, *("" if n is None else f"{n:.4g}" for n in norms))
    console.print(table)
    if len(found.layers) > _LAYERS:
        console.print(f"and {len(found.layers) - _LAYERS} more layers; --json has all")


def _print_pairs(console: Console, found: Difference, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    if not pairs:
        return
    table = Table("field", str(found.a), str(found.b), box=None)
    for name, (a, b) in pairs.items():
        table.add_row(escape(name), escape(str(a)), escape(str(b)))
    console.print(table)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count:,} B"
