"""Settings: a file, flags over it, and every wrong field named."""

from pathlib import Path

import pytest

from tunefork.errors import RecipeError
from tunefork.home import home
from tunefork.serve.settings import ServeSettings, read_settings


def test_flags_beat_sets_beat_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("base: owner/name\nport: 1\nmax_queued: 5\nhold_idle_s: 7\n")
    settings = read_settings(file, {"port": 3, "host": None}, ("port=2", "max_queued=6"))
    assert (settings.port, settings.max_queued, settings.hold_idle_s) == (3, 6, 7.0)
    assert settings.base.id == "owner/name" and settings.base_name == "name"
    assert settings.is_loopback and settings.accounts_file == home() / "serve.sqlite"


def test_a_section_s_field_is_set_by_its_path() -> None:
    settings = read_settings(None, {"base": "owner/name"}, ())
    assert settings.base.revision is None
    settings = read_settings(None, {}, ("base=owner/name", "base.revision=main"))
    assert settings.base.revision == "main"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("max_queue=3",), "max_queue: unknown key; did you mean 'max_queued'"),
        (("embedded.slot=3",), "embedded.slot: unknown key; did you mean 'slots'"),
        (("port=70000",), "port: "),
        (("port=yes",), "port: "),
        (("name=a:b",), "name: must be printable, without ':'"),
        (("base.add_tokens=[x]",), "base.add_tokens"),
        (("allowed_hosts=['ai.example:80']",), "allowed_hosts: 'ai.example:80' is no host's name"),
        (("allowed_origins=['https://a.example/']",), "allowed_origins: 'https://a.example/' is"),
        (("allowed_origins=['*']",), "allowed_origins: '*' is no origin"),
        (("port",), "write KEY=VALUE"),
        (("port.x=1", "port=1", "port.y=2"), "is not a section"),
    ],
)
def test_a_wrong_field_is_named(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match="^(settings|--set)") as error:
        read_settings(None, {}, ("base=owner/name", *sets))
    assert message in str(error.value)


def test_a_base_is_needed_and_a_file_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="base: is missing"):
        read_settings(None, {}, ())
    with pytest.raises(RecipeError, match="cannot be read"):
        read_settings(tmp_path / "none.yaml", {}, ())
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(RecipeError, match="must be a mapping"):
        read_settings(tmp_path / "list.yaml", {}, ())


def test_every_setting_is_documented() -> None:
    undocumented = [
        name
        for name, field in ServeSettings.model_fields.items()
        if not field.description and name not in ("embedded", "vllm")
    ]
    assert undocumented == []
