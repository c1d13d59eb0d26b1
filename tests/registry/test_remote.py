"""Push and pull: whole or not at all, and nothing of a hostile place gets in."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.registry.artefacts import check_store, save_artefact
from tunefork.errors import StoreError
from tunefork.registry.garbage import collect_garbage
from tunefork.registry.objects import StoredFile, digest_of
from tunefork.registry.remote import pull, push
from tunefork.registry.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "home") as store:
        store.publish(save_artefact(tmp_path / "a"), "support/acme", tags=("prod",), note="a note")
        yield store


@pytest.fixture
def other(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "other") as store:
        yield store


@pytest.fixture(params=["folder", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        yield "memory://there"
        fsspec.filesystem("memory").store.clear()
    else:
        yield ("file://" if request.param == "file" else "") + str(tmp_path / "there")


def test_there_and_back(store: Store, other: Store, place: str) -> None:
    pushed = push(store, "support/acme:prod", place)
    assert push(store, "support/acme:v1", place) == pushed  # again: nothing to do
    found = pull(other, place, "support/acme", tags=("new",))
    assert (str(found), found.digest, found.note) == ("support/acme:v1", pushed.digest, "a note")
    assert found.tags == ("new",) and found.base == "owner/name"
    assert pull(other, place, "support/acme:v1").id == found.id  # what is here is not taken twice
    assert str(pull(other, place, "support/acme:v1", name="mine")) == "mine:v1"
    assert check_store(other) == 2


def test_the_highest_version_is_the_latest(
    store: Store, other: Store, place: str, tmp_path: Path
) -> None:
    for seed in range(1, 11):
        store.publish(save_artefact(tmp_path / "a", seed=seed), "support/acme")
    for number in (2, 9, 11):
        push(store, f"support/acme:v{number}", place)
    assert pull(other, place, "support/acme").digest == store.resolve("support/acme:v11").digest
    for reference, message in (
        ("support/acme:v3", "is not there; the place has v2, v9, v11"),
        ("support/other", "is not there; the place has no version of it"),
        ("support/acme:prod", "tags are local"),
        (None, "say which version to pull"),
    ):
        with pytest.raises(StoreError, match=message):
            pull(other, place, reference)


def test_a_version_there_never_changes(store: Store, other: Store, place: str) -> None:
    push(store, "support/acme", place)
    for name in ("support/acme", "x"):
        other.publish(save_artefact(other.root.parent / "b", seed=9), name)
    with pytest.raises(StoreError, match="has another support/acme:v1 .*versions never change"):
        push(other, "support/acme", place)
    push(other, "x", place)


def test_a_push_that_was_stopped_shows_nothing_and_goes_on(
    store: Store, other: Store, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunefork.registry import remote

    put, count = remote._put, 0

    def stop(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:  # two files, then the manifest
            raise OSError("the line is cut")
        put(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_put", stop)
        with pytest.raises(StoreError, match="cannot be read or written: OSError: the line is cut"):
            push(store, "support/acme", place)
    with pytest.raises(StoreError, match="is not there"):
        pull(other, place, "support/acme")
    push(store, "support/acme", place)
    assert pull(other, place, "support/acme").number == 1


def _manifest(place: Path) -> Path:
    return place / "versions" / "support" / "acme" / "v1.json"


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the manifest and make its digest right again, as an attacker would."""

    def damage(place: Path) -> None:
        content = json.loads(_manifest(place).read_text())
        change(content)
        try:
            files = [StoredFile(f["path"], f["sha256"], f["bytes"]) for f in content["files"]]
            content["digest"] = digest_of(files)
        except (KeyError, TypeError):
            pass
        _manifest(place).write_text(json.dumps(content))

    return damage


def _rename(path: str) -> Callable[[Path], None]:
    return _edit(lambda content: content["files"][0].update(path=path))


def _swap_object(place: Path) -> None:
    for file in (place / "objects").iterdir():
        file.write_bytes(bytes(file.stat().st_size))


def _longer_object(place: Path) -> None:
    for file in (place / "objects").iterdir():
        with file.open("ab") as stream:
            stream.write(b"more")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "other content": (_swap_object, "is not what the manifest says"),
    "longer content": (_longer_object, "has more than the .* bytes that are allowed"),
    "no content": (lambda p: shutil.rmtree(p / "objects"), "FileNotFoundError"),
    "path upwards": (_rename("../../.bashrc.json"), "is refused as a file's name"),
    "absolute path": (_rename("/tmp/a.json"), "is refused as a file's name"),
    "pickle": (_rename("pytorch_model.bin"), "are pickles"),
    "code": (_rename("modeling.py"), "takes no such file"),
    "hash that is a path": (
        _edit(lambda c: c["files"][0].update(sha256="../../../etc/passwd")),
        "files.0.sha256: String should match",
    ),
    "negative size": (_edit(lambda c: c["files"][0].update(bytes=-1)), "files.0.bytes"),
    "size of text": (_edit(lambda c: c["files"][0].update(bytes=1 << 50)), "allowed"),
    "size in words": (_edit(lambda c: c["files"][0].update(bytes="12")), "valid integer"),
    "name upwards": (_edit(lambda c: c.update(name="../x")), "is no name for the store"),
    "a file twice": (_edit(lambda c: c["files"].append(c["files"][0])), "names a file twice"),
    "twice but for case": (
        _edit(lambda c: c["files"].append(c["files"][0] | {"path": "Adapter_config.json"})),
        "names a file twice",
    ),
    "no weights": (_edit(lambda c: c["files"].pop()), "holds neither an adapter"),
    "too many files": (
        _edit(lambda c: c.update(files=[c["files"][0] | {"path": f"{n}.md"} for n in range(2001)])),
        "more than 2000 files",
    ),
    "unknown field": (_edit(lambda c: c.update(run="rm -rf")), "run: is not known to this version"),
    "newer format": (
        _edit(lambda c: c.update(format=2)),
        "format: is not known to this version.*newer",
    ),
    "wrong digest": (
        lambda p: _manifest(p).write_text(
            json.dumps(json.loads(_manifest(p).read_text()) | {"digest": "0" * 64})
        ),
        "its digest is not that of its files",
    ),
    "no JSON": (lambda p: _manifest(p).write_text("{"), "is no manifest of a version: the file"),
    "deep JSON": (lambda p: _manifest(p).write_text("[" * 100_000), "is no manifest"),
    "long JSON": (lambda p: _manifest(p).write_text(" " * (5 << 20)), "is larger than the 4,194"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_places(store: Store, other: Store, tmp_path: Path, case: str) -> None:
    damage, message = HOSTILE[case]
    push(store, "support/acme", str(tmp_path / "there"))
    damage(tmp_path / "there")
    with pytest.raises(StoreError, match=message):
        pull(other, str(tmp_path / "there"), "support/acme:v1", name="mine")
    assert other.list() == [] and not list(other.objects.scratch.iterdir())
    collect_garbage(other)
    assert not list(other.objects.folder.glob("??/*"))


def test_a_place_whose_package_is_missing_is_named(store: Store) -> None:
    if find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(StoreError, match="s3:// needs a package .*: pip install s3fs"):
        push(store, "support/acme", "s3://bucket/path")
    with pytest.raises(StoreError, match="is no place that fsspec knows"):
        push(store, "support/acme", "gopher://there")


def test_a_password_in_a_url_is_refused_and_not_repeated(store: Store) -> None:
    with pytest.raises(StoreError, match="holds a user or a password") as caught:
        push(store, "support/acme", "sftp://me:kumquat@host/path")
    assert "kumquat" not in str(caught.value)
