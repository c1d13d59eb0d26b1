"""The allowed answers of a classification as a tree of tokens, and the row that scores them all.

Every label is scored by the likelihood of its whole answer, end-of-turn token included. Labels
share prefixes with each other and all share the prompt, so one row holds the prompt once and each
distinct prefix once, under a mask that lets a token see the prompt and its own ancestors:

    prompt ... | Sage | Maker | S | 3 |        4 tokens after the prompt for "SageMaker" and "S3"

An *edge* is a token to be scored at a place in the row: `Sage` and `S` at the prompt's last token,
`Maker` at `Sage`, the end of the turn at `Maker` and at `3`. Answers' last tokens are edges only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ROOT = -1
"""The prompt's last token, as a node."""


@dataclass(frozen=True)
class AnswerTree:
    """N nodes (tokens fed to the model) and E edges (tokens scored)."""

    tokens: tuple[int, ...]
    """Of each node, (N,)."""
    parents: tuple[int, ...]
    """Of each node: an earlier node, or ROOT. (N,)"""
    edges: tuple[tuple[int, int], ...]
    """(node to predict from, token id) of each edge, (E,)."""
    paths: tuple[tuple[int, ...], ...]
    """For each label, its answer's edges in order."""

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """Tokens between the prompt's last token and each node, from 1: (N,)."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return np.array(depths, dtype=np.int64)

    @cached_property
    def sees(self) -> NDArray[np.bool_]:
        """(N, N) whether the node of a row sees the node of a column: itself and its ancestors."""
        sees = np.eye(len(self.tokens), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                sees[node] |= sees[parent]
        return sees


def grow(answers: Sequence[Sequence[int]]) -> AnswerTree:
    """The tree of the labels' answers, each a sequence of one or more token ids."""
    nodes: dict[tuple[int, ...], int] = {(): ROOT}
    tokens: list[int] = []
    parents: list[int] = []
    edges: dict[tuple[int, int], int] = {}
    paths = []
    for answer in answers:
        path = []
        for depth, token in enumerate(answer):
            prefix = tuple(answer[:depth])
            if prefix not in nodes:
                nodes[prefix] = len(tokens)
                tokens.append(prefix[-1])
                parents.append(nodes[prefix[:-1]])
            path.append(edges.setdefault((nodes[prefix], token), len(edges)))
        paths.append(tuple(path))
    return AnswerTree(tuple(tokens), tuple(parents), tuple(edges), tuple(paths))
