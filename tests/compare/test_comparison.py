import errno
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.compare.fabricated import fabricate
from tunefork.compare import comparison as module
from tunefork.compare.comparison import Comparison, MethodResult, comparison_markdown
from tunefork.errors import RunFolderError, TuneforkError


def test_saved_comparison_is_read_back_equal(tmp_path: Path) -> None:
    made = fabricate(seeds=(0, 1, 2), failed={"qlora": "out of memory"})
    made.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == made
    assert [file.name for file in tmp_path.iterdir()] == ["comparison.json"]


def test_file_has_the_keys_that_the_interface_promises(tmp_path: Path) -> None:
    fabricate().save(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert set(content["methods"]) == {"base", "lora", "qlora", "full"}
    for method in content["methods"].values():
        assert set(method) >= {
            "status",
            "trainable_share",
            "peak_memory_bytes",
            "train_s",
            "tokens_per_s",
            "artifact_bytes",
            "learning_rate",
            "metrics",
            "forgetting",
            "cost_usd",
            "search_s",
        }
        assert set(method["metrics"]["accuracy"]) == {"value", "low", "high"}
    assert set(content["paired"][0]) >= {"a", "b", "metric", "difference", "low", "high"}
    assert set(content["verdict"]) >= {"method", "confidence", "text", "would_change"}


def test_what_was_not_measured_is_null_and_infinity_is_refused() -> None:
    failed = MethodResult(status="failed", error="out of memory")
    assert failed.peak_memory_bytes is None and failed.metrics == {}
    with pytest.raises(ValidationError):
        MethodResult(status="ok", train_s=float("inf"))


def test_base_is_always_there() -> None:
    fields = fabricate().model_dump()
    del fields["methods"]["base"]
    with pytest.raises(ValidationError, match="base"):
        Comparison.model_validate(fields)


def test_full_disk_is_named_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "comparison.json"
    fabricate().save(path)
    before = path.read_bytes()

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", no_space)
    with pytest.raises(TuneforkError, match=r"json.*No space left.*free some.*same command"):
        fabricate(margin=0.02).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"methods": {"base": {"secret": "row"}}}'])
def test_another_file_is_refused_by_name_without_its_content(tmp_path: Path, content: str) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"comparison\.json: is not a comparison") as caught:
        Comparison.load(path)
    assert "row" not in str(caught.value)
    with pytest.raises(RunFolderError, match="cannot be read"):
        Comparison.load(tmp_path / "absent.json")


def test_page_documents_every_key_and_the_json_schema_can_be_had() -> None:
    page = comparison_markdown()
    schema = Comparison.model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        for name in definition["properties"]:
            assert f"| `{name}` |" in page
    assert not [line for line in page.splitlines() if line.endswith("|  |")]
