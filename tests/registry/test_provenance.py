"""tunefork.json: what was written is read, and anything else is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

import tunefork.registry.provenance as provenance_module
from tests.registry.conftest import IDENTITY
from tunefork.errors import AdapterError
from tunefork.recipe import Method
from tunefork.registry.provenance import FILE, Provenance, read_provenance, write_provenance


def test_what_was_written_is_read(tmp_path: Path) -> None:
    provenance = Provenance(
        identity=IDENTITY,
        method=Method.QLORA,
        recipe={"model": {"id": "owner/name"}, "train": {"learning_rate": 1e-4}},
        data_sha256="0" * 64,
        parent="runs/first",
        metrics={"loss": (1.0, 0.5, 1.5)},
    )
    write_provenance(tmp_path, provenance)
    assert read_provenance(tmp_path) == provenance
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert provenance.created.endswith("+00:00") and "torch" in provenance.versions


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) is None
    assert read_provenance(tmp_path / "gone") is None


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("", "the file: Invalid JSON"),
        ("[]", "the file: Input should be an object"),
        ("{}", "identity: Field required"),
        ('{"identity": {}}', "identity.weights_sha256: Field required"),
        (
            json.dumps({"identity": IDENTITY.model_dump() | {"weights_sha256": "../x"}}),
            "identity.weights_sha256: String should match pattern",
        ),
        (json.dumps({"a": 1}), "identity: Field required"),
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, content: str, where: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(AdapterError, match=rf"tunefork\.json: .*\({where}.*adapters adopt"):
        read_provenance(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"extra": 1}, "extra"), ({"identity": IDENTITY.model_dump() | {"b": ""}}, "identity.b")],
)
def test_one_of_a_newer_version_is_said_to_be(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    """And not to be removed."""
    (tmp_path / FILE).write_text(json.dumps({"identity": IDENTITY.model_dump()} | change))
    with pytest.raises(AdapterError, match=rf"{field}: is not known.*newer one") as raised:
        read_provenance(tmp_path)
    assert "adopt" not in str(raised.value)


def test_a_huge_one_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_provenance(tmp_path, Provenance(identity=IDENTITY))
    monkeypatch.setattr(provenance_module, "_MAX_BYTES", 100)
    with pytest.raises(AdapterError, match="is larger than 100 bytes"):
        read_provenance(tmp_path)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(AdapterError, match=r"tunefork\.json: cannot be read"):
        read_provenance(tmp_path)
