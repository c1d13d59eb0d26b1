"""`tunefork adapters` and the runs that the store knows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Call
from tests.registry.artefacts import save_artefact
from tests.registry.conftest import LORA, make_record, trained
from tests.tiny import tiny_model
from tunefork.recipe import Method
from tunefork.registry.history import remember_run
from tunefork.registry.peft_format import save_adapter
from tunefork.registry.run import write_record
from tunefork.registry.store import Store
from tunefork.train.events import StepDone, event_log


@pytest.fixture
def ask(tunefork: Call) -> Callable[..., Any]:
    """What `tunefork adapters ... --json` says."""

    def call(*arguments: object) -> Any:
        ended = tunefork("adapters", *arguments, "--json")
        assert ended.status == 0, ended
        return json.loads(ended.out)

    return call


def test_the_road_of_an_adapter(
    tunefork: Call, ask: Callable[..., Any], tmp_path: Path, home: Path
) -> None:
    artefact, there = save_artefact(tmp_path / "a", seed=1), tmp_path / "there"
    one = ask("publish", artefact, "support/acme", "--tag", "prod", "--note", "first")
    assert one["version"] == "support/acme:v1" and one["tags"] == ["prod"]
    ended = tunefork("adapters", "publish", save_artefact(artefact, seed=2), "support/acme")
    assert ended.status == 0 and ended.out.startswith("support/acme:v2 sha256:")
    assert [v["version"] for v in ask("list")] == ["support/acme:v1", "support/acme:v2"]
    assert "support/acme:v2" in tunefork("adapters", "list", "support").out

    assert ask("tag", "support/acme:v2", "prod")["tags"] == ["prod"]
    shown = ask("show", "support/acme:prod")
    assert shown["number"] == 2 and Path(shown["folder"], "adapter_config.json").is_file()
    assert [move["number"] for move in shown["tag_moves"]] == [1, 2]
    ended = tunefork("adapters", "show", "support/acme:v1")
    assert "note       first" in ended.out and "base       owner/name" in ended.out

    (layer,) = ask("diff", "support/acme:v1", "support/acme:v2")["layers"]
    assert layer["change"] > 0
    assert "relative change" in tunefork("adapters", "diff", "support/acme:v1", "support/acme").out

    assert ask("push", "support/acme", there)["number"] == 2
    assert ask("pull", there, "support/acme:v2", "--as", "mine")["version"] == "mine:v1"

    ended = tunefork("adapters", "remove", "support/acme:prod")
    assert ended.status == 2 and "the tag prod is on it" in ended.err
    assert ask("tag", "support/acme:prod", "prod", "--remove")["tags"] == []
    assert ask("remove", "support/acme:v1")["number"] == 1
    assert ask("gc", "--dry-run")["files"] == ask("gc")["files"] == 1
    assert "freed 0 bytes" in tunefork("adapters", "gc").out
    assert (home / "store" / "store.sqlite").is_file()


def test_bad_input_is_named(tunefork: Call, tmp_path: Path) -> None:
    for arguments, message in (
        (("show", "gone"), "error: gone: nothing is published under gone"),
        (("publish", tmp_path / "no", "a"), "no: no such folder"),
        (("publish", tmp_path, "../a"), "is no name for the store"),
        (("publish", save_artefact(tmp_path / "a"), "a", "--tag", "v1"), "is reserved as a tag"),
        (("pull", tmp_path), "say which version to pull"),
    ):
        ended = tunefork("adapters", *arguments)
        assert ended.status == 2 and message in ended.err and "Traceback" not in ended.err


def test_markup_in_a_note_is_text(tunefork: Call, tmp_path: Path) -> None:
    tunefork("adapters", "publish", save_artefact(tmp_path / "a"), "a", "--note", "[bold]x[/] [/y]")
    for verb in (("list",), ("show", "a")):
        assert "[bold]x[/] [/y]" in tunefork("adapters", *verb).out


def test_runs_without_a_folder_are_all_that_is_known(
    tunefork: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for folder in (tmp_path / "far", tmp_path / "gone", Path("runs/near"), Path("runs/unknown")):
        folder.mkdir()
        write_record(folder, make_record())
        if folder.name != "unknown":
            remember_run(folder, make_record())
    shutil.rmtree(tmp_path / "gone")
    listed = [row["folder"] for row in json.loads(tunefork("runs", "--json").out)]
    near = [str(Path("runs") / name) for name in ("near", "unknown")]
    assert sorted(listed) == sorted([str(tmp_path / "far"), str(tmp_path / "gone"), *near])
    assert f"{tmp_path / 'gone'} (folder is gone)" in tunefork("runs").out
    shutil.rmtree("runs")
    assert str(tmp_path / "far") in tunefork("runs").out
    only = [row["folder"] for row in json.loads(tunefork("runs", tmp_path / "far", "--json").out)]
    assert only == [str(tmp_path / "far")]


def test_what_an_interrupted_run_left_is_published_with_a_warning(
    tunefork: Call, tmp_path: Path, home: Path
) -> None:
    save_artefact(tmp_path / "run" / "adapter")
    write_record(tmp_path / "run", make_record(status="interrupted", num_steps=2))
    with event_log(tmp_path / "run") as log:
        for step in (1, 2):
            done = {"step": step, "num_steps": 8, "tokens": 9, "loss": 1.0, "learning_rate": 1e-4}
            rest = {"grad_norm": 1.0, "tokens_per_s": 9.0, "memory_bytes": 9}
            log.write(StepDone.model_validate(done | rest))
    for folder in (tmp_path / "run", tmp_path / "run" / "adapter"):
        ended = tunefork("adapters", "publish", folder, "acme")
        assert ended.status == 0 and "run: was stopped after step 2 of 8" in ended.err
    write_record(tmp_path / "run", make_record(status="failed", artifact=None))
    ended = tunefork("adapters", "publish", tmp_path / "run", "acme")
    assert ended.status == 2 and "the run failed and left no artefact" in ended.err


def test_runs_goes_on_without_the_store(
    tunefork: Call, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    write_record(Path("runs"), make_record())
    (home / "store").write_text("")
    ended = tunefork("runs")
    assert ended.status == 0 and "lora" in ended.out and "warning" in ended.err


def test_a_trained_run_is_known_and_can_be_published(
    tunefork: Call, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "mine"
    assert tunefork("train", write_recipe(), "--out", out, "--method", "lora").status == 0
    (known,) = json.loads(tunefork("runs", "--json").out)
    assert known["folder"] == str(out) and known["status"] == "ok"
    assert tunefork("adapters", "publish", out, "mine").status == 0
    with Store.open() as store:
        details = store.show("mine")
    assert details.version.method == "lora" and details.lineage.parent == str(out)
    assert details.metrics.keys() == known["metrics"].keys() and details.lineage.data_sha256
    assert details.identity.keys() == {"weights_sha256", "tokenizer_sha256", "template_sha256"}
    for target in (details.version.folder(), "mine:v1", f"sha256:{details.version.digest[:9]}"):
        ended = tunefork("chat", target, "--message", "hello", "--max-new-tokens", 2)
        assert ended.status == 0 and ended.err == ""
    ended = tunefork("chat", "mine:v2", "--message", "hello")
    assert ended.status == 2 and "mine has v1" in ended.err


def test_an_adapter_made_elsewhere_is_adopted(
    tunefork: Call, ask: Callable[..., Any], tmp_path: Path, base: Path
) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(trained(tiny_model(), Method.LORA), adapter, LORA, base=str(base))
    found = ask("adopt", adapter, "--publish", "mine", "--tag", "prod")
    assert found["tags"] == ["prod"] and found["base"] == str(base)
    identity = ask("show", "mine")["identity"]
    assert identity["weights_sha256"] == ask("adopt", adapter)["identity"]["weights_sha256"]
    assert "adopted; its base's" in tunefork("adapters", "adopt", adapter, "--base", base).out
    for options, message in (
        (("--tag", "prod"), "--publish too"),
        (("--revision", "main"), "--base too"),
        (("--base", tmp_path / "gone"), "gone"),
    ):
        ended = tunefork("adapters", "adopt", adapter, *options)
        assert ended.status == 2 and message in ended.err
