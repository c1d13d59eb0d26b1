"""What artefacts, tags and references may be called."""

import pytest

from tunefork.errors import StoreError
from tunefork.registry.names import (
    Reference,
    check_name,
    check_tag,
    digest_prefix,
    parse_reference,
)


@pytest.mark.parametrize("name", ["acme", "support/acme", "a/b/c", "0x", "a.b_c-d", "a" * 64])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    f"|/a|a/|a//b|a/b/c/d|A|a b|.a|-a|{'a' * 65}|..|a/../b|a..b|a\n|ä|a\\b|a:b|~a|/etc|a/./b".split(
        "|"
    ),
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(StoreError, match="is no name for the store: a name is 1 to 3 parts"):
        check_name(name)


def test_reserved() -> None:
    for tag in ("latest", "v1", "v20"):
        with pytest.raises(StoreError, match="is reserved as a tag"):
            check_tag(tag)
    for tag in ("prod", "v0", "v", "v1.2", "vnext"):
        assert check_tag(tag) == tag
    for tag in ("a/b", "Prod", "a:b", "..", ""):
        with pytest.raises(StoreError, match="is no tag"):
            check_tag(tag)
    with pytest.raises(StoreError, match="is reserved as a name"):
        check_name("sha256")


def test_references() -> None:
    assert parse_reference("a/b") == parse_reference("a/b:latest") == Reference("a/b")
    assert parse_reference("a/b:v12") == Reference("a/b", number=12)
    assert parse_reference("a/b:prod") == Reference("a/b", tag="prod")
    for text in ("a:", "a:b:c", ":v1", "a:../b"):
        with pytest.raises(StoreError):
            parse_reference(text)


def test_digests() -> None:
    assert digest_prefix("sha256:0123abcd") == digest_prefix("0123abcd") == "0123abcd"
    assert digest_prefix("0123abc") is None and digest_prefix("support/acme") is None
    with pytest.raises(StoreError, match="takes 8 to 64 digits"):
        digest_prefix("sha256:xyz")
