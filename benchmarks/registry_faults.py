"""Does the store keep what it acknowledged? Tags that many move at once; publishes that are killed.

    python -m benchmarks.registry_faults [--kills 200] [--operations 1000]

**Tags**: 4 processes make `operations` moves and reads of one tag. Each reader knows every
version's number and digest beforehand, so a torn read shows; every acknowledged move must stand in
the history, and the tag must be where the last one put it.

**Kills**: a process publishes one new artefact after another and writes down each that `publish`
has acknowledged; it gets SIGKILL at a random moment, `kills` times. A kill counts as landed if the
process ended by it, and as amidst a publish if one had begun and was not acknowledged. After each,
the store is opened, every acknowledged version must be there with every hash right, and every
version that can be seen must be whole.

Processes are forked from a server that has the imports already, so a kill hits work and no import.
"""

import argparse
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import save_file

from benchmarks.results import write
from tunefork.registry.garbage import collect_garbage
from tunefork.registry.objects import is_intact
from tunefork.registry.store import Store
from tunefork.registry.version import Version

_CONTEXT = multiprocessing.get_context("forkserver")
_VERSIONS = 8
_PROCESSES = 4
_BEGIN, _ACKNOWLEDGED = "begin", "acknowledged"


def save_artefact(folder: Path, seed: int, size: int = 20_000) -> Path:
    """An adapter's files, of random numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    save_file({"lora_A": numbers}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(f'{{"r": {seed + 1}}}')
    (folder / "notes.md").write_text(f"seed {seed}\n")
    return folder


def hammer_tag(folder: Path, operations: int) -> dict[str, Any]:
    """Move and read one tag from several processes; what was lost or torn."""
    home, log = folder / "home", folder / "moves"
    with Store.open(home) as store:
        for seed in range(_VERSIONS):
            store.publish(save_artefact(folder / "artefact", seed), "acme")
        store.tag("acme", "prod", "acme:v1")
        digests = {version.number: version.digest for version in store.list("acme")}
    begun = time.perf_counter()
    share = operations // _PROCESSES
    _run([(_move_and_read, (home, log, digests, share, n)) for n in range(_PROCESSES)])
    seconds = time.perf_counter() - begun
    lines = [line.split() for line in log.read_text().splitlines()]
    with Store.open(home) as store:
        history = [number for _, number, _ in store.show("acme").history if number][1:]
        last = store.resolve("acme:prod").number
    moves = Counter(int(line[1]) for line in lines if line[0] == "move")
    lost = (moves - Counter(history)).total() + (last != history[-1])
    return {
        "case": "tag moves and reads",
        "processes": _PROCESSES,
        "operations": len(lines),
        "moves": moves.total(),
        "lost": lost,
        "torn": sum(line[0] == "torn" for line in lines),
        "operations_per_s": round(len(lines) / seconds, 1),
    }


def kill_publishes(
    folder: Path, kills: int, seed: int = 0, within_s: float = 0.25, *, only_amidst: bool = False
) -> dict[str, Any]:
    """Kill a publishing process again and again; what was lost or half.

    `only_amidst`: at a random moment of those in which a publish is under way.
    """
    home, random_s = folder / "home", random.Random(seed)
    Store.open(home).close()
    found = {"landed": 0, "amidst_a_publish": 0, "acknowledged": 0, "lost_or_damaged": 0}
    found |= {"visible": 0, "half_versions": 0, "would_not_open": 0}
    acknowledged: dict[str, str] = {}
    for kill in range(kills):
        log = folder / f"log-{kill}"
        process = _CONTEXT.Process(target=_publish_forever, args=(home, log, folder, kill))
        process.start()
        _wait_for(log, _ACKNOWLEDGED if kill % 2 else _BEGIN)
        time.sleep(random_s.uniform(0, within_s))
        if only_amidst:
            _stop_amidst_a_publish(process.pid or 0, log)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        found["landed"] += process.exitcode == -signal.SIGKILL
        lines = [line.split() for line in log.read_text().splitlines()]
        found["amidst_a_publish"] += lines[-1][0] == _BEGIN
        new = {line[1]: line[2] for line in lines if line[0] == _ACKNOWLEDGED}
        acknowledged |= new
        try:
            _look(home, new, found)
        except (sqlite3.Error, OSError) as error:
            print(f"kill {kill}: {error}")
            found["would_not_open"] += 1
    found["acknowledged"] = len(acknowledged)
    with Store.open(home) as store:
        collect_garbage(store)
    found["visible"] = found["half_versions"] = found["lost_or_damaged"] = 0
    _look(home, acknowledged, found, is_whole=True)
    return {"case": "SIGKILL while publishing", "kills": kills} | found


def _look(
    home: Path, acknowledged: dict[str, str], found: dict[str, int], is_whole: bool = False
) -> None:
    """Count acknowledged versions that are gone or damaged, and versions that are not whole.

    Only those since the last kill are looked at, unless `is_whole`.
    """
    with Store.open(home) as store:
        if store.database.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
            found["would_not_open"] += 1
        versions = {str(v): v for v in store.list()}
        for reference, digest in acknowledged.items():
            version = versions.get(reference)
            if version is None or version.digest != digest or not _is_intact(store, version):
                found["lost_or_damaged"] += 1
        recent = list(versions.values())
        for version in recent if is_whole else recent[-3:]:
            found["half_versions"] += not _is_intact(store, version)
        found["visible"] = len(versions)


def _is_intact(store: Store, version: Version) -> bool:
    files = store.show(version).files
    whole = len(files) == 3 and sum(file.bytes for file in files) == version.bytes
    return whole and all(is_intact(store.objects.at(file.sha256), file) for file in files)


def _publish_forever(home: Path, log: Path, folder: Path, kill: int) -> None:
    artefact = folder / f"artefact-{kill}"  # a killed save leaves a half file in its folder
    with Store.open(home) as store:
        for n in range(10_000):
            save_artefact(artefact, kill * 10_000 + n)
            _append(log, f"{_BEGIN} {n}")
            version = store.publish(artefact, "acme", tags=("newest",))
            _append(log, f"{_ACKNOWLEDGED} {version} {version.digest}")


def _move_and_read(
    home: Path, log: Path, digests: dict[int, str], operations: int, seed: int
) -> None:
    choose = random.Random(seed)
    with Store.open(home) as store:
        for _ in range(operations):
            if choose.random() < 0.5:
                number = choose.choice(list(digests))
                store.tag("acme", "prod", f"acme:v{number}")
                _append(log, f"move {number}")
            else:
                version = store.resolve("acme:prod")
                is_whole = digests[version.number] == version.digest and "prod" in version.tags
                _append(log, "read" if is_whole else "torn")


def _append(log: Path, line: str) -> None:
    """One write, so that lines of several processes are never mixed, and a kill leaves it whole."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def _stop_amidst_a_publish(pid: int, log: Path) -> None:
    """Until the process stands still between a publish's begin and its acknowledgement."""
    process = psutil.Process(pid)
    while True:
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        if log.read_text().splitlines()[-1].startswith(_BEGIN):
            return
        process.resume()
        time.sleep(0.001)


def _wait_for(log: Path, word: str) -> None:
    until = time.monotonic() + 60
    while not log.exists() or word not in log.read_text():
        if time.monotonic() > until:
            raise TimeoutError("the publishing process has not begun")
        time.sleep(0.001)


def _run(work: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    processes: list[BaseProcess] = [_CONTEXT.Process(target=do, args=args) for do, args in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process ended with {process.exitcode}")


def prepare() -> None:
    """Let the server that processes are forked from import what they need."""
    needed = ["numpy", "safetensors.numpy", "tunefork.registry.store", "tunefork.registry.garbage"]
    multiprocessing.set_forkserver_preload(needed)
    multiprocessing.forkserver.ensure_running()


def measure_reading(folder: Path, count: int = 10_000) -> dict[str, Any]:
    """How long looking up takes in a store of `count` versions under 100 names."""
    with Store.open(folder / "home") as store:
        version = store.publish(save_artefact(folder / "artefact", 0), "seed", tags=("prod",))
        _multiply(store.database, version.id, count)
        resolved = _median_s(lambda: store.resolve("team/n42:prod"), 200)
        listed = _median_s(store.list, 5)
        of_one = _median_s(lambda: store.list("team/n42"), 20)
    return {
        "case": f"reading a store of {count:,} versions",
        "resolve_tag_ms": round(resolved * 1e3, 3),
        "list_all_ms": round(listed * 1e3, 1),
        "list_one_name_ms": round(of_one * 1e3, 2),
    }


def _multiply(database: sqlite3.Connection, version_id: int, count: int) -> None:
    database.execute("BEGIN")
    for n in range(count):
        name = f"team/n{n % 100}"
        database.execute("INSERT OR IGNORE INTO names VALUES (?, 1000)", (name,))
        database.execute(
            "INSERT INTO versions (name, number, digest, bytes, lineage, note, created) "
            "SELECT ?, ?, digest, bytes, lineage, note, created FROM versions WHERE id = ?",
            (name, n // 100 + 1, version_id),
        )
    database.execute(
        "INSERT INTO tags SELECT name, 'prod', max(id) FROM versions WHERE name LIKE 'team/%' "
        "GROUP BY name"
    )
    database.execute("COMMIT")


def _median_s(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[times // 2]


def main() -> None:
    """Run all, print, and write benchmarks/results/registry_faults.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--operations", type=int, default=1000)
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            hammer_tag(Path(scratch) / "tags", options.operations),
            kill_publishes(Path(scratch) / "kills", options.kills),
            measure_reading(Path(scratch) / "reading"),
        ]
    for row in rows:
        print(row, flush=True)
    print(write("registry_faults", rows, device="cpu"))


if __name__ == "__main__":
    main()
