"""Hostile folders: what is refused, by name, before anything of it is in the store."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.registry.artefacts import save_artefact
from tunefork.errors import StoreError
from tunefork.registry import intake
from tunefork.registry.claim import LOCK
from tunefork.registry.intake import check_path
from tunefork.registry.store import Store

WEIGHTS = "adapter_model.safetensors"


def _symlink(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "notes.json").symlink_to(folder.parent / "secret.json")


def _linked_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    (folder / WEIGHTS).symlink_to(folder.parent / WEIGHTS)


def _linked_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "inner").symlink_to(folder.parent / "elsewhere")


def _pickle(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(pickle.dumps({}))


def _long_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def _overlap(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def _beyond_the_end(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def _pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({}))


def _executable(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit")


def _deep(folder: Path) -> None:
    (folder / "a/b/c/d").mkdir(parents=True)
    (folder / "a/b/c/d/e.json").write_text("{}")


def _deep_json(folder: Path) -> None:
    (folder / "tunefork.json").write_text("[" * 100_000)


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, folder / WEIGHTS)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "symbolic link": (_symlink, "notes.json: is a symbolic link, which is refused; copy"),
    "weights that are a link": (_linked_weights, "is a symbolic link"),
    "folder that is a link": (_linked_folder, "inner: is a symbolic link"),
    "pickle": (_pickle, r"training_args.bin: .bin files are pickles, which can run code"),
    "FIFO": (lambda f: os.mkfifo(f / "pipe.json"), "pipe.json: is neither a file nor a folder"),
    "header of 4 EB": (_long_header, "is no safetensors file"),
    "tensors that overlap": (_overlap, "is no safetensors file"),
    "tensors beyond the end": (_beyond_the_end, "is no safetensors file"),
    "pickle named safetensors": (_pickled_weights, "is no safetensors file"),
    "code": (_executable, "modeling_evil.py: the store takes no such file; allowed are .jinja"),
    "hidden file": (lambda f: (f / ".env.json").write_text("{}"), "refused as a file's name"),
    "strange name": (lambda f: (f / "a\nb.json").write_text("{}"), "refused as a file's name"),
    "dots": (lambda f: (f / "a..json").write_text("{}"), "refused as a file's name"),
    "deep folder": (_deep, "at most 4 parts deep"),
    "deep JSON": (_deep_json, "tunefork.json: is not JSON"),
    "numbers that are none": (_not_finite, "holds numbers that are not finite; train it anew"),
    "run that was killed": (lambda f: (f / LOCK).touch(), "holds no finished run; the same"),
    "no weights": (_no_weights, "holds neither an adapter .* nor a model"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(tmp_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    artefact = save_artefact(tmp_path / "a")
    make(artefact)
    with Store.open(tmp_path / "home") as store:
        with pytest.raises(StoreError, match=message):
            store.publish(artefact, "a")
        assert store.list() == []


@pytest.mark.parametrize(
    "path",
    [
        *(
            "../a.json",
            "/etc/a.json",
            "a/../b.json",
            "a//b.json",
            "./a.json",
            "a\\b.json",
            "",
            "a/",
        ),
        *("a\0.json", "..json", "a/b/c/d/e.json", "~/a.json", "C:a.json"),
    ],
)
def test_paths_that_leave_the_folder(path: str) -> None:
    with pytest.raises(StoreError, match="is refused as a file's name"):
        check_path(path, "there")


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt", "PT", "pickle"])
def test_pickles_are_refused_by_name(suffix: str) -> None:
    with pytest.raises(StoreError, match="are pickles"):
        check_path(f"weights.{suffix}", "there")


def test_sizes_and_counts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = save_artefact(tmp_path / "a")
    (artefact / "notes.md").write_text("n" * 1000)
    with Store.open(tmp_path / "home") as store:
        with monkeypatch.context() as patch:
            patch.setattr(intake, "_MAX_TEXT_BYTES", 999)
            with pytest.raises(StoreError, match=r"notes.md: has more than the 999 bytes"):
                store.publish(artefact, "a")
        monkeypatch.setattr(intake, "MAX_FILES", 2)
        with pytest.raises(StoreError, match="more than 2 files"):
            store.publish(artefact, "a")
        assert list(store.objects.scratch.iterdir()) == []


def test_the_folder_itself_may_be_named_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(save_artefact(tmp_path / "a"))
    with Store.open(tmp_path / "home") as store:
        assert store.publish(tmp_path / "link", "a").number == 1


def test_a_link_put_there_between_the_look_and_the_reading(tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a")
    (file, *_) = intake.incoming(artefact)
    _linked_weights(artefact)
    (artefact / file.path).unlink()
    (artefact / file.path).symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic links"), intake.opened(artefact, file):
        pass
