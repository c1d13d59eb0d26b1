"""From the raw lines of benchmarks/h200_training.py to results/h200_training.json."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.training_cases import CASES, RUNS, Case
from benchmarks.training_runs import NUM_LOSSES

_Row = dict[str, Any]
_KEPT = (
    *("tokens_per_s", "spread", "step_s", "timed_steps", "peak_gib", "reserved_gib"),
    *("load_s", "first_step_s", "compile_cache", "trained_parameters", "trained_dtype"),
    *("repeats", "compiled", "losses", "error", "device", "call"),
)
_FORMER = {"fp8": "int8", "fp8_20gib": "int8_20gib", "fp8_short": "int8_short"}
"""Names of our runs in lines of before there was int8; their setting says what they were."""
_LORA = ("lora_8x2048_fp8", "lora_8x2048_bf16")


def collect(files: list[Path], name: str) -> Path:
    """Write the table of what was measured, of each case's newest call."""
    raw = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    found: dict[str, dict[str, list[_Row]]] = {}
    for row in raw:
        run = _FORMER.get(row["run"], row["run"])
        found.setdefault(row["call"], {}).setdefault(run, []).append(row)
    by_call = {
        call: {run: _of_repeats(rows) for run, rows in runs.items()} for call, runs in found.items()
    }
    rows = [row for case in CASES for row in case_rows(case, CASES[case], by_call)]
    rows += lora_over_full(rows)
    measured = [row for row in raw if "error" not in row]
    versions = {key: value for row in measured for key, value in row["versions"].items()}
    devices = sorted({row["device"] for row in measured})
    return results.write(
        name,
        rows,
        device=", ".join(devices),
        command="python -m benchmarks.h200_training measure, then collect",
        versions=versions,
    )


def _of_repeats(rows: list[_Row]) -> _Row:
    """One row of a call's runs of the same: the first's, which compiled, and the median speed."""
    done = [row for row in rows if "error" not in row]
    if len(done) < 2:
        return (done or rows)[-1]
    speeds = [row["tokens_per_s"] for row in done]
    middle = {
        key: statistics.median(row[key] for row in done) for key in ("tokens_per_s", "step_s")
    }
    return done[0] | middle | {"repeats": [round(speed, 1) for speed in speeds]}


def case_rows(name: str, case: Case, by_call: dict[str, dict[str, _Row]]) -> list[_Row]:
    """Our row with its ratios, the plain path's losses, the peers' rows, all of one call; or, where
    a newer one of ours has no peer beside it, that with the ratios of two calls, and the older.

    A tool that is not in that call is `_beside_` one of ours in the newest that has both."""
    calls = [call for call in sorted(by_call) if case.ours in by_call[call]]
    if not calls:
        return []
    best, found = _best_call(case, calls, by_call), list[_Row]()
    runs = by_call[best]
    peers = [_row(name, runs[peer]) for peer in case.peers if peer in runs]
    newest = next((c for c in reversed(calls) if _is_alone(case, by_call[c])), best)
    for call in dict.fromkeys((max(newest, best), best)):
        ours = _row(name if call >= newest else f"{name}_before", by_call[call][case.ours])
        ours["ratios"] = _ratios(ours, peers)
        if call != best:
            ours["ratios_to_call"] = best
        ours["asked"] = _asked(ours, case)
        found.append(ours)
    ours = found[0]
    found += peers
    for tool in dict.fromkeys(RUNS[peer].tool for peer in case.peers):
        if not _has(tool, case, runs):
            found += _beside(name, case, tool, calls, by_call)
    plain = runs.get(case.plain) or _newest(case.plain, by_call)
    if plain is not None:
        row = _row(f"{name}_plain_losses", plain)
        found.append(row)
        if "losses" in ours and "losses" in row:
            pairs = zip(ours["losses"], row["losses"], strict=False)
            ours["largest_loss_gap"] = max(abs(a - b) for a, b in pairs)
    return found


def _best_call(case: Case, calls: list[str], by_call: dict[str, dict[str, _Row]]) -> str:
    """The newest with our figure and beside it the tool's that a ratio to is asked, or a peer's;
    else the newest."""

    def worth(call: str) -> tuple[bool, bool, bool]:
        runs = by_call[call]
        is_asked = case.ratio is not None and _has(case.ratio[0], case, runs)
        has_peer = any(_is_done(peer, runs) for peer in case.peers)
        return _is_done(case.ours, runs), is_asked, has_peer

    return max(calls, key=lambda call: (*worth(call), call))


def _has(tool: str, case: Case, runs: dict[str, _Row]) -> bool:
    """A setting of `tool` came to its end there."""
    return any(RUNS[peer].tool == tool for peer in case.peers if _is_done(peer, runs))


def _is_done(run: str, runs: dict[str, _Row]) -> bool:
    return run in runs and "error" not in runs[run]


def _is_alone(case: Case, runs: dict[str, _Row]) -> bool:
    """Ours came to its end there, and no peer is beside it."""
    return _is_done(case.ours, runs) and not any(_is_done(peer, runs) for peer in case.peers)


def _beside(
    name: str, case: Case, tool: str, calls: list[str], by_call: dict[str, dict[str, _Row]]
) -> list[_Row]:
    """Ours and that tool's, of the newest call that has both."""
    fine = [call for call in calls if _is_done(case.ours, by_call[call])]
    runs = next((by_call[c] for c in reversed(fine) if _has(tool, case, by_call[c])), None)
    if runs is None:
        return []
    own, case_name = runs[case.ours], f"{name}_beside_{tool}"
    peers = [p for p in case.peers if p in runs and RUNS[p].tool == tool]
    rows = [_row(case_name, runs[peer]) for peer in peers]
    ours = _row(case_name, own)
    return [ours | {"ratios": _ratios(ours, rows)}, *rows]


def _newest(run: str, by_call: dict[str, dict[str, _Row]]) -> _Row | None:
    """Losses are compared across calls: the weights and batches are those of the seed."""
    found = [by_call[call][run] for call in sorted(by_call) if run in by_call[call]]
    return found[-1] if found else None


def _row(case: str, raw: _Row) -> _Row:
    is_ours = raw["tool"] == "tunefork"
    start = {"case": case, "tool": raw["tool"], "ours": is_ours, "setting": raw["setting"]}
    kept = {key: raw[key] for key in _KEPT if key in raw}
    if "losses" in kept:
        kept["losses"] = [round(loss, 5) for loss in kept["losses"][:NUM_LOSSES]]
    return start | kept


def _ratios(ours: _Row, peers: list[_Row]) -> dict[str, float]:
    """Our speed over the best of each tool's settings."""
    best: dict[str, float] = {}
    for peer in peers:
        if "tokens_per_s" in peer:
            best[peer["tool"]] = max(best.get(peer["tool"], 0.0), peer["tokens_per_s"])
    if "tokens_per_s" not in ours:
        return {}
    return {tool: ours["tokens_per_s"] / speed for tool, speed in best.items()}


def _asked(ours: _Row, case: Case) -> dict[str, Any]:
    """What the issue asks of the case, and whether it was reached; None: not measured."""
    asked: dict[str, Any] = {}
    speed, peak = ours.get("tokens_per_s"), ours.get("peak_gib")
    if case.tokens_per_s is not None:
        asked["tokens_per_s"] = [case.tokens_per_s, speed and speed >= case.tokens_per_s]
    if case.ratio is not None:
        tool, least = case.ratio
        ratio = ours["ratios"].get(tool)
        asked[f"times_{tool}"] = [least, ratio and ratio >= least]
    if case.peak_gib is not None:
        asked["peak_gib"] = [case.peak_gib, peak and peak <= case.peak_gib]
    return asked


def lora_over_full(rows: list[_Row]) -> list[_Row]:
    """How many times faster LoRA is than full fine-tuning, each tool at its best setting."""
    found = []
    for tool in ("tunefork", "peft_liger"):
        best = []
        for cases in (_LORA, ("full_8x2048",)):
            named = {*cases, *(f"{case}_beside_{tool}" for case in cases)}
            of = [r for r in rows if r["case"] in named and r["tool"] == tool]
            of = [r for r in of if "tokens_per_s" in r]
            best.append(max(of, key=lambda r: float(r["tokens_per_s"]), default=None))
        lora, full = best
        if lora is None or full is None:
            continue
        said = ("tokens_per_s", "peak_gib", "setting", "device", "call")
        found.append(
            {
                "case": "lora_over_full",
                "tool": tool,
                "ours": tool == "tunefork",
                "ratio": lora["tokens_per_s"] / full["tokens_per_s"],
                "same_call": lora["call"] == full["call"],
                "lora": {key: lora[key] for key in said},
                "full": {key: full[key] for key in said},
            }
        )
    return found
