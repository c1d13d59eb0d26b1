"""How many passes of a run are replayed, by what `train/runner.py` does with sizes; none computes.

    python -m benchmarks.replayed_passes SOURCE

SOURCE is the folder with the WordNet and Debian rows (`*_train.jsonl.gz`); their tokens are taken
for a quarter of their characters and a template's 32. `lognormal` are lengths of 20 to 1,024 tokens
around 180, of which 30 to 80 % are supervised. Layers are a 0.6B model's, so that launching takes
longer than computing. `before`: no pass is filled up beyond its own size, and none is captured that
is larger than the first. Writes results/replayed_passes.json.
"""

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.results import write
from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.train import runner as module
from tunefork.train.runner import Runner

FORMS = ((16, 4096), (32, 8192), (8, 4096))
"""Examples of a step, tokens of a pass."""
STEPS = 1000
_MOST_WAITING = 40_000


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path)
    source: Path = parser.parse_args().source
    rows = []
    for name, data in datasets(source).items():
        for batch_size, most_tokens in FORMS:
            row: dict[str, Any] = {"case": name, "batch_size": batch_size, "tokens": most_tokens}
            for form in ("before", "now"):
                row[form] = count(data, batch_size, most_tokens, is_now=form == "now")
            print(row, flush=True)
            rows.append(row)
    print(write("replayed_passes", rows, device="none"))


def datasets(source: Path) -> dict[str, list[Encoded]]:
    """Examples of each, of which only the lengths matter."""
    found = {}
    for name in ("wordnet_lexname", "debian_synopsis"):
        with gzip.open(source / f"{name}_train.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = [[str(value) for value in json.loads(line).values()] for line in lines]
        sizes = [(32 + sum(map(len, row)) // 4, max(2, len(row[1]) // 4)) for row in texts]
        found[name] = [_example(min(512, length), answer) for length, answer in sizes]
    draw = np.random.default_rng(1)
    lengths = np.clip(draw.lognormal(5.2, 0.8, 20_000), 20, 1024).astype(int)
    shares = draw.uniform(0.3, 0.8, len(lengths))
    pairs = zip(lengths, shares, strict=True)
    found["lognormal"] = [_example(length, int(length * share)) for length, share in pairs]
    return found


def _example(length: int, answer: int) -> Encoded:
    supervised = np.arange(length) >= length - answer
    return Encoded("-", np.zeros(length, dtype=np.int32), supervised)


def steps_of(data: Sequence[Encoded], batch_size: int) -> Iterator[list[Encoded]]:
    """Examples of each step."""
    draw = np.random.default_rng(0)
    for _ in range(STEPS):
        yield [data[at] for at in draw.choice(len(data), batch_size, replace=False)]


def count(
    data: Sequence[Encoded], batch_size: int, most_tokens: int, *, is_now: bool
) -> dict[str, Any]:
    """Passes that are launched, captured and replayed, and what they are filled up by."""
    runner = _runner(is_now=is_now)
    told, used, filled = {"launched": 0, "captured": 0, "replayed": 0}, 0, 0
    for step in steps_of(data, batch_size):
        for batch in pack(step, max_tokens=most_tokens, packing=True):
            laid = runner.lay_out(batch)
            told[str(runner.loss(laid, 1, "-").item_name)] += 1  # type: ignore[attr-defined]
            used += batch.input_ids.numel()
            filled += laid.batch.input_ids.numel()
    passes = sum(told.values())
    return {
        "passes": passes,
        "launched_share": round(told["launched"] / passes, 3),
        "captures": told["captured"],
        "filling": round(filled / used - 1, 3),
    }


def _runner(*, is_now: bool) -> Runner:
    """One whose passes only say how they would be run."""

    class Counting(Runner):
        def renew(self) -> None:
            self.drop_graphs()
            self._most_waiting = _MOST_WAITING if is_now else 0

        def forward(self, *_: Any) -> Any:
            return _told("launched")

        def backward(self, *_: Any) -> None:
            pass

        def _may_capture(self, size: Any) -> bool:
            if len(self.graphs) >= module._MOST_GRAPHS and self._has_pool_for(size):
                return False
            if not self.graphs or self._has_pool_for(size):
                return True
            return is_now and self.num_pools < module._MOST_POOLS

        def _try_capture(self, size: Any, _batch: Any) -> None:
            told = iter(["captured"])
            replay = SimpleNamespace(replay=lambda *_: _told(next(told, "replayed")))
            self.graphs[size] = replay  # type: ignore[assignment]

    model: Any = SimpleNamespace(device=torch.device("cpu"))
    return Counting(model, SimpleNamespace(), captures=True)  # type: ignore[arg-type]


def _told(name: str) -> Any:
    return SimpleNamespace(item_name=name, detach=lambda: SimpleNamespace(item_name=name))


if __name__ == "__main__":
    main()
