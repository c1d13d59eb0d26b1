"""Secrets and e-mail addresses in text: which kind, how long, and never what they are.

The patterns are those of gitleaks (https://github.com/gitleaks/gitleaks, config/gitleaks.toml, MIT)
and of the issuers' own documentation: tokens with a fixed prefix and length, so that ordinary prose
does not match. As gitleaks does, a key that ends in EXAMPLE (as AWS's documentation writes all of
its own) is none, and a value set to a name such as `password` counts only if it is random: with
letters and digits and an entropy of 3.5 bits a character or more.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One kind of secret. `words`: one of them is in every match, lower case; looked for first."""

    kind: str
    words: tuple[str, ...]
    regex: re.Pattern[str]
    """Its group `value`, or else the whole match, is the secret."""


def _pattern(kind: str, words: str, regex: str) -> _Pattern:
    return _Pattern(kind, tuple(words.split()), re.compile(regex))


_PATTERNS = (
    _pattern("private key", "-----begin", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    _pattern(
        "AWS access key id",
        "a3t akia asia abia acca",
        r"\b(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b(?<!EXAMPLE)",
    ),
    _pattern(
        "AWS secret key",
        "aws",
        r"(?i)aws[\w .-]{0,20}(?:secret|key)[\w .-]{0,20}[\"'\s:=]{1,5}"
        r"(?P<value>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])(?<!EXAMPLEKEY)",
    ),
    _pattern(
        "GitHub token",
        "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{82})\b",
    ),
    _pattern("GitLab token", "glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    _pattern(
        "Slack token",
        "xox hooks.slack.com",
        r"\bxox[abeoprs]-(?:\d+-)+[A-Za-z0-9-]{10,}"
        r"|hooks\.slack\.com/services/T\w{6,}/B\w{6,}/\w{20,}",
    ),
    _pattern("Anthropic key", "sk-ant-", r"\bsk-ant-[a-z0-9]+-[A-Za-z0-9_-]{20,}"),
    _pattern(
        "OpenAI key",
        "sk-proj- sk-svcacct- sk-admin- t3blbkfj",
        r"\bsk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{20,}|\bsk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}",
    ),
    _pattern("Hugging Face token", "hf_", r"\bhf_[A-Za-z0-9]{34}\b"),
    _pattern(
        "Google key", "aiza ya29.", r"\bAIza[A-Za-z0-9_-]{35}(?![\w-])|\bya29\.[A-Za-z0-9_-]{30,}"
    ),
    _pattern("Stripe key", "k_live_", r"\b[rs]k_live_[A-Za-z0-9]{16,99}\b"),
    _pattern(
        "package index token",
        "pypi-ageichlwas5vcmc npm_",
        r"\bpypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}|\bnpm_[A-Za-z0-9]{36}\b",
    ),
    _pattern(
        "JSON web token",
        "eyj",
        r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{16,}",
    ),
    _pattern(
        "password in a URL",
        "://",
        r"\b[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s:/@\"'<>]{0,64}:(?P<value>[^\s/@\"'<>]{3,})@[\w.-]",
    ),
)

# Looked for from the value, which is rare, back to its name.
# A colon needs a space or a quote after it: `arn:...:secret:name` names no secret's value.
_VALUE = re.compile(
    r"(?:=>?|:(?=[ \t\"']))[ \t]*[\"']?(?P<value>(?!//)[A-Za-z0-9+/=_.~!@#$%^&*-]{16,200})"
)
_NAME = re.compile(
    r"(?i)(?:api[_-]?key|secret|token|passw(?:or)?d|pwd|credential|auth[_-]?key)[\w-]{0,20}"
    r"[\"']?[ \t]*:?$"
)
_NAME_LENGTH = 48

_PLACEHOLDER = re.compile(
    r"(?i)^(?:\W*)(?:(?:my|your|the|a|db|user)?[_-]?(?:pass(?:word|wd)?|pwd|secret|token|pw)\d{0,3}"
    r"|[x*.#-]+|\$.*|[{%[].*|changeme|hunter2|1234\d*|abc\d*)(?:\W*)$"
)
_EXAMPLE = re.compile(r"(?i)example|.*example(?:key)?$")
_MIN_ENTROPY = 3.5

_EMAIL = re.compile(
    r"(?<![\w.+/%-])[A-Za-z0-9][\w.%+-]{0,63}@(?P<domain>(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}"
    r"[A-Za-z0-9])?\.)+[A-Za-z]{2,24})(?![\w-])"
)
_CREDENTIALS = re.compile(r"://[^\s/@]*@")
_RESERVED = re.compile(
    r"(?i)(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|local)$"
)
"""RFC 2606 and RFC 6762: they belong to nobody."""
_FILE_ENDINGS = ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "service", "socket")
"""`icon@2x.png`, `getty@tty1.service`."""


def find_secrets(text: str) -> Iterator[tuple[str, int]]:
    """(kind, characters) of each secret in `text`."""
    lower = text.lower()
    for pattern in _PATTERNS:
        for word in pattern.words:
            if word in lower:
                break
        else:
            continue
        for match in pattern.regex.finditer(text):
            value = match["value"] if "value" in pattern.regex.groupindex else match[0]
            if not _PLACEHOLDER.match(value):
                yield pattern.kind, len(value)
    for match in _VALUE.finditer(text):
        before = text[max(0, match.start() - _NAME_LENGTH) : match.start()]
        if _NAME.search(before) and _is_random(match["value"]):
            yield "key or password", len(match["value"])


def find_emails(text: str) -> Iterator[tuple[str, int]]:
    """("e-mail address", characters) of each address in `text` that can be somebody's."""
    if "@" not in text:
        return
    for match in _EMAIL.finditer(_CREDENTIALS.sub(" ", text)):
        domain = match["domain"]
        is_file = domain.rpartition(".")[2].lower() in _FILE_ENDINGS
        if not is_file and not _RESERVED.search(domain) and not match[0].startswith("git@"):
            yield "e-mail address", len(match[0])


def _is_random(value: str) -> bool:
    """Whether `value` can be a generated secret: no path, no name, no prose."""
    value = value.rstrip(".,;")
    has_both = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    if len(value) < 16 or not has_both or _EXAMPLE.match(value):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= _MIN_ENTROPY
