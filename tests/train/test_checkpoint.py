"""Checkpoints on disk: whole or not there, damaged ones passed over, never code, a full disk."""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_state import checkpoints, run, start, whole
from tunefork.errors import CheckpointError, DivergedError
from tunefork.train import checkpoint
from tunefork.train.checkpoint import FACTS, MANIFEST, TENSORS
from tunefork.train.checkpoints import Checkpoints, Found
from tunefork.train.loop import StepRecord
from tunefork.train.state import Progress, capture, digest, restore
from tunefork.train.tensor_file import read_tensors, write_tensors

MUTATIONS = 200


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def _saved(folder: Path, steps: range = range(1, 4), **options: Any) -> Checkpoints:
    """A tiny run's checkpoints of `steps`; all of one state, which is enough here."""
    model, optimizer = start("lora")
    found = checkpoints(folder, **options)
    with found:
        for step in steps:
            found.save(model, optimizer, Progress(step, 10 * step, 5 * step, 0.5), wait=True)
    return found


def test_the_newest_are_kept_and_found(tmp_path: Path) -> None:
    saved = _saved(tmp_path, keep=2)
    assert _names(tmp_path) == ["step-000002", "step-000003"]
    found = saved.newest()
    assert found is not None and found.facts.progress() == Progress(3, 30, 15, 0.5)
    saved.clear()
    assert saved.newest() is None and not (tmp_path / "checkpoints").exists()


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.tensor(7),
        "c": torch.arange(6, dtype=torch.uint8).reshape(2, 3).t(),
        "d": torch.empty(0, 4),
    }
    write_tensors(tmp_path / "t", tensors)
    back = read_tensors(tmp_path / "t")
    assert digest(back) == digest(tensors)


@pytest.mark.parametrize("file", [TENSORS, FACTS, MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "pipe"])
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, file: str, damage: str) -> None:
    saved, said = _saved(tmp_path), list[str]()
    saved.say = said.append
    path = tmp_path / "checkpoints" / "step-000003" / file
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case _:
            path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    found = saved.newest()
    assert found is not None and found.facts.step == 2
    assert len(said) == 1 and str(path.parent) in said[0]


def test_another_runs_is_passed_over_and_another_environment_is_said(tmp_path: Path) -> None:
    saved, said = _saved(tmp_path), list[str]()
    saved.say = said.append
    saved.environment = {"threads": 2}
    assert saved.newest() is not None
    assert said == [
        "warning: the run began with threads 1 and goes on with 2: its bits may differ from those "
        "of a run that was not stopped"
    ]
    saved.setting = {"seed": 1}
    assert saved.newest() is None
    assert "step-000003: is of another run: seed 0, here 1" in said[1]


def test_what_is_damaged_or_of_an_abandoned_future_goes_before_what_is_whole(
    tmp_path: Path,
) -> None:
    saved = _saved(tmp_path, range(1, 6), keep=4)
    (tmp_path / "checkpoints" / "step-000005" / MANIFEST).unlink()
    (tmp_path / "checkpoints" / "step-000004" / MANIFEST).unlink()
    saved.say = lambda line: None
    saved.policy = type(saved.policy)(keep=2)
    found = saved.newest()
    assert found is not None and found.facts.step == 3
    model, optimizer = start("lora")
    saved.save(model, optimizer, Progress(4), wait=True)  # taken again
    assert _names(tmp_path) == ["step-000003", "step-000004"]
    newest = saved.newest()
    assert newest is not None and newest.facts.step == 4


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    saved = _saved(tmp_path)
    (tmp_path / "checkpoints" / f"{checkpoint.SCRATCH}step-000009").mkdir()
    with saved:
        assert _names(tmp_path) == ["step-000002", "step-000003"]


def test_a_failure_in_the_background_comes_up_in_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step-000001: cannot be written: .*File exists"):
        run("lora", checkpoints(tmp_path))


def test_a_checkpoint_due_by_steps_is_on_the_disk_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = checkpoint.write, list[tuple[int, set[str]]]()

    def slowly(*arguments: Any, **options: Any) -> Path:
        time.sleep(0.05)  # much longer than a step: one written aside would be late
        return write(*arguments, **options)

    def on_step(record: StepRecord) -> None:
        seen.append((record.step, {p.name for p in (tmp_path / "checkpoints").glob("step-*")}))

    monkeypatch.setattr(checkpoint, "write", slowly)
    run("lora", checkpoints(tmp_path, every_steps=2), on_step=on_step)
    for step, names in seen[2:]:
        assert checkpoint.folder_name((step - 1) // 2 * 2) in names


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    said: list[str] = []
    saved = checkpoints(tmp_path, every_steps=1)
    saved.say = said.append

    def on_step(record: StepRecord) -> None:
        if record.step == 3:
            trained[0].data.view(-1)[0] = float("nan")

    trained: list[torch.nn.Parameter] = []

    def on_capture(model: Any, *arguments: Any, **options: Any) -> Any:
        trained[:] = [p for p in model.parameters() if p.requires_grad]
        return capture(model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunefork.train.checkpoints.capture", on_capture)
        with pytest.raises(DivergedError):
            run("lora", saved, on_step=on_step)
    found = saved.newest()
    assert found is not None and found.facts.step == 2
    assert any("step 3: weights are not finite" in line for line in said)


def _mutated(content: bytes, draw: random.Random) -> bytes:
    """Another file of about the same length: bytes, digits, words, or the whole end changed."""
    changed = bytearray(content)
    match draw.randrange(6):
        case 0:
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
        case 1:
            changed = changed[: draw.randrange(len(changed))]
        case 2:
            at = [i for i, byte in enumerate(changed[:4096]) if chr(byte).isdigit()]
            for _ in range(draw.randint(1, 3)):
                changed[draw.choice(at or [0])] = ord(draw.choice("0123456789"))
        case 3:
            changed[:8] = draw.choice((0, 1, 2**31, 2**62, 2**64 - 1)).to_bytes(8, "little")
        case 4:
            old, new = draw.choice(_WORDS)
            changed = bytearray(bytes(changed).replace(old, new, draw.randint(1, 3)))
        case _:
            start = draw.randrange(len(changed))
            changed[start:start] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 64)))
    return bytes(changed)


_WORDS = [
    (b'"F32"', b'"F64"'),
    (b'"F32"', b'"I32"'),
    (b'"shape":[', b'"shape":[99999999999,'),
    (b'"shape":[', b'"shape":[-1,'),
    (b"data_offsets", b"data_offset"),
    (b"weights/", b"weights/../"),
    (b"random/cpu", b"random/gpu"),
    (b"step", b"stop"),
    (b":", b":[[[["),
    (b"{", b"{" * 5000),
    (b"1", b"1e999"),
    (b"1", b"-1"),
    (b"1", b"NaN"),
    (b"safetensors", b"pickle"),
    (b"state.json", b"../../../../etc/passwd"),
]


def _rehash(folder: Path) -> None:
    """What someone who means harm would do after changing a file."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = {
            "sha256": checkpoint._sha256(file),
            "num_bytes": file.stat().st_size,
        }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_hostile_and_broken_files_end_in_a_named_error_or_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_code(*_: object, **__: object) -> None:
        raise AssertionError("code from a file")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, no_code)
    saved, said = _saved(tmp_path, range(1, 2)), list[str]()
    saved.say = said.append
    folder, draw = tmp_path / "checkpoints" / "step-000001", random.Random(0)
    good = {name: (folder / name).read_bytes() for name in (TENSORS, FACTS, MANIFEST)}
    model, optimizer = start("lora")
    ends = {"passed over": 0, "error": 0, "same": 0, "went on": 0}
    for number in range(MUTATIONS):
        for name, content in good.items():
            (folder / name).write_bytes(content)
        name = (TENSORS, TENSORS, FACTS, MANIFEST)[number % 4]
        changed = _mutated(good[name], draw)
        (folder / name).write_bytes(changed)
        if name != MANIFEST:
            _rehash(folder)
        before = len(said)
        found = saved.newest()
        if found is None:
            assert len(said) == before + 1 and str(folder) in said[-1]
            ends["passed over"] += 1
            continue
        ends[_end(found, model, optimizer, changed == good[name])] += 1
    assert ends["passed over"] > 50 and ends["error"] > 20, ends


def _end(found: Found, model: Any, optimizer: Any, is_same: bool) -> str:
    before = digest(capture(model, optimizer, Progress()).tensors)
    try:
        restore(found.read(), model, optimizer)
    except CheckpointError as error:
        assert str(error)
        assert digest(capture(model, optimizer, Progress()).tensors) == before
        return "error"
    # What was changed and hashed again may be other numbers of the right shapes: a state as good
    # as any. Only who can write to the run's folder can do that.
    return "same" if is_same else "went on"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(
    small_disk: Path, fill: Callable[[Path], None]
) -> None:
    saved = _saved(small_disk, range(1, 2))
    model, optimizer = start("lora")
    fill(small_disk)
    with pytest.raises(CheckpointError) as raised:
        saved.save(model, optimizer, Progress(2), wait=True)
    assert "step-000002: cannot be written: the disk is full" in str(raised.value)
    assert raised.value.exit_status == 1
    assert _names(small_disk) == ["step-000001"]
    found = saved.newest()
    assert found is not None and found.read().tensors.keys()


@pytest.fixture
def fill() -> Callable[[Path], None]:
    """Writes until nothing more goes in."""

    def write(folder: Path) -> None:
        with (folder / "ballast").open("wb", buffering=0) as stream:
            try:
                while stream.write(b"x" * 4096):
                    pass
            except OSError:
                return

    return write


def test_no_bit_is_lost_by_way_of_the_disk(tmp_path: Path) -> None:
    model, optimizer = start("full_8bit")
    saved = checkpoints(tmp_path)
    saved.save(model, optimizer, Progress(1), wait=False)
    with saved:
        pass
    found = saved.newest()
    assert found is not None
    assert digest(found.read().tensors) == digest(capture(model, optimizer, Progress()).tensors)
    restore(whole("full_8bit")[0], model, optimizer)
    assert digest(capture(model, optimizer, Progress()).tensors) == digest(
        whole("full_8bit")[0].tensors
    )
