"""Which files hold a model's weights: the safetensors that transformers would read, and no others.

A repository may carry the same weights in several formats; one name is asked for after another, as
`from_pretrained` does, so that nothing is downloaded that loading would not download too. Pickle
is refused by name: reading it can run code.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from tunefork.errors import ModelError
from tunefork.model.damage import unreadable
from tunefork.model.load import find
from tunefork.recipe import ModelSection

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_INDEX_BYTES = 64 * 2**20

Fetch = Callable[[str], Path | None]
"""A file's name within the model's folder -> where it lies; None where there is none."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a model's files lie."""

    what: str
    """How messages name it."""
    folder: Path
    repository: str | None
    """On the hub: `folder` is a snapshot of it that bears its commit and may lack files yet."""


def find_files(section: ModelSection) -> Located:
    """Where the model lies; a hub model is fetched as far as its config.json. Raises ModelError."""
    source, what = find(section), f"model.id: {section.id}"
    if (folder := Path(source.location)).is_dir():
        return Located(what, folder, None)
    with unreadable(f"{what} cannot be found", " (a hub id needs the network)"):
        config = hf_hub_download(source.location, "config.json", revision=source.revision or "main")
    return Located(what, Path(config).parent, source.location)


def weight_files(located: Located) -> list[Path]:
    """The safetensors files of a model; a hub's are fetched.

    Raises ModelError where the weights are in pickle or another format, or a file is missing.
    """
    fetch = _fetcher(located)
    with unreadable(f"{located.what} cannot be read"):
        if single := fetch(SINGLE):
            return [single]
        index = fetch(INDEX)
        names = [] if index is None else _shards(index)
        files = [(name, fetch(name)) for name in names]
    for name, file in files:
        if file is None:
            raise ModelError(
                f"{located.what}: {name}, which {INDEX} names, is missing; fetch it again"
            )
    if not files:
        raise ModelError(f"{located.what}: {_otherwise(located.folder)}")
    return [file for _, file in files if file is not None]


def _fetcher(located: Located) -> Fetch:
    repository, folder = located.repository, located.folder
    if repository is None:
        return lambda name: file if (file := folder / name).is_file() else None

    def fetch(name: str) -> Path | None:
        try:  # all files of one revision, though the branch may move meanwhile
            return Path(hf_hub_download(repository, name, revision=folder.name))
        except EntryNotFoundError:
            return None

    return fetch


def _shards(index: Path) -> list[str]:
    """Names of the files that `index` names, in order; raises ValueError for what is none."""
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError(f"{INDEX} is larger than {_MAX_INDEX_BYTES} bytes")
    content = json.loads(index.read_bytes())
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{INDEX} has no weight_map of file names")
    for name in (names := sorted(set(shards.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {name!r}, which is no safetensors file beside it")
    return names


def _otherwise(folder: Path) -> str:
    """What to do about weights that are not in safetensors."""
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"its weights are in pickle ({pickles[0]}), which may run code when it is read; give "
            "the model's safetensors revision, or convert it once where you trust its maker: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    return f"has neither {SINGLE} nor {INDEX}; give a model saved as safetensors"
