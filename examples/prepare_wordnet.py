"""WordNet's glosses and their lexicographer files: 45 classes that a text alone decides.

    {"text": "with a ragged and uneven appearance", "label": "adv.all"}

The source is a folder of WordNet 3.0's own files (data.noun, data.verb, data.adj, data.adv; a
permissive licence), such as Debian's package wordnet-base 3.0-37 has; or of two files that were
made of these, wordnet_lexname_train.jsonl.gz and wordnet_lexname_test.jsonl.gz: the rows are the
same. A random part is taken; a label has at least 8 of the rows trained on, or all that there are.

    apt install wordnet-base
    python examples/prepare_wordnet.py --source /usr/share/wordnet --out demo/wordnet
"""

import argparse
import gzip
import json
import random
from collections import Counter
from pathlib import Path

LEAST = 8
"""Training rows of a label."""

NUM_TRAIN, NUM_TEST = 50_000, 4_000
"""Rows of WordNet's that may be trained on, and that may be evaluated on."""

# fmt: off
LABELS = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact",
    "noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event",
    "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object",
    "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process",
    "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition",
    "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion",
    "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather",
    "adj.ppl",
)
# fmt: on
"""By the number of the lexicographer's file: WordNet's lexnames(5WN)."""

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of WordNet's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=8000, help="rows to train on")
    parser.add_argument("--eval", type=int, default=1000, help="rows to evaluate on")
    options = parser.parse_args()
    if (options.source / "data.noun").is_file():
        rows = glosses(options.source)
        learnt, test = rows[:NUM_TRAIN], rows[NUM_TRAIN : NUM_TRAIN + NUM_TEST]
    else:
        learnt = read(options.source / "wordnet_lexname_train.jsonl.gz")
        test = read(options.source / "wordnet_lexname_test.jsonl.gz")
    train = chosen(learnt, options.train, LEAST)
    known = {row["label"] for row in train}
    held = [row for row in test if row["label"] in known]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("eval", chosen(held, options.eval, 0))):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows):,} rows, {len({r['label'] for r in rows})} labels")


def glosses(folder: Path) -> list[Row]:
    """Every gloss of WordNet without its examples of use, shuffled, the same each time.

    A line of wndb(5WN): offset, number of the lexicographer's file, ..., "|", gloss. Glosses that
    stand in two files are left out.
    """
    found: dict[str, set[str]] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            facts, _, gloss = line.partition(" | ")
            text = gloss.strip().partition('; "')[0]
            found.setdefault(text, set()).add(LABELS[int(facts.split()[1])])
    rows = [
        {"text": text, "label": labels.pop()} for text, labels in found.items() if len(labels) == 1
    ]
    random.Random(0).shuffle(rows)
    return rows


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
