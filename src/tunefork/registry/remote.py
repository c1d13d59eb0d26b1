"""Versions in a shared place: a folder or an S3-style URL (fsspec), or the Hugging Face hub.

    URL/objects/<sha256>              files by their content
    URL/versions/<name>/vN.json       the manifest of a version, written last

A manifest is there only when all of its files are, so a reader never sees half a version, and a
push that was stopped goes on where it was. A pull trusts nothing: the manifest is bounded and held
to the rules of `registry/intake.py`, each file to its size and hash, before a version appears.
On the hub (`registry/hub.py`) a version is one commit with a manifest beside its files.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tunefork.errors import StoreError, TuneforkError, is_disk_full
from tunefork.registry import hub
from tunefork.registry.locks import together
from tunefork.registry.manifest import (
    MAX_BYTES,
    Manifest,
    ManifestFile,
    manifest_of,
    read_manifest,
    stored,
)
from tunefork.registry.names import check_names, parse_reference
from tunefork.registry.objects import is_intact
from tunefork.registry.store import Store
from tunefork.registry.version import Version

_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
Read = Callable[[ManifestFile], AbstractContextManager[BinaryIO]]


def push(store: Store, reference: str, url: str) -> Version:
    """Put a version at `url`: a folder, an fsspec URL or hf://owner/name. Raises StoreError.

    A version that is there already is left; one of other content under its number is an error.
    """
    version = store.resolve(reference)
    manifest = manifest_of(store, version)
    if url.startswith(hub.SCHEME):
        hub.push(version.intact(), manifest, url)
        return version
    files, root = _file_system(url)
    place = f"{root}/versions/{version.name}/v{version.number}.json"
    with _said(url):
        if files.exists(place):
            there = read_manifest(files.cat_file(place, end=MAX_BYTES + 1), f"{url}: {version}")
            if there.digest != version.digest:
                raise StoreError(
                    f"{url}: has another {version} (sha256:{there.digest[:12]}); versions never "
                    "change: push it under another name, or to another place"
                )
            return version
        version.intact()  # what is pushed goes by its hash: others would be told a wrong one
        for file in manifest.files:
            target = f"{root}/objects/{file.sha256}"
            if not (files.exists(target) and files.size(target) == file.bytes):
                _put(files, target, partial(files.put_file, str(store.objects.at(file.sha256))))
        text = manifest.model_dump_json(indent=1).encode()
        _put(files, place, lambda at: files.pipe_file(at, text))
    return version


def pull(
    store: Store,
    url: str,
    reference: str | None = None,
    *,
    name: str | None = None,
    tags: Sequence[str] = (),
) -> Version:
    """Take a version from `url` as the next one of `name` (default: the name it has there).

    Content that `name` has already is not taken twice. On the hub `reference` is left out. Raises
    StoreError for what is not exactly what the manifest says.
    """
    if url.startswith(hub.SCHEME):
        if reference is not None:
            raise StoreError(f"{url}: a repository holds one artefact; leave out {reference!r}")
        with hub.opened(url) as (text, download):
            return _take_in(store, read_manifest(text, url), download, url, name, tags)
    if reference is None:
        raise StoreError(f"{url}: say which version to pull, such as support/acme:v3")
    files, root = _file_system(url)
    with _said(url):
        place = _manifest_place(files, root, reference, url)
        manifest = read_manifest(files.cat_file(place, end=MAX_BYTES + 1), f"{url}: {reference}")

    def read(file: ManifestFile) -> AbstractContextManager[BinaryIO]:
        stream: AbstractContextManager[BinaryIO] = files.open(f"{root}/objects/{file.sha256}", "rb")
        return stream

    return _take_in(store, manifest, read, url, name, tags)


def _take_in(
    store: Store,
    manifest: Manifest,
    read: Read,
    url: str,
    name: str | None,
    tags: Sequence[str],
) -> Version:
    name = name or manifest.name
    check_names(name, tags)
    for version in store.list(name):
        if version.name == name and version.digest == manifest.digest:
            for tag in tags:
                version = store.tag(name, tag, version)
            return version
    with store.guarded(), together(store.root):
        for file, expected in zip(manifest.files, stored(manifest), strict=True):
            if is_intact(store.objects.at(file.sha256), expected):
                continue
            with _said(url), read(file) as stream:
                found = store.objects.add(stream, file.path, limit=file.bytes)
            if found != expected:
                raise StoreError(
                    f"{url}: {file.path} is not what the manifest says: sha256 "
                    f"{found.sha256[:12]}, not {file.sha256[:12]}; push it anew"
                )
        return store.admit(name, stored(manifest), url, tags=tags, note=manifest.note)


def _manifest_place(files: Any, root: str, reference: str, url: str) -> str:
    """Path of the manifest that `reference` means; without a number the highest."""
    wanted = parse_reference(reference)
    if wanted.tag is not None:
        raise StoreError(f"{url}: {reference}: tags are local; give a version, such as v3")
    folder = f"{root}/versions/{wanted.name}"
    numbers = []
    if files.isdir(folder):
        names = (str(path).rpartition("/")[2] for path in files.ls(folder, detail=False))
        parts = (name.removeprefix("v").removesuffix(".json") for name in names)
        numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    number = wanted.number or max(numbers, default=0)
    if number not in numbers:
        has = ", ".join(f"v{number}" for number in sorted(numbers)[-5:]) or "no version of it"
        raise StoreError(f"{url}: {reference}: is not there; the place has {has}")
    return f"{folder}/v{number}.json"


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    if "@" in urlsplit(url).netloc:  # it would stand in messages and in the shell's history
        raise StoreError(
            "the URL holds a user or a password: leave them out, and give them as the place's "
            "fsspec package takes them (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        scheme = url.partition("://")[0]
        package = _EXTRAS.get(scheme, f"the fsspec package for {scheme}")
        raise StoreError(
            f"{url}: {scheme}:// needs a package that is not installed: pip install {package}"
        ) from error
    except ValueError as error:
        raise StoreError(f"{url}: is no place that fsspec knows: {error}") from error
    return files, str(root).rstrip("/")


def _put(files: Any, target: str, write: Callable[[str], None]) -> None:
    """Write a file that appears whole: object stores do that, a file system by a rename."""
    files.makedirs(target.rpartition("/")[0], exist_ok=True)
    if "file" not in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,)):
        write(target)
        return
    scratch = f"{target}.{secrets.token_hex(8)}.part"
    try:
        write(scratch)
        files.mv(scratch, target)
    finally:
        if files.exists(scratch):
            files.rm(scratch)


@contextmanager
def _said(url: str) -> Iterator[None]:
    """What the place's client raises (each has errors of its own), as a StoreError."""
    try:
        yield
    except TuneforkError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise
        said = f"{type(error).__name__}: {error}"
        raise StoreError(f"{url}: cannot be read or written: {said}") from error
