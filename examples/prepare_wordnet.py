"""WordNet's glosses and their lexicographer files: 45 classes that a text alone decides.

    {"text": "with a ragged and uneven appearance", "label": "adv.all"}

The source is two files of 50,000 and 4,000 such rows (WordNet 3.0's licence, permissive):
wordnet_lexname_train.jsonl.gz and wordnet_lexname_test.jsonl.gz in one folder. A random part of
each is taken; a label has at least 8 of the rows trained on, or all that there are.

    python examples/prepare_wordnet.py --source ../shared/data --out demo/wordnet
"""

import argparse
import gzip
import json
import random
from collections import Counter
from pathlib import Path

LEAST = 8
"""Training rows of a label."""

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the two .gz files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=8000, help="rows to train on")
    parser.add_argument("--eval", type=int, default=1000, help="rows to evaluate on")
    options = parser.parse_args()
    train = chosen(read(options.source / "wordnet_lexname_train.jsonl.gz"), options.train, LEAST)
    known = {row["label"] for row in train}
    held = [
        r for r in read(options.source / "wordnet_lexname_test.jsonl.gz") if r["label"] in known
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("eval", chosen(held, options.eval, 0))):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows):,} rows, {len({r['label'] for r in rows})} labels")


def read(file: Path) -> list[Row]:
    """All rows of a .jsonl.gz."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def chosen(rows: list[Row], count: int, least: int) -> list[Row]:
    """A random `count` of `rows`, with at least `least` of each label first; the same each time."""
    order = list(rows)
    random.Random(0).shuffle(order)
    seen: Counter[str] = Counter()
    first, rest = [], []
    for row in order:
        (first if seen[row["label"]] < least else rest).append(row)
        seen[row["label"]] += 1
    taken = [*first, *rest][:count]
    random.Random(1).shuffle(taken)
    return taken


if __name__ == "__main__":
    main()
