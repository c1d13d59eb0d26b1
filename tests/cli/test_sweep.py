"""`tunefork sweep` and `tunefork train-many` from the command line to what they leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import SECRET, Call, rows
from tunefork.registry.run import read_record
from tunefork.registry.store import Store

Write = Callable[..., Path]
SHARE = {"validation_share": 0.3}


def test_a_sweep_ends_with_a_table_a_page_and_markdown(
    tunefork: Call, write_recipe: Write, tmp_path: Path
) -> None:
    recipe = write_recipe(sweep=SHARE)
    ended = tunefork(
        "sweep",
        recipe,
        "--rank",
        "2,4",
        "--lr",
        "1e-4,1e-3",
        "--out",
        tmp_path / "out",
        "--markdown",
        tmp_path / "docs" / "sweep.md",
    )
    assert ended.status == 0, ended.err
    for words in ("r2-lr1e-4", "chosen", "Recommended: rank", "learning rate"):
        assert words in ended.out
    assert SECRET not in ended.out + ended.err
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    markdown = (tmp_path / "docs" / "sweep.md").read_text()
    assert "    tunefork sweep" in markdown and "| r4-lr1e-3 |" in markdown
    folder = tmp_path / "out" / "variants" / "r4-lr1e-3"
    assert tunefork("train", folder / "recipe.yaml", "--out", folder).status == 0
    assert tunefork("evaluate", folder, recipe).status == 0
    assert tunefork("adapters", "publish", folder, "best").status == 0
    known = json.loads(tunefork("runs", "--json").out)
    assert sum(run["folder"].startswith(str(tmp_path / "out" / "variants")) for run in known) == 4
    again = tunefork("sweep", tmp_path / "out", "--resume", "--json")
    assert again.status == 0, again.err
    result = json.loads(again.out)
    assert [v["status"] for v in result["variants"]] == ["ok"] * 4
    assert result["recommended"]["rank"] in (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sweep: varies nothing"),
        (["--rank", "2,x"], "sweep.rank.1: "),
        (["--rank", "2", "--set", "method=full"], "method: full"),
        (["--targets", "q_proj+nope"], "lora.targets: 'nope' matches no linear layer"),
        (["--rank", "2", "--random", "0"], "sweep.count"),
        (["--resume"], "holds no sweep to go on with"),
        (["--resume", "--rank", "2"], "--resume: goes on with what was begun"),
    ],
)
def test_what_cannot_be_swept_is_bad_input(
    tunefork: Call, write_recipe: Write, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = [] if "--resume" in arguments else ["--out", tmp_path / "out"]
    ended = tunefork("sweep", write_recipe(sweep=SHARE), *arguments, *out)
    assert ended.status == 2 and message in ended.err, ended.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def customers(write_recipe: Write, tmp_path: Path) -> Callable[..., Path]:
    """A file of three customers over the tiny model; what is given is one more entry's."""

    def write(**more: Any) -> Path:
        write_recipe()
        entries: list[dict[str, Any]] = []
        for at, name in enumerate(("acme", "bolt", "coil")):
            lines = [json.dumps(row) + "\n" for row in rows(12, 1000 * at)]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
            entries.append(
                {
                    "name": name,
                    "publish": f"team/{name}",
                    "data": {"train": f"{name}.jsonl"},
                    "lora": {"rank": 2 + at},
                }
            )
        if more:
            entries.append(more)
        file = tmp_path / "customers.yaml"
        file.write_text(yaml.safe_dump({"recipe": "mine.yaml", "adapters": entries}))
        return file

    return write


def test_customers_are_trained_together_and_published_each(
    tunefork: Call, customers: Callable[..., Path], tmp_path: Path
) -> None:
    ended = tunefork("train-many", customers(), "--out", tmp_path / "out")
    assert ended.status == 0, ended.err
    assert "team/acme:v1" in ended.out and "team/coil:v1" in ended.out
    record = read_record(tmp_path / "out" / "coil")
    assert record is not None and record.status == "ok"
    again = tunefork("train-many", tmp_path / "out", "--resume", "--json")
    assert again.status == 0, again.err
    entries = json.loads(again.out)["entries"]
    assert [entry["published"] for entry in entries] == [
        "team/acme:v1",
        "team/bolt:v1",
        "team/coil:v1",
    ]
    with Store.open() as store:
        assert len(store.list("team")) == 3


def test_a_customer_with_bad_data_fails_alone_and_the_status_tells(
    tunefork: Call, customers: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "{SECRET}", "label"\n')
    file = customers(name="bad", data={"train": "bad.jsonl"}, publish="team/bad")
    ended = tunefork("train-many", file, "--out", tmp_path / "out")
    assert ended.status == 1
    assert "(bad): failed: " in ended.err and "bad.jsonl:1" in ended.err
    assert SECRET not in ended.err + ended.out
    with Store.open() as store:
        assert [version.name for version in store.list("team")] == [
            "team/acme",
            "team/bolt",
            "team/coil",
        ]


def test_a_wrong_file_is_bad_input_by_line(
    tunefork: Call, customers: Callable[..., Path], tmp_path: Path
) -> None:
    ended = tunefork("train-many", customers(name="x", lora={"rnk": 3}))
    assert ended.status == 2
    assert "customers.yaml:" in ended.err and "lora.rnk: unknown key" in ended.err
    assert tunefork("train-many", tmp_path / "nothing.yaml").status == 2
    assert tunefork("train-many", tmp_path, "--resume").status == 2
