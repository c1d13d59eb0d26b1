"""Times of kernels alone on a GPU: of CUDA graphs, which the host's own work is no part of."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_TURNS = 8

Calls = Sequence[Callable[..., Any]]


def in_turns(
    forms: Mapping[str, Calls], before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median milliseconds of one call of each form, replayed in turn; `before` each replay."""
    graphs = {name: _captured(calls) for name, calls in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(_TURNS):
        for name, graph in graphs.items():
            if before is not None:
                before()
            times[name].append(_replay_ms(graph) / len(forms[name]))
    return {name: round(statistics.median(found[1:]), 4) for name, found in times.items()}


def graph_ms(calls: Calls) -> float:
    """Of one call."""
    return in_turns({"": calls})[""]


def _captured(calls: Calls) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    graph.replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))
