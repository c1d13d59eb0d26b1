"""Secrets, addresses, broken text, odd turns: each kind, and what only looks like it.

The secrets are put together here, so that no scanner finds them in this file.
"""

import numpy as np
import pytest

from tunefork.data.example import Encoded
from tunefork.data.report import count_labels
from tunefork.data.roles import find_roles
from tunefork.data.secrets import find_emails, find_secrets
from tunefork.data.unicode import find_broken, plain_form

LETTERS = "Zk3Qm9Xt7Lw2Vb8Rn4Yc6Hd1Jf5Gs0PaUeIoKqTz" * 3

SECRETS = {
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "AWS access key id": "AK" + "IAQ7W3KZ5MN2XVBP4T",
    "AWS secret key": "aws_secret_access_key = " + LETTERS[:40],
    "GitHub token": "ghp" + "_" + LETTERS[:36],
    "GitLab token": "glpat" + "-" + LETTERS[:20],
    "Slack token": "xoxb" + "-123456789012-123456789012-" + LETTERS[:24],
    "Anthropic key": "sk-ant" + "-api03-" + LETTERS[:40],
    "OpenAI key": "sk-" + "proj-" + LETTERS[:40],
    "Hugging Face token": "hf" + "_" + LETTERS[:34],
    "Google key": "AI" + "za" + LETTERS[:35],
    "Stripe key": "sk_" + "live_" + LETTERS[:24],
    "package index token": "npm" + "_" + LETTERS[:36],
    "JSON web token": "ey" + "J" + LETTERS[:20] + ".ey" + "J" + LETTERS[:20] + "." + LETTERS[:30],
    "password in a URL": "postgres://app:" + "s3cr3tZ9" + "@db.internal/main",
    "key or password": 'api_key: "' + LETTERS[:24] + '"',
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_by_kind(kind: str) -> None:
    found = list(find_secrets(f"Use this: {SECRETS[kind]} and go on."))
    assert kind in [name for name, _ in found]
    assert all(8 <= length <= 200 for _, length in found)


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN PUBLIC KEY-----",
        "AKIA" + "IOSFODNN7EXAMPLE",  # AWS's own, as its documentation writes it
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "the private key is kept in a vault; tokens are words; secrets stay secret",
        "postgres://app:password@db/main and http://user:${PASSWORD}@host and ssh://host:22/a@b",
        "https://example.com:8080/@user",
        "password: correct-horse-battery-staple",
        "api_key = your-api-key-goes-here",
        "token: https://docs.example.com/reference/v1/tokens",
        "Specify the SecretAccessKey=arn:aws:iam::aws:policy/service-role/AmazonRole",
        "ghp_short hf_short sk-learn sk-proj eyJust.eyKidding.me npm_config_cache",
        "max_tokens=1024, secret santa: 20251224, pwd=/home/user/projects/website",
        "akin to asia, draws flaws",
        "arn:aws:secretsmanager:eu-west-1:111122223333:secret:snowflake-XHb67jQ2",
        'AdminPassword": "ExamplePassword123!"',
    ],
)
def test_what_looks_like_a_secret(text: str) -> None:
    assert list(find_secrets(text)) == []


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("write to jo.blo+x@mail.acme.co.uk.", [24]),
        ("mailto:jo@acme.io, <al@acme.io>", [10, 10]),
        ("jo@example.com, jo@mail.example.org, jo@host.test, jo@localhost", []),
        ("icon@2x.png, @user, a @ b.com, git@github.com:x/y, user@host", []),
        ("getty@tty1.service and @media (x) and numpy@1.26", []),
        ("postgres://app:s3cr3tZ9@db.acme.io/main", []),
    ],
)
def test_addresses(text: str, lengths: list[int]) -> None:
    assert [length for _, length in find_emails(text)] == lengths


CONTROL, WRONG = "control character", "UTF-8 read as another encoding"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\0b\0", [("NUL character", 2)]),
        ("a\x1b[31mb\x9f", [(CONTROL, 2)]),
        ("caf\ufffd \ufffd", [("replacement character U+FFFD", 2)]),
        ("\ufeffhello", [("byte-order mark", 1)]),
        ("café à la".encode().decode("cp1252"), [(WRONG, 2)]),
        ("it\u2019s".encode().decode("cp1252"), [(WRONG, 1)]),
        ("it\u2019s".encode().decode("latin-1"), [(CONTROL, 2), (WRONG, 1)]),
        ("привет".encode().decode("latin-1"), [(CONTROL, 2), (WRONG, 1)]),
        ("line\n\ttab\r\n\x0cpage", []),
        ("São Tomé, JOÃO, «CAFÉ» ÂGE Ã, naïve, ½ £5, 20 °C", []),
        ("Привет Ñandú ÑÑ 日本語 👍🏽 e\u0301", []),
        ("« À LA CARTE Â» Ã»", []),
        ("plain", []),
    ],
)
def test_broken_text(text: str, found: list[tuple[str, int]]) -> None:
    assert list(find_broken(text)) == found


@pytest.mark.parametrize(
    ("roles", "found"),
    [
        ("sua", []),
        ("uaua", []),
        ("uatta", []),  # one answer calls two tools
        ("uua", [("two user turns in a row", 1)]),
        ("uaa", [("two assistant turns in a row", 2)]),
        ("ssua", [("a system turn that is not the first", 1)]),
        ("usa", [("a system turn that is not the first", 1)]),
        ("uta", [("a tool turn that follows no answer", 1)]),
    ],
)
def test_roles(roles: str, found: list[tuple[str, int]]) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    assert list(find_roles([names[role] for role in roles])) == found


def test_labels_that_are_one() -> None:
    assert plain_form(" New\u00a0York") == plain_form("new  york")
    assert plain_form("cafe\u0301") == plain_form("café") != plain_form("cafe")


@pytest.mark.parametrize("label", [SECRETS["AWS access key id"], "joe@" + "firm.org"])
def test_a_label_that_is_a_secret_is_masked_in_the_report(label: str) -> None:
    ids, supervised = np.zeros(2, dtype=np.int32), np.ones(2, dtype=np.bool_)
    rows = [Encoded("f:1", ids, supervised, label=name) for name in (label, label, "fox")]
    counts = count_labels(rows)
    assert list(counts.values()) == [2, 1] and "fox" in counts
    assert label not in str(counts)
