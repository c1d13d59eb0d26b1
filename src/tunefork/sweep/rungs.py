"""The rungs of a sweep: who has reached which, and who goes on.

What was measured at a rung lies in `rungs/N/VARIANT.npz`, one value a validation example, and every
decision follows from these files: a sweep that was killed decides as it would have.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tunefork.evaluate.evaluate import load_columns, save_columns
from tunefork.evaluate.statistics import Columns
from tunefork.sweep.halving import Ranked, decide
from tunefork.sweep.variants import Variant

FOLDER = "rungs"


@dataclass(slots=True)
class Rungs:
    """Successive halving over the variants of one sweep."""

    folder: Path
    """`rungs/` of the sweep."""
    keep: float
    variants: dict[str, Variant]
    group_of: Callable[[Variant], object]
    """Who is ranked against whom."""
    absent: set[str] = field(default_factory=set)
    """Those that reach no further rung."""
    _columns: dict[tuple[int, str], Columns] = field(default_factory=dict)
    _decided: dict[tuple[int, object], dict[str, Ranked]] = field(default_factory=dict)

    def reached(self, rung: int, name: str, columns: Columns) -> None:
        """A variant came to rung `rung`, from 0; on the disk when this returns."""
        file = self._file(rung, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}")
        save_columns(columns, scratch)
        scratch.replace(file)
        self._columns[rung, name] = columns

    def count(self, name: str) -> int:
        """How many rungs a variant has reached."""
        rung = 0
        while self.measured(rung, name) is not None:
            rung += 1
        return rung

    def measured(self, rung: int, name: str) -> Columns | None:
        """Of a variant at a rung, or None where it has not come there."""
        if (rung, name) not in self._columns:
            file = self._file(rung, name)
            if not file.is_file():
                return None
            self._columns[rung, name] = load_columns(file)
        return self._columns[rung, name]

    def verdict(self, rung: int, name: str) -> Ranked | None:
        """What became of a variant at a rung; None while others have yet to come there."""
        group = self.group_of(self.variants[name])
        if (rung, group) not in self._decided:
            expected = [n for n in self._group(group) if rung == 0 or self._is_kept(rung - 1, n)]
            columns: dict[str, list[Columns]] = {}
            for other in expected:
                own = columns.setdefault(self.variants[other].configuration, [])
                measured = self.measured(rung, other)
                if measured is not None:
                    own.append(measured)
                elif other not in self.absent:
                    return None
            ranked = decide(columns, dict.fromkeys(columns, 0), self.keep)
            self._decided[rung, group] = {each.configuration: each for each in ranked}
        return self._decided[rung, group].get(self.variants[name].configuration)

    def history(self, name: str) -> list[Ranked]:
        """A variant's verdicts so far, from the first rung."""
        found = []
        for rung in range(self.count(name)):
            if (ranked := self.verdict(rung, name)) is not None:
                found.append(ranked)
        return found

    def _group(self, group: object) -> list[str]:
        return [n for n, variant in self.variants.items() if self.group_of(variant) == group]

    def _is_kept(self, rung: int, name: str) -> bool:
        ranked = self.verdict(rung, name)
        return ranked is not None and ranked.is_kept

    def _file(self, rung: int, name: str) -> Path:
        return self.folder / str(rung + 1) / f"{name}.npz"
