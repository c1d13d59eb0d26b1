"""A version as a repository of the Hugging Face hub: one commit of its files and a manifest.

The repository is a plain PEFT or Transformers folder to whoever else loads it. A commit is atomic:
readers see all of a version or none. A new repository is private; whoever wants to, opens it there.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tunefork.errors import StoreError, TuneforkError
from tunefork.registry.manifest import MAX_BYTES, Manifest, ManifestFile

SCHEME = "hf://"
MANIFEST = "tunefork-manifest.json"
_URL = re.compile(r"hf://(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_THE_HUBS = {".gitattributes", MANIFEST}


def push(folder: Path, manifest: Manifest, url: str) -> None:
    """Make the repository hold this version and nothing else, in one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo, revision = _repository(url)
    api = HfApi()
    with _said(url):
        api.create_repo(repo, private=True, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        wanted = {file.path for file in manifest.files} | _THE_HUBS
        stale = set(api.list_repo_files(repo, revision=revision)) - wanted
        operations: list[Any] = [CommitOperationDelete(path_in_repo=path) for path in sorted(stale)]
        operations += [
            CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=str(folder / file.path))
            for file in manifest.files
        ]
        text = manifest.model_dump_json(indent=1).encode()
        operations.append(CommitOperationAdd(path_in_repo=MANIFEST, path_or_fileobj=text))
        message = f"{manifest.name}:v{manifest.number} (sha256:{manifest.digest[:12]})"
        api.create_commit(repo, operations, commit_message=message, revision=revision)


@contextmanager
def opened(url: str) -> Iterator[tuple[bytes, Callable[[ManifestFile], BinaryIO]]]:
    """The manifest's text, and how to read a file; all of one commit, whatever is pushed meanwhile.

    Files come to a scratch folder of plain files and go with it: the hub's cache has links.
    """
    from huggingface_hub import HfApi

    repo, revision = _repository(url)
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="tunefork-") as scratch:
        with _said(url):
            commit = api.repo_info(repo, revision=revision).sha

        def fetch(path: str, limit: int) -> Path:
            with _said(url):
                found = api.get_paths_info(repo, [path], revision=commit)
                if len(found) != 1:
                    raise StoreError(
                        f"{url}: has no {path}"
                        + ("; it was not pushed by tunefork" if path == MANIFEST else "")
                    )
                if (size := getattr(found[0], "size", None)) is None or size > limit:
                    raise StoreError(f"{url}: {path} has {size} bytes, and {limit:,} are allowed")
                return Path(api.hf_hub_download(repo, path, revision=commit, local_dir=scratch))

        def read(file: ManifestFile) -> BinaryIO:
            return fetch(file.path, file.bytes).open("rb")

        yield fetch(MANIFEST, MAX_BYTES).read_bytes(), read


def _repository(url: str) -> tuple[str, str | None]:
    """`owner/name` and the branch or commit of hf://owner/name@revision."""
    match = _URL.fullmatch(url)
    if match is None:
        raise StoreError(f"{url}: write hf://owner/name or hf://owner/name@branch")
    return match["repo"], match["revision"]


@contextmanager
def _said(url: str) -> Iterator[None]:
    """What the hub's client raises (its own errors, httpx's, OSError), as a StoreError."""
    try:
        yield
    except TuneforkError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise StoreError(f"{url}: the hub refused or cannot be reached: {first[0]}") from error
