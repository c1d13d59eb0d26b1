"""The store: what is published stays as it was, under the names and tags it was given."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.registry.artefacts import check_store, save_artefact
from tests.registry.conftest import save_run, trained
from tests.tiny import tiny_model
from tunefork.errors import StoreError
from tunefork.recipe import Method
from tunefork.registry.opening import find_parts
from tunefork.registry.peft_format import load_adapter
from tunefork.registry.remote import push
from tunefork.registry.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "home") as store:
        yield store


def test_it_lies_in_the_users_home(home: Path) -> None:
    Store.open().close()
    assert (home / "store" / "store.sqlite").is_file()


def test_versions_are_numbered_and_never_change(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a", seed=1)
    one = store.publish(artefact, "support/acme", note="first")
    before = (artefact / "adapter_model.safetensors").read_bytes()
    save_artefact(artefact, seed=2)
    two = store.publish(artefact, "support/acme")
    assert (str(one), str(two)) == ("support/acme:v1", "support/acme:v2")
    assert one.digest != two.digest and one.note == "first" and one.base == "owner/name"
    assert (one.folder() / "adapter_model.safetensors").read_bytes() == before
    assert check_store(store) == 2


def test_the_same_content_lies_once(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a")
    one, two = (store.publish(artefact, name) for name in ("a", "b"))
    assert one.digest == two.digest and one.folder() == two.folder()
    assert len(list(store.objects.folder.glob("??/*"))) == 2
    file = one.folder() / "adapter_model.safetensors"
    assert file.stat().st_nlink == 2 and not file.stat().st_mode & 0o222


def test_references(store: Store, tmp_path: Path) -> None:
    one, two = (
        store.publish(save_artefact(tmp_path / "a", seed=seed), "support/acme", tags=tags)
        for seed, tags in ((1, ("prod", "good")), (2, ()))
    )
    for text in ("support/acme:v1", "support/acme:prod", one.digest, f"sha256:{one.digest[:8]}"):
        assert store.resolve(text).id == one.id
    for text in ("support/acme", "support/acme:latest", "support/acme:v2", two.digest[:10]):
        assert store.resolve(text).id == two.id
    assert store.resolve("support/acme:prod").tags == ("good", "prod")
    for text, message in (
        ("suport/acme", "nothing is published under suport/acme; did you mean 'support/acme'"),
        ("support/acme:v3", "no such version; support/acme has v1, v2, good, prod"),
        ("support/acme:next", "no such version"),
        ("sha256:00000000", "no version has this digest"),
    ):
        with pytest.raises(StoreError, match=message):
            store.resolve(text)


def test_a_name_beats_a_digest(store: Store, tmp_path: Path) -> None:
    found = store.publish(save_artefact(tmp_path / "a"), "deadbeef")
    assert store.resolve("deadbeef").id == found.id


def test_a_short_digest_of_two_is_refused(store: Store, tmp_path: Path) -> None:
    store.publish(save_artefact(tmp_path / "a", seed=1), "a")
    store.publish(save_artefact(tmp_path / "a", seed=2), "a")
    for number in (1, 2):
        store.database.execute(
            "UPDATE versions SET digest = 'aaaaaaaa' || number WHERE number = ?", (number,)
        )
    with pytest.raises(StoreError, match="give more digits"):
        store.resolve("sha256:aaaaaaaa")


def test_a_tag_moves_and_its_moves_are_kept(store: Store, tmp_path: Path) -> None:
    one = store.publish(save_artefact(tmp_path / "a", seed=1), "a", tags=("prod",))
    two = store.publish(save_artefact(tmp_path / "a", seed=2), "a")
    other = store.publish(save_artefact(tmp_path / "a", seed=2), "b")
    assert store.tag("a", "prod", "a:v2").tags == ("prod",)
    assert store.resolve("a:prod").id == two.id and store.resolve(str(one)).tags == ()
    with pytest.raises(StoreError, match="b:v1 is no version of a: a tag stays within its name"):
        store.tag("a", "prod", other)
    with pytest.raises(StoreError, match="reserved"):
        store.tag("a", "latest", one)
    store.untag("a", "prod")
    with pytest.raises(StoreError, match="a:prod: no such tag"):
        store.untag("a", "prod")
    moves = [(tag, number) for tag, number, _ in store.show("a").history]
    assert moves == [("prod", 1), ("prod", 2), ("prod", None)]


def test_a_list_of_a_name_and_what_is_below(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a")
    for name in ("support/beta", "support", "support/acme", "support-2", "support0", "sup"):
        store.publish(artefact, name)
    assert [v.name for v in store.list("support")] == ["support", "support/acme", "support/beta"]
    assert len(store.list()) == 6 and store.list("gone") == []


def test_what_fails_leaves_no_version(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a")
    for name, tags in (("../a", ()), ("a", ("v1",)), ("a", ("prod", "No"))):
        with pytest.raises(StoreError):
            store.publish(artefact, name, tags=tags)
    (artefact / "tunefork.json").write_text("{")
    with pytest.raises(StoreError, match=r"tunefork.json: is not JSON"):
        store.publish(artefact, "a")
    assert store.list() == [] and list(store.objects.scratch.iterdir()) == []


def test_a_damaged_object_is_replaced_and_a_view_made_again(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a")
    version = store.publish(artefact, "a")
    place = store.objects.at(store.show(version).files[1].sha256)
    place.chmod(0o644)
    place.write_bytes(b"damaged")
    again = store.publish(artefact, "a")
    (again.folder() / "adapter_config.json").unlink()
    again.folder()
    assert check_store(store) == 2


def test_what_was_changed_in_the_store_is_not_opened_or_pushed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.publish(save_artefact(tmp_path / "a"), "a")
    assert version.intact() == version.folder()
    place = version.folder() / "adapter_model.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.chmod(0o644)
    place.write_bytes(data)  # as long as before
    monkeypatch.setattr(Store, "open", lambda: nullcontext(store))
    for use in (version.intact, lambda: push(store, "a", str(tmp_path / "there"))):
        with pytest.raises(StoreError, match=r"a:v1: adapter_model.safetensors .* not what was"):
            use()
    with pytest.raises(StoreError, match="not what was published"):
        find_parts("a:v1")


def test_lineage_of_a_run(store: Store, tmp_path: Path, base: Path) -> None:
    save_run(tmp_path / "run", trained(tiny_model(), Method.LORA), base, Method.LORA)
    for folder in (tmp_path / "run", tmp_path / "run" / "adapter"):
        details = store.show(store.publish(folder, "a"))
        assert details.version.base == str(base) and details.version.method == "lora"
        assert details.lineage.data_sha256 == "0" * 64
        assert details.lineage.parent == str(tmp_path / "run")
        assert details.lineage.recipe is not None and details.lineage.recipe["method"] == "lora"
        assert details.metrics["loss"] == (1.25, 1.0, 1.5)
    model = tiny_model(seed=0)
    load_adapter(model, store.resolve("a").folder())


def test_lineage_that_the_artefact_carries(store: Store, tmp_path: Path) -> None:
    artefact = save_artefact(tmp_path / "a")
    carried: dict[str, Any] = {
        "identity": {"weights_sha256": "1" * 64, "tokenizer_sha256": None, "format": 1},
        "method": "qlora",
        "recipe": {"model": {"id": "owner/exact", "revision": "main"}, "lora": {"rank": 2}},
        "data_sha256": "2" * 64,
        "parent": None,
        "metrics": {"loss": [1, 0.5, 2]},
        "versions": {"torch": "2"},
        "more": [],
    }
    (artefact / "tunefork.json").write_text(json.dumps(carried))
    details = store.show(store.publish(artefact, "a"))
    assert (details.version.base, details.version.revision) == ("owner/exact", "main")
    assert details.identity == {"weights_sha256": "1" * 64}
    assert details.lineage.data_sha256 == "2" * 64 and details.metrics == {"loss": (1, 0.5, 2)}


def test_folders_of_a_closed_store_and_of_a_removed_version(tmp_path: Path) -> None:
    with Store.open(tmp_path / "home") as store:
        version = store.publish(save_artefact(tmp_path / "a"), "a")
    assert (version.folder() / "adapter_config.json").is_file()
    with Store.open(tmp_path / "home") as store:
        store.remove("a:v1")
    with pytest.raises(StoreError, match="a:v1: was removed"):
        version.folder()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="the store cannot be used"):
        Store.open(tmp_path / "home")


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(StoreError, match="store: the store cannot be used"):
        Store.open(tmp_path / "home")
