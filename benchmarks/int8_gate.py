"""Whether int8 products train as well as bf16 ones: the gate of issue 6, on a real model and task.

    python -m benchmarks.int8_gate prepare SOURCE --out DATA              anywhere
    python -m benchmarks.int8_gate encode --model M --data DATA           anywhere
    python -m benchmarks.int8_gate measure --model M --data DATA --out RAW.jsonl [--done OLD.jsonl]
    python -m benchmarks.int8_gate gradients --model M --data DATA --out RAW.jsonl
    python -m benchmarks.int8_gate collect RAW.jsonl [MORE.jsonl ...]

The same seeds, examples, order and recipe with `train.precision` bf16 and int8, for LoRA and QLoRA.
What is judged is in `int8_verdict.py`: the evaluation's loss, the paired interval of the accuracy,
and the gradients against float64 (`int8_gradients.py`). A model trained in int8 is evaluated twice:
over the base that it was trained over, and over that in bf16, as a server would have it.
`--precisions fp32 bf16_cut` adds yardsticks: how far from a run on the same seed that computes in
fp32 each precision ends, bf16 too, and how far from bf16 one whose steps are cut into other
micro-batches. Less than that is chance.

The task: to which of 45 lexicographer files of WordNet does a gloss belong? SOURCE is the folder
with wordnet_lexname_{train,test}.jsonl.gz. Each run is a line of RAW as it ends, and one that is in
OLD or RAW already is not run again. `encode` leaves DATA tokenised in a file beside them, read by
every later process, which tokenises them itself otherwise (48 s for six at once).
"""

import argparse
import gzip
import json
import random
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.int8_run import (
    METHODS,
    PRECISIONS,
    YARDSTICKS,
    Trial,
    encode,
    forget,
    load,
    run,
    shared,
)

_LONGEST_TEXT = 200
"""Characters: one gloss of a hundred is longer. A rendered row then has about 60 tokens."""
_FIRST_EVAL = 8000
"""Evaluation examples of the first gate. Its unused training rows lie before the training examples
among the shuffled ones, further ones behind them."""


def prepare(source: Path, out: Path, num_train: int, num_eval: int) -> None:
    """Write train.jsonl and eval.jsonl: all test rows and as many unused training rows as wanted.

    The more evaluation examples, the less a paired interval owes to chance. More than `_FIRST_EVAL`
    of them begin with the same ones and leave the training examples what they were, so that runs
    differ in what they are judged by alone. SystemExit where there are too few rows.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    for split in ("train", "test"):
        with gzip.open(
            source / f"wordnet_lexname_{split}.jsonl.gz", "rt", encoding="utf-8"
        ) as file:
            rows[split] = [
                row for row in map(json.loads, file) if len(row["text"]) <= _LONGEST_TEXT
            ]
    seen = {row["text"].casefold() for row in rows["test"]}
    fresh = [row for row in rows["train"] if row["text"].casefold() not in seen]
    random.Random(0).shuffle(fresh)
    before = max(0, min(num_eval, _FIRST_EVAL) - len(rows["test"]))
    behind = before + num_train
    more = max(0, num_eval - len(rows["test"]) - before)
    if behind + more > len(fresh):
        raise SystemExit(f"{source}: {len(fresh)} unused training rows, {behind + more} are needed")
    held_out = rows["test"] + fresh[:before] + fresh[behind : behind + more]
    splits = {"train": fresh[before:behind], "eval": held_out}
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in chosen)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{out / name}.jsonl: {len(chosen)} rows")


def measure(arguments: argparse.Namespace) -> None:
    """Run what has no line yet, one seed's runs after the other."""
    deadline = time.monotonic() + arguments.seconds
    lines = read([*arguments.done, arguments.out])
    done = {row["run"] for row in lines if row.get("shared") == shared(arguments)}
    trials = [
        Trial(method, precision, seed)
        for seed in arguments.seeds
        for method in arguments.methods
        for precision in arguments.precisions
    ]
    data, longest = None, 0.0
    for trial in trials:
        if trial.name in done:
            continue
        if time.monotonic() + longest > deadline:
            print(
                f"{trial.name}: not run, {deadline - time.monotonic():.0f} s are left", flush=True
            )
            continue
        began = time.monotonic()
        try:
            data = data or load(arguments, trial)
            row = run(arguments, trial, data)
        except Exception as error:  # the next run may do
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        longest = max(longest, time.monotonic() - began)
        _write(arguments.out, {"run": trial.name} | row)
        forget()


def read(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The lines of those files that there are."""
    for file in files:
        if file.exists():
            yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _write(out: Path, row: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    times = {key: round(row[key], 1) for key in ("load_s", "train_s") if key in row}
    print(row["run"], row.get("error", times), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("prepare")
    made.add_argument("source", type=Path)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--train", type=int, default=12_800)
    made.add_argument("--eval", type=int, default=8000)
    for verb in ("encode", "measure", "gradients"):
        run = verbs.add_parser(verb)
        run.add_argument("--model", type=Path, required=True, help="a .gguf file or a folder")
        run.add_argument("--data", type=Path, required=True)
        run.add_argument("--out", type=Path, required=verb != "encode")
        run.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
        run.add_argument("--steps", type=int, default=200 if verb == "measure" else 20)
        run.add_argument("--batch-size", type=int, default=64 if verb == "measure" else 16)
        run.add_argument("--learning-rate", type=float, default=1e-3)
        run.add_argument("--max-train-examples", type=int)
        run.add_argument("--max-eval-examples", type=int)
        run.add_argument("--set", nargs="+", default=[], metavar="KEY=JSON", help="of both sides")
        run.add_argument(
            "--precisions",
            nargs="+",
            choices=[*PRECISIONS, *YARDSTICKS],
            default=list(PRECISIONS),
        )
        run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        run.add_argument("--done", nargs="+", type=Path, default=[], help="lines of earlier calls")
        run.add_argument("--seconds", type=float, default=560.0)
    gather = verbs.add_parser("collect")
    gather.add_argument("raw", type=Path, nargs="+")
    gather.add_argument("--name", default="int8_gate")
    return parser.parse_args()


def main() -> None:
    """Prepare, measure or judge."""
    arguments = _arguments()
    match arguments.verb:
        case "prepare":
            prepare(arguments.source, arguments.out, arguments.train, arguments.eval)
        case "encode":
            print(encode(arguments, Trial("lora", "bf16", 0)))
        case "measure":
            measure(arguments)
        case "gradients":
            from benchmarks.int8_gradients import compare

            for method in arguments.methods:
                _write(arguments.out, compare(arguments, method))
        case "collect":
            from benchmarks.int8_verdict import collect

            print(collect(arguments.raw, arguments.name))


if __name__ == "__main__":
    main()
