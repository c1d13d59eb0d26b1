"""The store of adapters and models: versions under names, tags that move, nothing lost.

    store = Store.open()
    version = store.publish(Path("runs/acme"), "support/acme", tags=("prod",))
    store.resolve("support/acme:prod").folder()

It lies in TUNEFORK_HOME/store: `store.sqlite` (`registry/database.py`), the files by their content
(`registry/objects.py`), and for each version a folder of hard links to them. Files are on the disk
before the one transaction that names them: when `publish` returns, the version survives a kill at
any later point, and one killed earlier leaves no version. Any number of processes may write; an
open `Store` is one thread's.
"""

import os
import sqlite3
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from tunefork.errors import StoreError
from tunefork.home import home
from tunefork.registry import rows
from tunefork.registry.database import FILE, as_store_error, connect, writing
from tunefork.registry.holds import Hold, owners
from tunefork.registry.intake import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_numbers,
    check_safetensors,
    incoming,
    opened,
)
from tunefork.registry.lineage import Lineage, read_lineage
from tunefork.registry.locks import hold_file, take_hold, together
from tunefork.registry.names import check_name, check_names, check_tag
from tunefork.registry.objects import Objects, StoredFile, digest_of
from tunefork.registry.run import read_record
from tunefork.registry.version import Details, Version, linked
from tunefork.train.events import EVENTS, read_steps


class Store:
    """An open store; close it, or use it in a `with`."""

    def __init__(self, root: Path, database: sqlite3.Connection) -> None:
        self.root = root
        self.database = database
        self.objects = Objects(root)

    @classmethod
    def open(cls, home_folder: Path | None = None) -> Self:
        """The store in `home_folder` (default TUNEFORK_HOME), made if need be. StoreError."""
        root = (home_folder or home()) / "store"
        with as_store_error(root):
            Objects(root).prepare()
        return cls(root.resolve(), connect(root))

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(
        self, folder: Path, name: str, *, tags: Sequence[str] = (), note: str = ""
    ) -> Version:
        """The adapter or model in `folder`, or of the run there, as the next version of `name`.

        Raises StoreError for files that the store does not take.
        """
        check_names(name, tags)
        artifact, run = _artifact(folder)
        with self.guarded(), together(self.root):
            files = []
            for file in incoming(artifact):
                with opened(artifact, file) as stream:
                    files.append(self.objects.add(stream, file.path, limit=file.limit))
            return self.admit(name, files, str(artifact), run=run, tags=tags, note=note)

    def admit(
        self,
        name: str,
        files: Sequence[StoredFile],
        where: str,
        *,
        run: Path | None = None,
        tags: Sequence[str] = (),
        note: str = "",
    ) -> Version:
        """A version of files that `objects` has; the caller has checked names and is `together`."""
        for file in files:
            if file.path.endswith(".safetensors"):
                check_safetensors(self.objects.at(file.sha256), f"{where}: {file.path}")
            if file.path == ADAPTER_WEIGHTS:
                check_numbers(self.objects.at(file.sha256), f"{where}: {file.path}")
        digest = digest_of(files)
        # Read from what was copied: the folder it came from may change meanwhile.
        lineage = read_lineage(linked(self.root, digest, files), run=run)
        self.objects.sync(files)
        with writing(self.database) as database:
            version_id = rows.insert_version(database, name, digest, files, lineage, note)
            for tag in tags:
                rows.move_tag(database, name, tag, version_id)
            row = database.execute(f"{rows.SELECT} WHERE v.id = ?", (version_id,)).fetchone()
        return self._version(row)

    def tag(self, name: str, tag: str, version: str | Version) -> Version:
        """Put `tag` on a version of `name` and off any other, in one step."""
        check_tag(tag)
        with self.guarded(), writing(self.database) as database:
            found = self._find(version)
            if found.name != name:
                raise StoreError(f"{found} is no version of {name}: a tag stays within its name")
            rows.move_tag(database, name, tag, found.id)
            return self._find(found)

    def untag(self, name: str, tag: str) -> None:
        """Take `tag` off; raises StoreError where `name` has no such tag."""
        with self.guarded(), writing(self.database) as database:
            if not rows.move_tag(database, name, tag, None):
                raise StoreError(f"{name}:{tag}: no such tag")

    def remove(self, version: str | Version) -> Version:
        """Take a version out; its files go with the next garbage collection.

        Raises StoreError while a tag or a live process holds it.
        """
        with self.guarded(), writing(self.database) as database:
            found = self._find(version)
            if found.tags:
                raise StoreError(
                    f"{found}: the tag {found.tags[0]} is on it; move or remove that first "
                    f"(tunefork adapters tag {found} {found.tags[0]} --remove)"
                )
            if held := owners(database, self.root, found.id):
                raise StoreError(
                    f"{found}: is held by {', '.join(held)}; a server lets go of it hold_idle_s "
                    "(60 by default) after its last request, or when it is stopped"
                )
            database.execute("DELETE FROM holds WHERE version_id = ?", (found.id,))
            database.execute("DELETE FROM versions WHERE id = ?", (found.id,))
            return found

    def hold(self, version: str | Version, owner: str) -> Hold:
        """Keep a version from being removed while this process lives, or until it is released."""
        with self.guarded(), together(self.root):
            hold, descriptor = take_hold(self.root)
            try:
                with writing(self.database) as database:
                    found = self._find(version)
                    database.execute(
                        "INSERT INTO holds VALUES (?, ?, ?, ?, ?)",
                        (hold, found.id, owner, os.getpid(), rows.now()),
                    )
            except BaseException:
                hold_file(self.root, hold).unlink()
                os.close(descriptor)
                raise
        return Hold(found, hold, descriptor)

    def resolve(self, reference: str) -> Version:
        """The version that is meant (`registry/names.py`); raises StoreError if there is none."""
        with self.guarded():
            return self._find(reference)

    def adapters_of(self, weights_sha256: str) -> list[Version]:
        """All versions that are adapters over the base with these weights, in their order."""
        with self.guarded():
            found = self.database.execute(
                f"{rows.SELECT} WHERE b.weights_sha256 = ? AND EXISTS (SELECT 1 FROM files f "
                "WHERE f.version_id = v.id AND f.path = ?) ORDER BY v.name, v.number",
                (weights_sha256, ADAPTER_CONFIG),
            )
            return [self._version(row) for row in found]

    def list(self, name: str | None = None) -> list[Version]:
        """All versions, or those of `name` and of the names below it, in their order."""
        where, values = "", {}
        if name is not None:
            where = "WHERE v.name = :name OR (v.name > :name || '/' AND v.name < :name || '0')"
            values = {"name": check_name(name)}  # '0' is the character after '/'
        with self.guarded():
            found = self.database.execute(
                f"{rows.SELECT} {where} ORDER BY v.name, v.number", values
            )
            return [self._version(row) for row in found]

    def show(self, reference: str | Version) -> Details:
        """All that is known of a version."""
        with self.guarded():
            found = self._find(reference)
            figures = self.database.execute(
                "SELECT metric, value, low, high FROM evaluations WHERE version_id = ?", (found.id,)
            )
            history = self.database.execute(
                "SELECT tag, number, moved FROM tag_moves WHERE name = ? ORDER BY id", (found.name,)
            )
            stored = self.database.execute(
                "SELECT lineage, weights_sha256, tokenizer_sha256, template_sha256 FROM versions v "
                "LEFT JOIN bases b ON b.id = base_id WHERE v.id = ?",
                (found.id,),
            ).fetchone()
            return Details(
                version=found,
                files=tuple(rows.files_of(self.database, found.id)),
                lineage=Lineage.model_validate_json(stored["lineage"]),
                identity={k: stored[k] for k in stored.keys()[1:] if stored[k]},
                metrics={row[0]: (row[1], row[2], row[3]) for row in figures},
                holds=tuple(owners(self.database, self.root, found.id)),
                history=tuple((row[0], row[1], row[2]) for row in history),
            )

    def guarded(self) -> AbstractContextManager[None]:
        """Faults of SQLite and the file system as StoreError."""
        return as_store_error(self.root / FILE)

    def _find(self, version: str | Version) -> Version:
        return self._version(rows.find(self.database, str(version)))

    def _version(self, row: sqlite3.Row) -> Version:
        return Version(
            name=row["name"],
            number=row["number"],
            digest=row["digest"],
            bytes=row["bytes"],
            base=row["model_id"] or None,
            revision=row["revision"] or None,
            method=row["method"],
            note=row["note"],
            created=row["created"],
            tags=tuple(sorted((row["tags"] or "").split())),
            id=row["id"],
            root=self.root,
        )


def unfinished(folder: Path) -> str | None:
    """In words, what the run that made the artefact in `folder` has left undone; None: nothing."""
    _, run = _artifact(folder)
    record = None if run is None else read_record(run)
    match record.status if record is not None else "ok":
        case "interrupted":
            assert run is not None and record is not None
            steps = read_steps(run / EVENTS)
            of = f" of {steps[-1].num_steps}" if steps else ""
            return f"{run}: was stopped after step {record.num_steps}{of}, and never evaluated"
        case "trained":
            return f"{run}: was never evaluated"
        case _:
            return None


def _artifact(folder: Path) -> tuple[Path, Path | None]:
    """The folder of the artefact, and of the run that made it: `folder` may be either."""
    record = read_record(folder)
    if record is not None:
        if record.artifact is None:
            why = "failed" if record.status == "failed" else "is of the untouched base"
            raise StoreError(f"{folder}: the run {why} and left no artefact to publish")
        return folder / record.artifact, folder
    parent = folder.resolve().parent
    record = read_record(parent)
    is_runs = record is not None and record.artifact == folder.resolve().name
    return folder, parent if is_runs else None
