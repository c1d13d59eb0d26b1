"""An artefact appears at its place in one rename, and only if it passed.

It is made in a hidden folder beside that place. What fails its proof is left under NAME.failed,
to be looked at, and never under NAME.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunefork.errors import RunFolderError, TuneforkError
from tunefork.export.proof import Proof, write_proof


class ExportFailedError(TuneforkError):
    """An export is not what was trained. Exit status 1."""


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden folder on `out`'s file system, gone afterwards unless it was published.

    Raises RunFolderError where `out` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out}: exists already; give another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "artefact"
        folder.mkdir()
        yield folder


def publish(folder: Path, out: Path, proof: Proof | None) -> None:
    """Move the staged `folder` to `out`, or raise ExportFailedError and move it to `out`.failed."""
    if proof is not None:
        write_proof(folder, proof)
    if proof is None or proof.passed:
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
        return
    failed = out.with_name(out.name + ".failed")
    if failed.exists():
        shutil.rmtree(failed)
    folder.rename(failed)
    raise ExportFailedError(
        f"{out}: not published, because it is not what was trained: {'; '.join(proof.reasons)}. "
        f"It lies in {failed} with its proof.json; other limits: --max-mean-kl, --max-kl, "
        "--min-top1"
    )
