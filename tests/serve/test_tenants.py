"""Keys are hashed, shown once and can be ended; a tenant is what its last setting says."""

import sqlite3
import stat
from pathlib import Path

import pytest

from tunefork.errors import BadInputError, StoreError
from tunefork.serve.tenants import Tenant, add_key, list_keys, read_accounts, revoke_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.sqlite"


def test_a_key_finds_its_tenant_and_is_not_in_the_file(file: Path) -> None:
    tenant = Tenant("acme", ("acme/*",), tokens_per_month=1000)
    key = add_key(file, tenant)
    found = read_accounts(file).find(key)
    assert found == (tenant, key.split("_")[1])
    secret = key.split("_", 2)[2].encode()
    for part in file.parent.iterdir():
        assert secret not in part.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_another_key_is_none(file: Path) -> None:
    key = add_key(file, Tenant("acme"))
    accounts = read_accounts(file)
    wrong = key[:-1] + ("a" if key[-1] != "a" else "b")
    for text in (
        wrong,
        key + "x",
        "",
        "tf_",
        key[:20],
        f"tf_{'0' * 12}_{'a' * 43}",
        "ключ",
        "\udc80",
    ):
        assert accounts.find(text) is None


def test_a_revoked_key_is_none_and_stays_listed(file: Path) -> None:
    key, other = add_key(file, Tenant("acme")), add_key(file, Tenant("acme"))
    key_id = key.split("_")[1]
    assert revoke_key(file, key_id).revoked
    accounts = read_accounts(file)
    assert accounts.find(key) is None and accounts.find(other) is not None
    assert [bool(known.revoked) for known in list_keys(file)] == [True, False]
    with pytest.raises(BadInputError, match="no key has this id"):
        revoke_key(file, "tf")


def test_a_tenant_is_changed_by_its_next_key(file: Path) -> None:
    first = add_key(file, Tenant("acme"))
    add_key(file, Tenant("acme", ("acme/*",), weight=2.0))
    found = read_accounts(file).find(first)
    assert found and found[0] == Tenant("acme", ("acme/*",), weight=2.0)


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a" * 65])
def test_a_tenant_s_name_is_narrow(file: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="no name for a tenant"):
        add_key(file, Tenant(name))


def test_the_name_of_keyless_use_is_taken(file: Path) -> None:
    with pytest.raises(BadInputError, match="without keys"):
        add_key(file, Tenant("local"))


@pytest.mark.parametrize(
    ("patterns", "seen", "hidden"),
    [
        (("acme/*",), ["acme/a", "acme/a/b"], ["acme", "acme2/a", "other/acme/a"]),
        (("acme", "shared/?"), ["acme", "shared/x"], ["acme/a", "shared/xy"]),
        ((), [], ["acme"]),
        (("*",), ["acme", "a/b/c"], []),
    ],
)
def test_patterns_say_what_a_tenant_sees(
    patterns: tuple[str, ...], seen: list[str], hidden: list[str]
) -> None:
    tenant = Tenant("acme", patterns)
    assert all(map(tenant.may_use, seen)) and not any(map(tenant.may_use, hidden))


def test_a_file_of_something_else_is_refused(file: Path) -> None:
    file.write_text("no database at all, but long enough to be taken for one" * 20)
    file.chmod(0o600)
    with pytest.raises(StoreError, match="cannot be used"):
        read_accounts(file)
    newer = file.parent / "newer.sqlite"
    database = sqlite3.connect(newer)
    database.execute("PRAGMA user_version = 99")
    database.close()
    newer.chmod(0o600)
    with pytest.raises(StoreError, match="newer tunefork"):
        read_accounts(newer)


def test_a_file_that_others_can_write_to_is_refused(file: Path) -> None:
    add_key(file, Tenant("a"))
    assert {f.stat().st_mode & 0o777 for f in file.parent.glob(f"{file.name}*")} == {0o600}
    file.chmod(0o620)
    with pytest.raises(StoreError, match="others than its owner can write to it"):
        read_accounts(file)


def test_a_file_system_without_modes_is_told_of_before_there_is_a_key(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path, mode: int) -> None:
        path.write_bytes(b"")
        path.chmod(0o777)  # whatever was asked

    monkeypatch.setattr(Path, "touch", touch)
    for act in (lambda: add_key(file, Tenant("a")), lambda: read_accounts(file)):
        with pytest.raises(StoreError, match=r"mode 777\).*keeps no modes.* with --tenants"):
            act()
    assert not file.read_bytes()
