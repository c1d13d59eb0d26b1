"""Make real data sets without a hub, from the documentation of AWS operations in botocore.

    route     {"text": ..., "label": ...}: which service does this request belong to?
    name      {"prompt": ..., "completion": ...}: what is the operation called that does this?
    document  {"text": ...}: whole documentation texts, for continued pre-training

The texts of the first two are the first sentences of each operation's documentation in the package
botocore 1.44.5 (Apache-2.0). `route` stands for routing a request to the right team: many texts
name their service, many do not, and the services are near one another (EC2, ECS, Lambda and
Lightsail all run things; RDS and Redshift are both databases). Nothing is taken out of the texts.

    pip install --no-deps botocore==1.44.5
    python examples/prepare_aws.py --out data/aws

botocore is read as a package of files and never imported. The same version and arguments always
give the same files, `train.jsonl` and `eval.jsonl`.
"""

import argparse
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

VERSION = "1.44.5"

SERVICES = {
    "ec2": "EC2",
    "s3": "S3",
    "rds": "RDS",
    "iam": "IAM",
    "lambda": "Lambda",
    "ecs": "ECS",
    "lightsail": "Lightsail",
    "redshift": "Redshift",
    "glue": "Glue",
    "sagemaker": "SageMaker",
    "connect": "Connect",
    "quicksight": "QuickSight",
    "cloudfront": "CloudFront",
    "ssm": "Systems Manager",
    "cognito-idp": "Cognito",
    "apigateway": "API Gateway",
    "config": "Config",
    "backup": "Backup",
    "dms": "DMS",
    "iot": "IoT",
}
"""Folder in botocore -> label. `--services N` takes the first N."""

LONGEST_TEXT = 200
"""Characters. Keeps a rendered row near 100 tokens."""

Row = tuple[str, str, str]
"""(text, operation, label)"""

TASKS: dict[str, Callable[[Row], dict[str, str]]] = {
    "route": lambda row: {"text": row[0], "label": row[2]},
    "name": lambda row: {"prompt": row[0], "completion": row[1]},
    "document": lambda row: {"text": row[0]},
}
"""Task -> what a row of its files holds."""


class _Words(HTMLParser):
    """Collects the text between tags."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"p", "li", "ul", "ol", "br", "note", "important", "div"}:
            self.parts.append(" ")


def untag(documentation: str) -> str:
    """The text of `documentation` without tags."""
    words = _Words()
    words.feed(documentation)
    words.close()
    return " ".join("".join(words.parts).split())


def shorten(text: str) -> str:
    """`text` cut at a sentence's end or else at a word's."""
    if len(text) <= LONGEST_TEXT:
        return text
    text = text[: LONGEST_TEXT + 1]
    sentence_ends = [match.end() for match in re.finditer(r"[.!?](?= )", text)]
    return text[: sentence_ends[-1]] if sentence_ends else text[: text.rindex(" ")]


def operations(package: Distribution, folder: str) -> Iterator[tuple[str, str]]:
    """Text and name of every operation in the newest version of one service's interface."""
    files = [
        file
        for file in package.files or []
        if PurePosixPath(file).match(f"botocore/data/{folder}/*/service-2.json.gz")
    ]
    if not files:
        raise SystemExit(f"botocore {package.version} has no service {folder!r}; install {VERSION}")
    newest = Path(str(package.locate_file(max(files))))
    service = json.loads(gzip.decompress(newest.read_bytes()))
    for name in sorted(service["operations"]):
        yield untag(service["operations"][name].get("documentation", "")), name


def pools(
    package: Distribution, num_services: int, seed: int, *, is_short: bool
) -> dict[str, list[Row]]:
    """Rows of each label, shuffled. A text that two services share is in neither."""
    rows: list[Row] = []
    for folder, label in list(SERVICES.items())[:num_services]:
        names: dict[str, str] = {}  # a text that one service has twice goes to the first operation
        for text, name in operations(package, folder):
            names.setdefault(shorten(text) if is_short else text, name)
        rows += [(text, name, label) for text, name in names.items() if len(text.split()) >= 3]
    counts = Counter(text.casefold() for text, *_ in rows)
    by_label: dict[str, list[Row]] = {label: [] for *_, label in rows}
    for row in rows:
        if counts[row[0].casefold()] == 1:
            by_label[row[2]].append(row)
    for label, pool in by_label.items():
        random.Random(f"{seed} {label}").shuffle(pool)
    return by_label


def draw(by_label: dict[str, list[Row]], count: int, seed: int) -> list[Row]:
    """Take `count` rows out of the pools, as evenly as they allow, in random order."""
    if count > (left := sum(map(len, by_label.values()))):
        raise SystemExit(
            f"{count} rows are asked for, {left} are left; ask for fewer or --services"
        )
    drawn: list[Row] = []
    while len(drawn) < count:
        for pool in list(by_label.values())[: count - len(drawn)]:
            drawn += [pool.pop()] if pool else []
    random.Random(seed).shuffle(drawn)
    return drawn


def write(path: Path, rows: list[Row], task: str) -> None:
    """Write the rows as JSONL and print what they are."""
    lines = [json.dumps(TASKS[task](row)) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    counts = ", ".join(f"{label} {n}" for label, n in Counter(row[2] for row in rows).most_common())
    mean_words = sum(len(text.split()) for text, *_ in rows) / len(rows)
    mean_tokens = sum(len(text) for text, *_ in rows) / len(rows) / 5
    size = f"mean {mean_words:.0f} words, about {mean_tokens:.0f} tokens of text"
    print(f"{path}: {len(rows)} rows, {size}")
    print(f"  {counts}")


def main() -> None:
    """Write train.jsonl and eval.jsonl; no text is in both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--task", choices=TASKS, default="route", help="what a row asks")
    parser.add_argument("--services", type=int, default=12, help=f"2 to {len(SERVICES)}")
    parser.add_argument("--train", type=int, default=420, help="training rows")
    parser.add_argument("--eval", type=int, default=240, help="evaluation rows")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not 2 <= arguments.services <= len(SERVICES):
        parser.error(f"--services: {arguments.services} is not within 2 to {len(SERVICES)}")
    if min(arguments.train, arguments.eval) < 1:
        parser.error("--train and --eval must be at least 1")
    try:
        package = distribution("botocore")
    except PackageNotFoundError:
        raise SystemExit(
            f"botocore is not installed; pip install --no-deps botocore=={VERSION}"
        ) from None
    if package.version != VERSION:
        print(f"botocore {package.version} is not {VERSION}: the rows will differ from the demo's")
    by_label = pools(
        package, arguments.services, arguments.seed, is_short=arguments.task != "document"
    )
    held_out = draw(by_label, arguments.eval, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "eval.jsonl", held_out, arguments.task)
    training = draw(by_label, arguments.train, arguments.seed)
    write(arguments.out / "train.jsonl", training, arguments.task)


if __name__ == "__main__":
    main()
