import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunefork.data.example import Row, RowProblem
from tunefork.data.read import read_rows
from tunefork.errors import DataError


def test_jsonl_names_each_bad_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'\xef\xbb\xbf{"text": "one"}', b"", b"secret words", b"[1]", b'{"text": "\xff"}']
    lines += [b'{"text": ' + b"1" * 5000 + b"}", b"[" * 100_000, b'{"text": "two"}']
    path.write_bytes(b"\r\n".join(lines))
    rows = list(read_rows(str(path)))
    assert rows[0] == Row("a.jsonl:1", {"text": "one"})
    assert rows[-1] == Row("a.jsonl:8", {"text": "two"})
    problems = [row for row in rows if isinstance(row, RowProblem)]
    assert [problem.source for problem in problems] == [
        f"a.jsonl:{line}" for line in (3, 4, 5, 6, 7)
    ]
    assert "not JSON" in problems[0].what
    assert "object" in problems[1].what
    assert "UTF-8" in problems[2].what
    assert not any("secret" in str(problem) for problem in problems)


def test_a_row_that_names_a_field_twice_is_a_problem(tmp_path: Path) -> None:
    """Of two answers json.loads would take the last without a word."""
    path = tmp_path / "a.jsonl"
    turn = '{"role": "user", "content": "a", "content": "b"}'
    lines = [
        '{"prompt": "p", "completion": "one", "completion": "two"}',
        f'{{"messages": [{turn}]}}',
        f'{{"{"x" * 65}": 1, "{"x" * 65}": 2}}',
        '{"prompt": {"a": 1}, "completion": {"a": 1}}',
    ]
    path.write_text("\n".join(lines))
    *problems, row = read_rows(str(path))
    assert isinstance(row, Row)
    assert [str(problem) for problem in problems] == [
        "a.jsonl:1: has 'completion' twice; keep one of the two",
        "a.jsonl:2: has 'content' twice; keep one of the two",
        "a.jsonl:3: has a name twice; keep one of the two",
    ]


def test_csv_counts_physical_lines_through_quoted_newlines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [b"text,label", b'"two\nlines",A', b"", b"short", b"broken \xff,B", b'"x"y,C']
    path.write_bytes(b"\r\n".join([*lines, b'"caf\xc3\xa9, no",D']))
    rows = list(read_rows(str(path)))
    assert rows[0] == Row("a.csv:2", {"text": "two\nlines", "label": "A"})
    assert rows[-1] == Row("a.csv:8", {"text": "café, no", "label": "D"})
    problems = [row for row in rows if isinstance(row, RowProblem)]
    assert [problem.source for problem in problems] == ["a.csv:5", "a.csv:6", "a.csv:7"]
    assert "has 1 cells, but the header has 2" in problems[0].what
    assert "UTF-8" in problems[1].what
    assert "not CSV" in problems[2].what


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", None, "no such file"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"text,text\n1,2\n", "names a column twice"),
        ("a.csv", b"\xff,b\n1,2\n", "header is not UTF-8"),
        ("a.csv", b'"a"b,c\n1,2\n', "header is not CSV"),
        ("a.json", b"[]", "is not such a file"),
        ("a.txt", None, "does not exist"),
    ],
)
def test_useless_files(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(read_rows(str(path)))
    assert name in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        list(read_rows(str(tmp_path / "a.jsonl")))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    turns = [{"role": "user", "content": "hi"}]
    parquet.write_table(pyarrow.table({"messages": [turns, None], "n": [1, 2]}), path)
    assert list(read_rows(str(path))) == [
        Row("a.parquet:1", {"messages": turns, "n": 1}),
        Row("a.parquet:2", {"messages": None, "n": 2}),
    ]
    for metadata, label in (
        ({"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}, "yes"),
        ({"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}}, 1),
        (["somebody else's"], 1),
    ):
        table = pyarrow.table({"text": ["t"], "label": [1]})
        kept = {"huggingface": json.dumps(metadata)}
        parquet.write_table(table.replace_schema_metadata(kept), path)
        assert list(read_rows(str(path))) == [Row("a.parquet:1", {"text": "t", "label": label})]
    path.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="is damaged"):
        list(read_rows(str(path)))
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(str(tmp_path / "b.parquet")))


@pytest.mark.parametrize(("location", "module"), [("a.parquet", "pyarrow"), ("o/n", "datasets")])
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, location: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'tunefork\[data\]'"):
        list(read_rows(location))


class _Rows(list[dict[str, Any]]):
    features: dict[str, Any]


class _ClassLabel:
    names = ("no", "yes")


def _fake_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    exceptions = SimpleNamespace(DatasetsError=KeyError)
    fake = SimpleNamespace(load_dataset=load_dataset, ClassLabel=_ClassLabel, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_hub_rows_carry_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> _Rows:
        assert (name, split) == ("owner/name", "test")
        rows = _Rows([{"text": "a", "label": 1}, {"text": "b", "label": -1}])
        rows.features = {"text": object(), "label": _ClassLabel()}
        return rows

    _fake_datasets(monkeypatch, load_dataset)
    assert list(read_rows("owner/name:test")) == [
        Row("owner/name:test:1", {"text": "a", "label": "yes"}),
        Row("owner/name:test:2", {"text": "b", "label": None}),
    ]


def test_hub_failures_are_data_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> _Rows:
        raise ConnectionError("no network")

    _fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(DataError, match=r"owner/name:train: .*ConnectionError: no network"):
        list(read_rows("owner/name"))
