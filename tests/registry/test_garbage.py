"""Garbage collection takes what nothing names and nothing else; holds die with their process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.registry.artefacts import check_store, save_artefact
from tunefork.errors import StoreError
from tunefork.registry.garbage import Collected, collect_garbage
from tunefork.registry.locks import together
from tunefork.registry.store import Store

NOTHING = Collected(files=0, bytes=0, folders=0, holds=0)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "home") as store:
        yield store


def test_only_what_no_version_names_goes(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a", seed=1)
    store.publish(artefact, "kept", tags=("prod",))
    save_artefact(artefact, seed=2)
    gone = store.publish(artefact, "gone")  # shares its configuration with the one that is kept
    size = (artefact / "adapter_model.safetensors").stat().st_size
    assert collect_garbage(store) == NOTHING
    store.remove("gone:v1")
    expected = Collected(files=1, bytes=size, folders=1, holds=0)
    assert collect_garbage(store, dry_run=True) == expected
    assert (store.root / "versions" / gone.digest).is_dir()
    assert collect_garbage(store) == expected
    assert not (store.root / "versions" / gone.digest).exists()
    assert collect_garbage(store) == NOTHING and check_store(store) == 1


def test_a_tag_and_a_hold_keep_a_version(store: Store, tmp_path: Path) -> None:
    version = store.publish(save_artefact(tmp_path / "a"), "a", tags=("prod",))
    with pytest.raises(StoreError, match="a:v1: the tag prod is on it; move or remove that first"):
        store.remove("a")
    store.untag("a", "prod")
    with store.hold(version, "a server"):
        with pytest.raises(
            StoreError, match=rf"held by a server \(process {os.getpid()}\); a server lets"
        ):
            store.remove("a:v1")
        assert collect_garbage(store) == NOTHING
        assert store.show("a:v1").holds == (f"a server (process {os.getpid()})",)
    assert store.show("a:v1").holds == ()
    store.remove("a:v1")
    assert collect_garbage(store).files == 2 and not list((store.root / "holds").iterdir())


def test_a_hold_of_what_is_not_there_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="nothing is published"):
        store.hold("a:v1", "a server")
    assert not list((store.root / "holds").iterdir())


def test_a_hold_dies_with_its_process(store: Store, tmp_path: Path) -> None:
    store.publish(save_artefact(tmp_path / "a"), "a")
    code = (
        "import sys, time; from pathlib import Path; from tunefork.registry.store import Store\n"
        "hold = Store.open(Path(sys.argv[1])).hold('a:v1', 'another')\n"
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "home")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="is held by another"):
            store.remove("a:v1")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert store.show("a:v1").holds == ()
    assert collect_garbage(store).holds == 1
    store.remove("a:v1")


def test_what_a_publish_in_progress_has_written_stays(store: Store, tmp_path: Path) -> None:
    """Garbage is collected when the publish has ended, however long that takes."""
    with together(store.root):
        with (tmp_path / "x").open("wb+") as stream:
            stream.write(b"written, and not yet named by a version")
            stream.seek(0)
            file = store.objects.add(stream, "notes.md", limit=100)
        with pytest.raises(StoreError, match="versions are being published"):
            collect_garbage(store, wait_s=0.05)
        assert store.objects.at(file.sha256).exists()
    assert collect_garbage(store).files == 1


def test_a_publish_waits_for_the_collection(tmp_path: Path) -> None:
    """And then finds nothing missing: what it shares with garbage is written again."""
    artefact, home = save_artefact(tmp_path / "a"), tmp_path / "home"
    failures: list[BaseException] = []

    def publish() -> None:
        try:
            with Store.open(home) as store:
                for _ in range(15):
                    store.remove(store.publish(artefact, "a"))
        except BaseException as error:
            failures.append(error)

    Store.open(home).close()
    writer = threading.Thread(target=publish)
    writer.start()
    with Store.open(home) as store:
        while writer.is_alive():
            collect_garbage(store)
            time.sleep(0.001)
        writer.join()
        assert not failures
        collect_garbage(store)
        assert not list(store.objects.folder.glob("??/*")) and store.list() == []


def test_leftovers_of_a_killed_publish_go(store: Store, tmp_path: Path) -> None:
    store.publish(save_artefact(tmp_path / "a"), "a")
    (store.objects.scratch / "1-dead").write_bytes(b"half")
    (store.objects.scratch / "1-view" / "inner").mkdir(parents=True)
    (store.objects.scratch / "1-view" / "inner" / "a.json").write_bytes(b"{}")
    assert collect_garbage(store) == Collected(files=2, bytes=6, folders=0, holds=0)
    assert not list(store.objects.scratch.iterdir()) and check_store(store) == 1
