"""Names become versions at the moment of the request; only what is right for the base is served."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.folders import save_model
from tests.recipes import rows
from tests.serve.fake_engine import ALL, FakeEngine, nothing
from tests.serve.servers import Running, eventually, serving
from tunefork.data.loader import load_data
from tunefork.errors import AdapterError, StoreError
from tunefork.model.asked import asked_sha256
from tunefork.model.fingerprint import identify
from tunefork.recipe import ModelSection, Recipe
from tunefork.registry.garbage import collect_garbage
from tunefork.registry.peft_config import CONFIG, WEIGHTS
from tunefork.registry.provenance import FILE, read_provenance, write_provenance
from tunefork.registry.store import Store
from tunefork.serve import checks
from tunefork.serve.settings import ServeSettings


def _said(running: Running, model: str) -> str:
    return str(running.ask(model=model).json()["choices"][0]["message"]["content"]).split(" ")[0]


def _changed(adapter: Path, to: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(adapter, to)
    change(to)
    return to


def _set(folder: Path, file: str, **fields: Any) -> None:
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(known | fields))


def test_a_moved_tag_is_followed_while_old_answers_go_on(
    server: Running, engine: FakeEngine, adapter: Path
) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme", tags=("prod",))
        engine.holds = lambda request, number: (
            number > 0 and request.adapter is not None and request.adapter.id == "acme:v1"
        )
        with (
            server.http() as http,
            http.stream(
                "POST",
                "/v1/chat/completions",
                json={
                    "model": "acme:prod",
                    "messages": [{"role": "user", "content": "a"}],
                    "temperature": 0,
                    "stream": True,
                },
            ) as old,
        ):
            lines = old.iter_lines()
            next(lines)
            store.publish(adapter, "acme", tags=("prod",), note="new")
            assert _said(server, "acme:prod") == "acme:v2"
            with pytest.raises(StoreError, match="held by tunefork serve"):
                store.remove("acme:v1")
            engine.holds = nothing
            assert '"finish_reason":"stop"' in "".join(lines)
        assert _said(server, "acme:v1") == "acme:v1"
        assert _said(server, "acme") == "acme:v2"


def test_a_version_is_held_while_in_use_and_then_let_go(
    server: Running, engine: FakeEngine, adapter: Path
) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme")
        assert _said(server, "acme") == "acme:v1"
        eventually(lambda: store.show("acme:v1").holds == ())
        assert "acme:v1" in engine.loaded
        store.remove("acme:v1")
        collect_garbage(store)
        assert server.ask(model="acme:v1").status_code == 404
        eventually(lambda: engine.forgotten == ["acme:v1"])
        eventually(lambda: server.gateway.adapters.in_use() == 0)


def test_a_store_that_cannot_be_read_is_no_missing_model(
    server: Running, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme")
    _said(server, "acme")

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_find", fail)
        answer = server.ask(model="acme")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["code"] == "store_unusable" and "locked" not in answer.text
    assert _said(server, "acme") == "acme:v1"


def test_what_cannot_be_read_just_now_is_not_refused_for_ever(
    server: Running, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme")

    def no_more_files(file: Path) -> None:
        raise AdapterError(f"{file}: cannot be read") from OSError(24, "Too many open files")

    def no_memory(_: Path) -> None:
        raise MemoryError

    for fail in (no_more_files, no_memory):
        with monkeypatch.context() as patch:
            patch.setattr(checks, "read_header", fail)
            answer = server.ask(model="acme")
            assert answer.status_code == 503 and "/" not in answer.json()["error"]["message"]
            assert answer.json()["error"]["code"] == "adapter_unreadable"
    assert _said(server, "acme") == "acme:v1"


def test_what_can_never_be_read_is_refused(
    server: Running, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme")

    def a_link(file: Path) -> None:
        raise AdapterError(f"{file}: cannot be read") from OSError(40, "Too many symbolic links")

    monkeypatch.setattr(checks, "read_header", a_link)
    answer = server.ask(model="acme")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_unusable")


def test_holds_end_with_the_server(
    adapter: Path, settings: ServeSettings, engine: FakeEngine
) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme")
        slow = settings.model_copy(update={"hold_idle_s": 100.0})
        with serving(engine, slow) as running:
            _said(running, "acme")
            assert len(store.show("acme:v1").holds) == 1
        assert store.show("acme:v1").holds == ()


def _dead(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t * 0 if "lora_B" in k else t for k, t in tensors.items()}, folder / WEIGHTS)


def _of_another_base(folder: Path) -> None:
    other = folder.parent / "other"
    save_model(other, seed=5)
    provenance = read_provenance(folder)
    assert provenance is not None
    identity = identify(ModelSection(id=str(other)))
    write_provenance(folder, provenance.model_copy(update={"identity": identity}))


def _rendered_otherwise(folder: Path) -> None:
    save_model(folder / "model", seed=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, folder / name)
    template = (folder / "model" / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("Be helpful", "Be brief"))
    shutil.rmtree(folder / "model")


def _of_other_layers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({k.replace("q_proj", "x_proj"): t for k, t in tensors.items()}, folder / WEIGHTS)


UNUSABLE: list[tuple[Callable[[Path], object], str]] = [
    (_dead, "dead"),
    (_of_another_base, "another base"),
    (lambda folder: (folder / FILE).unlink(), "no identity"),
    (_rendered_otherwise, "renders conversations to other tokens"),
    (_of_other_layers, "does not fit the layers"),
    (lambda folder: _set(folder, CONFIG, use_dora=True), "has dora"),
    (lambda folder: _set(folder, CONFIG, r=8), "does not fit the layers"),
    (lambda folder: _set(folder, CONFIG, bias="all"), "no adapter that can be read"),
]


@pytest.mark.parametrize(("change", "why"), UNUSABLE)
def test_what_does_not_belong_here_is_refused(
    server: Running,
    engine: FakeEngine,
    adapter: Path,
    tmp_path: Path,
    change: Callable[[Path], object],
    why: str,
) -> None:
    with Store.open() as store:
        store.publish(_changed(adapter, tmp_path / "bad", change), "bad")
        for _ in range(2):  # the verdict is remembered, and is the same
            answer = server.ask(model="bad")
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["code"] == "adapter_unusable" and error["param"] == "model"
            assert why in error["message"] and "bad:v1" in error["message"]
            assert str(tmp_path) not in answer.text and "/tmp" not in answer.text
        assert not engine.seen
        assert store.show("bad").holds == ()


def test_what_was_changed_in_the_store_is_refused(
    server: Running, engine: FakeEngine, adapter: Path
) -> None:
    with Store.open() as store:
        place = store.publish(adapter, "acme").folder() / WEIGHTS
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.chmod(0o644)
    place.write_bytes(data)
    error = server.ask(model="acme").json()["error"]
    assert error["code"] == "adapter_unusable" and "not what was published" in error["message"]
    assert not engine.seen and WEIGHTS not in error["message"]


def test_the_engine_s_largest_rank_is_kept_to(settings: ServeSettings, adapter: Path) -> None:
    from dataclasses import replace

    with Store.open() as store:
        store.publish(adapter, "acme")
    with serving(FakeEngine(capabilities=replace(ALL, max_rank=2)), settings) as running:
        answer = running.ask(model="acme")
        assert answer.status_code == 400 and "has rank 4" in answer.text


def test_the_engine_is_told_rank_and_size(
    server: Running, engine: FakeEngine, adapter: Path
) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme")
    server.ask(model="acme")
    (seen,) = engine.seen
    assert seen.adapter is not None and seen.adapter.rank == 4
    elements = sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values())
    assert seen.adapter.bytes == 4 * elements
    assert (seen.adapter.folder / WEIGHTS).is_file()


def test_what_the_trainer_rendered_is_what_the_server_renders(
    server: Running,
    engine: FakeEngine,
    adapter: Path,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    """Of a classifier whose labels only its rows tell, with a system turn."""
    recipe = make_recipe(data={"system": "the fox"})
    data = load_data(recipe, server.gateway.base.tokenizer)
    told = {"data": data.section.model_dump(mode="json")}
    asked = {"recipe": told, "asked_sha256": asked_sha256(data)}
    right = _changed(adapter, tmp_path / "right", lambda f: _set(f, FILE, **asked))
    told["data"]["labels"].reverse()
    wrong = _changed(adapter, tmp_path / "wrong", lambda f: _set(f, FILE, **asked))
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()  # a server reads no file that an adapter names
    with Store.open() as store:
        store.publish(right, "right")
        store.publish(wrong, "wrong")
    server.ask(model="right", messages=[{"role": "user", "content": rows(1)[0]["text"]}])
    row = data.train[0]
    assert list(engine.seen[0].prompt_ids) == row.input_ids[: row.prompt_length].tolist()
    answer = server.ask(model="wrong")
    assert answer.status_code == 400 and "render otherwise" in answer.text


def test_a_plain_template_is_kept_to(
    server: Running, engine: FakeEngine, adapter: Path, tmp_path: Path
) -> None:
    data = {"train": "x.jsonl", "template": "plain"}
    folder = _changed(adapter, tmp_path / "plain", lambda f: _set(f, FILE, recipe={"data": data}))
    with Store.open() as store:
        store.publish(folder, "plain")
    server.ask(model="plain", messages=[{"role": "user", "content": "the dog"}])
    tokenizer = server.gateway.base.tokenizer
    assert list(engine.seen[0].prompt_ids) == tokenizer("the dog")["input_ids"]


def test_many_at_once_open_a_version_once(
    server: Running, engine: FakeEngine, adapter: Path
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Store.open() as store:
        store.publish(adapter, "acme")
        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(lambda _: _said(server, "acme"), range(16)))
        assert said == ["acme:v1"] * 16
        assert store.database.execute("SELECT count(*) FROM holds").fetchone()[0] >= 1
        eventually(lambda: store.show("acme").holds == ())


def test_an_adapter_that_is_called_as_the_base_is_listed_by_its_version(
    settings: ServeSettings, adapter: Path
) -> None:
    with Store.open() as store:
        store.publish(adapter, "tiny-base", tags=("prod",))
    with serving(FakeEngine(), settings) as running, running.http() as http:
        ids = [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert sorted(ids) == ["tiny-base", "tiny-base:prod", "tiny-base:v1"]
        assert http.get("/v1/models/tiny-base").json().get("parent") is None
        assert running.ask(model="tiny-base:prod").json()["model"] == "tiny-base:v1"
