"""Texts that are nearly equal: all pairs above a Jaccard similarity, found exactly.

A text is the set of its runs of three words, lower case and without punctuation. Two sets that
share at least t of their union also share one of the rarest few of each: of n runs, sorted by how
many texts have them, the first n - ceil(t n) + 1 (prefix filtering: Chaudhuri et al. 2006,
https://doi.org/10.1109/ICDE.2006.9; Bayardo et al. 2007, https://doi.org/10.1145/1242572.1242591).
Most of those stand in one text only, so few pairs are left, and each is verified. Unlike MinHash
nothing is missed by chance, and the answer does not depend on the order of the texts.

Runs that stand in more than 1 % of the distinct texts (and in more than 50) are a template's
wording, as an instruction put before every row, and are left out: with it short texts would look
alike. That also bounds the work. What is left of a text may be nothing; then it is like no other.
"""

import hashlib
import itertools
import re
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORDS_PER_RUN = 3
TEMPLATE_SHARE = 0.01
MIN_TEMPLATE_TEXTS = 50

_CHUNK = 4_000_000
"""Runs looked up at once, which bounds memory."""
_ASCII_WORD = re.compile(r"[a-z0-9_]+")
# Chinese, Japanese and Korean are written without spaces: each character counts as a word.
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])\w)+")
_PRIMES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Near:
    """Which of N texts are alike."""

    group: list[int]
    """For each text the group of those with the same runs of words; -1 for a text like no other."""
    neighbours: dict[int, dict[int, float]]
    """For a group those above the threshold, with their similarity; symmetric, itself left out."""

    def like(self, text: int) -> dict[int, float]:
        """The groups that `text` is like, its own (similarity 1) first."""
        group = self.group[text]
        return {} if group < 0 else {group: 1.0} | self.neighbours.get(group, {})


def find_near(texts: Sequence[str], threshold: float) -> Near:
    """All pairs of `texts` with a Jaccard similarity of at least `threshold`, in (0, 1]."""
    owners, runs = _runs(texts)
    group, kept = _group_equals(owners, runs, len(texts))
    owners, runs = group[owners[kept]], runs[kept]
    if len(runs) == 0:
        return Near([-1] * len(texts), {})
    keys, sizes, num_ranks = _rank(owners, runs)
    group[group >= 0] = np.where(sizes[group[group >= 0]] > 0, group[group >= 0], -1)
    neighbours: dict[int, dict[int, float]] = {}
    for a, b, similarity in _pairs(keys, sizes, num_ranks, threshold):
        neighbours.setdefault(a, {})[b] = similarity
        neighbours.setdefault(b, {})[a] = similarity
    return Near(group.tolist(), neighbours)


def words(text: str) -> list[str]:
    """The words of `text` as they are compared."""
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text.casefold())


def _runs(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """(text, hash of a run of words) for every run of every text, in that order.

    A text of fewer words is one run: such texts are alike only where equal.
    """
    numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    flat, lengths = array("q"), np.zeros(len(texts), dtype=np.int64)
    for index, text in enumerate(texts):
        found = words(text)
        if found:
            found += [""] * (WORDS_PER_RUN - len(found))
        lengths[index] = len(found)
        flat.extend(map(numbers.__getitem__, found))
    hashes = np.fromiter((_hash(word) for word in numbers), np.uint64, len(numbers))
    all_words = hashes[np.asarray(flat, dtype=np.int64)]
    owner = np.repeat(np.arange(len(texts)), lengths)
    count = max(0, len(all_words) - WORDS_PER_RUN + 1)
    runs = np.zeros(count, dtype=np.uint64)
    for place, prime in enumerate(_PRIMES):
        runs = _mix((runs ^ all_words[place : place + count]) * prime)
    is_whole = owner[:count] == owner[len(owner) - count :]
    return owner[:count][is_whole], runs[is_whole]


def _hash(word: str) -> int:
    """64 bits that are the same in every process, as `hash` is not."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of a value moves every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _group_equals(
    owners: NDArray[np.int64], runs: NDArray[np.uint64], num_texts: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Number the texts by what runs they hold; mark the rows of `runs` of each number's first.

    Copies without end would otherwise be pairs without end.
    """
    group = np.full(num_texts, -1, dtype=np.int64)
    if len(runs) == 0:
        return group, np.zeros(0, dtype=bool)
    present, starts = np.unique(owners, return_index=True)
    sums = np.add.reduceat(runs, starts)
    others = np.add.reduceat(_mix(runs * _PRIMES[0]), starts)
    both = np.stack([sums, others], axis=1)  # 128 bits of a set's content
    _, first, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    group[present] = inverse.reshape(-1)
    is_first = np.zeros(num_texts, dtype=bool)
    is_first[present[first]] = True
    return group, is_first[owners]


def _rank(
    owners: NDArray[np.int64], runs: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Replace runs by their rank, rarest first: sorted keys owner * num_ranks + rank, and sizes."""
    num_groups = int(owners.max()) + 1
    distinct, ids = np.unique(runs, return_inverse=True)
    keys = np.sort(owners * len(distinct) + ids)
    keys = keys[np.append(True, keys[1:] != keys[:-1])]
    owners, ids = keys // len(distinct), keys % len(distinct)
    counts = np.bincount(ids)
    limit = max(MIN_TEMPLATE_TEXTS, int(TEMPLATE_SHARE * num_groups))
    rank_of = np.empty(len(counts), dtype=np.int64)
    rank_of[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    is_kept = counts[ids] <= limit
    owners, ids = owners[is_kept], ids[is_kept]
    keys = np.sort(owners * len(counts) + rank_of[ids])
    return keys, np.bincount(owners, minlength=num_groups), len(counts)


def _pairs(
    keys: NDArray[np.int64], sizes: NDArray[np.int64], num_ranks: int, threshold: float
) -> list[tuple[int, int, float]]:
    """Candidates by prefix filtering, verified."""
    owners, ranks = keys // num_ranks, keys % num_ranks
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    prefix = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    in_prefix = np.arange(len(keys)) - starts[owners] < prefix[owners]
    owners, ranks = owners[in_prefix], ranks[in_prefix]
    order = np.lexsort((owners, sizes[owners], ranks))  # alike in size stand side by side
    owners, ranks = owners[order], ranks[order]
    found: list[NDArray[np.int64]] = []
    at, step = np.arange(len(ranks)), 1
    while len(at := at[at < len(ranks) - step]):
        at = at[ranks[at] == ranks[at + step]]  # whoever has no partner here has none further on
        small, large = owners[at], owners[at + step]
        fits = sizes[small] >= threshold * sizes[large] - 1e-9
        at, small, large = at[fits], small[fits], large[fits]  # those further on are larger yet
        found.append(np.minimum(small, large) * len(sizes) + np.maximum(small, large))
        step += 1
    candidates = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *found]))
    a, b = candidates // len(sizes), candidates % len(sizes)
    shared = _shared(a, b, keys, starts, sizes, num_ranks)
    similarity = shared / (sizes[a] + sizes[b] - shared)
    is_near = similarity >= threshold - 1e-9
    return list(
        zip(a[is_near].tolist(), b[is_near].tolist(), similarity[is_near].tolist(), strict=True)
    )


def _shared(
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    keys: NDArray[np.int64],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    num_ranks: int,
) -> NDArray[np.int64]:
    """How many runs each pair of groups has in common."""
    a, b = np.where(sizes[a] <= sizes[b], a, b), np.where(sizes[a] <= sizes[b], b, a)
    shared = np.zeros(len(a), dtype=np.int64)
    ends = np.cumsum(sizes[a])
    at = 0
    while at < len(a):
        before = int(ends[at - 1]) if at else 0
        until = max(at + 1, int(np.searchsorted(ends, before + _CHUNK, side="right")))
        count = sizes[a[at:until]]
        pair = np.repeat(np.arange(until - at), count)
        offset = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        wanted = (
            keys[starts[a[at:until]][pair] + offset] % num_ranks + b[at:until][pair] * num_ranks
        )
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        shared[at:until] = np.bincount(pair[keys[place] == wanted], minlength=until - at)
        at = until
    return shared
