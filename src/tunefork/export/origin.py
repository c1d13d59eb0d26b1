"""What an export is a form of: `tunefork.json` goes with it, so that it too is known and checked.

Without it an exported adapter would load onto any base, and a QLoRA one onto a base that is not
quantised, in silence.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunefork.model.fingerprint import identify, identify_trained
from tunefork.recipe import Method
from tunefork.registry.opening import Parts
from tunefork.registry.provenance import Provenance, read_provenance, write_provenance


def origin_of(parts: Parts) -> Provenance | None:
    """What is recorded of `parts`; None where nothing is."""
    folder = parts.adapter or Path(parts.section.id)
    if (found := read_provenance(folder)) is not None:
        return found
    return None if parts.identity is None else Provenance(identity=parts.identity)


def write_origin(folder: Path, parts: Parts, *, whole: Any | None = None) -> None:
    """Write what is recorded of `parts` to the export in `folder`.

    `whole`: the tokenizer of a whole model's folder, whose own identity is then recorded too.
    """
    origin = origin_of(parts)
    if origin is None and whole is not None and parts.adapter is not None:
        origin = Provenance(identity=identify(parts.section))
    if origin is None:
        return
    own = None if whole is None else identify_trained(folder, whole)
    write_provenance(folder, origin.model_copy(update={"own": own}))


def write_combined_origin(folder: Path, targets: Sequence[str], parts: Sequence[Parts]) -> None:
    """Write the base, and the method, of a combination of `targets`; its parents are these."""
    origins = [origin_of(part) for part in parts]
    hashes = {origin.data_sha256 for origin in origins if origin is not None}
    combined = Provenance(
        identity=identify(parts[0].section),
        method=Method.QLORA if parts[0].is_nf4 else Method.LORA,
        data_sha256=hashes.pop() if len(hashes) == 1 else None,
        parent=", ".join(targets),
    )
    write_provenance(folder, combined)
