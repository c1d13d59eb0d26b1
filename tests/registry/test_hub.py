"""The hub, by a stand-in for its client: this machine cannot reach the real one."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from tests.registry.artefacts import check_store, save_artefact
from tunefork.errors import StoreError
from tunefork.registry.hub import MANIFEST
from tunefork.registry.remote import pull, push
from tunefork.registry.store import Store

URL = "hf://acme/adapter"


@dataclass
class FakeHub:
    """Repositories as lists of commits, with the methods of HfApi that are used, as it has them."""

    folder: Path
    repositories: dict[str, list[dict[str, bytes]]]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert private and exist_ok
        self.repositories.setdefault(repo_id, [{".gitattributes": b"*"}])

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert branch == "main" and exist_ok

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        return list(self.repositories[repo_id][-1])

    def create_commit(
        self,
        repo_id: str,
        operations: list[Any],
        *,
        commit_message: str,
        revision: str | None = None,
    ) -> None:
        files = dict(self.repositories[repo_id][-1])
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                assert isinstance(operation, CommitOperationAdd)
                with operation.as_file() as stream:
                    files[operation.path_in_repo] = stream.read()
        self.repositories[repo_id].append(files)

    def repo_info(self, repo_id: str, *, revision: str | None = None) -> SimpleNamespace:
        if repo_id not in self.repositories:
            raise OSError("404 Client Error\nmore")  # as the client's own errors are
        return SimpleNamespace(sha=str(len(self.repositories[repo_id]) - 1))

    def get_paths_info(self, repo_id: str, paths: list[str], *, revision: str) -> list[Any]:
        files = self.repositories[repo_id][int(revision)]
        return [SimpleNamespace(path=p, size=len(files[p])) for p in paths if p in files]

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str, local_dir: str) -> str:
        place = Path(local_dir) / filename
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(self.repositories[repo_id][int(revision)][filename])
        return str(place)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub", {})
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    return fake


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "home") as store:
        store.publish(save_artefact(tmp_path / "a"), "support/acme", note="a note")
        yield store


def test_there_and_back(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    pushed = push(store, "support/acme", URL)
    assert set(hub.repositories["acme/adapter"][-1]) == {
        ".gitattributes",
        "adapter_config.json",
        "adapter_model.safetensors",
        MANIFEST,
    }
    with Store.open(tmp_path / "other") as other:
        found = pull(other, URL, name="mine", tags=("prod",))
        assert (str(found), found.digest, found.tags) == ("mine:v1", pushed.digest, ("prod",))
        assert str(pull(other, f"{URL}@main")) == "support/acme:v1" and check_store(other) == 2


def test_a_push_replaces_what_was_there_in_one_commit(
    hub: FakeHub, store: Store, tmp_path: Path
) -> None:
    artefact = save_artefact(tmp_path / "a", seed=2)
    (artefact / "notes.md").write_text("notes")
    store.publish(artefact, "support/acme")
    push(store, "support/acme:v2", f"{URL}@main")
    push(store, "support/acme:v1", URL)
    assert len(hub.repositories["acme/adapter"]) == 3
    assert "notes.md" not in hub.repositories["acme/adapter"][-1]


def test_what_the_hub_says_is_checked(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    push(store, "support/acme", URL)
    files = hub.repositories["acme/adapter"][-1]
    weights = files["adapter_model.safetensors"]
    with Store.open(tmp_path / "other") as other:
        for content, message in (
            (bytes(len(weights)), "is not what the manifest says"),
            (weights + b"more", "bytes, and .* are allowed"),
            (None, "has no adapter_model.safetensors"),
        ):
            if content is None:
                del files["adapter_model.safetensors"]
            else:
                files["adapter_model.safetensors"] = content
            with pytest.raises(StoreError, match=message):
                pull(other, URL)
        del files[MANIFEST]
        with pytest.raises(StoreError, match="it was not pushed by tunefork"):
            pull(other, URL)
        with pytest.raises(StoreError, match="cannot be reached: 404 Client Error$"):
            pull(other, "hf://acme/gone")
        with pytest.raises(StoreError, match="leave out 'a:v1'"):
            pull(other, URL, "a:v1")
        assert other.list() == []


@pytest.mark.parametrize("url", ["hf://acme", "hf://a/b/c", "hf://../b", "hf://a/b@", "hf:///b"])
def test_what_is_no_repository(hub: FakeHub, store: Store, url: str) -> None:
    with pytest.raises(StoreError, match="write hf://owner/name"):
        push(store, "support/acme", url)
    assert not hub.repositories


def test_the_stand_in_has_the_clients_signatures() -> None:
    """What is called with these names is what huggingface_hub has."""
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "create_branch", "list_repo_files", "create_commit", "repo_info"):
        _check_signature(inspect.signature(getattr(FakeHub, name)), getattr(HfApi, name))
    for name in ("get_paths_info", "hf_hub_download"):
        _check_signature(inspect.signature(getattr(FakeHub, name)), getattr(HfApi, name))


def _check_signature(fake: Any, real: Any) -> None:
    import inspect

    assert set(fake.parameters) <= set(inspect.signature(real).parameters), real
