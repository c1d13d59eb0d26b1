"""What an artefact in the store may be called, and how one of its versions is referred to.

    support/acme           the latest version
    support/acme:v3        version 3
    support/acme:prod      the version that the tag `prod` is on
    sha256:9f86d081        the version whose files have this digest (its first 8 digits or more)

A name becomes part of a path in a remote store and of a URL, so what it may hold is narrow.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tunefork.errors import StoreError

_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NUMBER = re.compile(r"v([1-9][0-9]{0,8})")
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_RULE = "1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit and without '..'"
DIGEST = "sha256"
LATEST = "latest"
MAX_SEGMENTS = 3


@dataclass(frozen=True, slots=True)
class Reference:
    """A version as a user names it: by number, by tag or, with neither, the latest."""

    name: str
    number: int | None = None
    tag: str | None = None


def check_name(name: str) -> str:
    """`name` itself; raises StoreError, which says the rule, where it is none."""
    segments = name.split("/")
    if len(segments) > MAX_SEGMENTS or not all(map(_is_segment, segments)):
        raise StoreError(
            f"{name!r} is no name for the store: a name is 1 to {MAX_SEGMENTS} parts with '/' "
            f"between them, each {_RULE} (support/acme)"
        )
    if name == DIGEST:
        raise StoreError(f"{name!r} is reserved as a name: {DIGEST}:... stands for a digest")
    return name


def check_tag(tag: str) -> str:
    """`tag` itself; raises StoreError, which says the rule, where it is none."""
    if not _is_segment(tag):
        raise StoreError(f"{tag!r} is no tag: a tag is {_RULE} (prod)")
    if tag == LATEST or _NUMBER.fullmatch(tag):
        raise StoreError(
            f"{tag!r} is reserved as a tag: v1, v2, ... are versions and {LATEST} is the newest one"
        )
    return tag


def check_names(name: str, tags: Iterable[str]) -> None:
    """`check_name` and, for each of `tags`, `check_tag`."""
    check_name(name)
    for tag in tags:
        check_tag(tag)


def parse_reference(text: str) -> Reference:
    """`name`, `name:vN`, `name:tag` or `name:latest`; raises StoreError."""
    name, colon, version = text.partition(":")
    check_name(name)
    if not colon or version == LATEST:
        return Reference(name)
    if match := _NUMBER.fullmatch(version):
        return Reference(name, number=int(match[1]))
    return Reference(name, tag=check_tag(version))


def digest_prefix(text: str) -> str | None:
    """The digest's first digits, where `text` is `sha256:...` or those digits alone."""
    digits = text.removeprefix(f"{DIGEST}:")
    if _DIGEST.fullmatch(digits):
        return digits
    if digits != text:
        raise StoreError(f"{text!r}: {DIGEST}: takes 8 to 64 digits of 0-9 and a-f")
    return None


def _is_segment(text: str) -> bool:
    return _SEGMENT.fullmatch(text) is not None and ".." not in text
