"""How quantities are written for people, one way in the terminal, the report and the verdict.

Sizes are decimal (1 GB = 10^9 bytes). Scores that are shares are written in per cent and their
differences in points, so that "1 % below" cannot be read in two ways.
"""

from tunefork.page.estimate import Estimate
from tunefork.recipe import Metric

METRIC_NAMES: dict[Metric, str] = {
    "loss": "loss",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
}
SHARES: frozenset[Metric] = frozenset({"accuracy", "macro_f1", "exact_match", "rouge_l"})
"""Metrics from 0 to 1, written in per cent."""
_DECIMALS: dict[Metric, int] = {"loss": 4, "perplexity": 3}


def bytes_text(count: float) -> str:
    """`19.5 MB`"""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"), space=" ")


def count_text(count: float) -> str:
    """`134.5M`; exact below ten thousand."""
    return f"{count:,.0f}" if count < 10_000 else _scaled(count, ("", "k", "M", "B", "T"), space="")


def counted(count: float, noun: str) -> str:
    """`1 example`, `1,200 examples`, `0.5 epochs`"""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def _scaled(value: float, suffixes: tuple[str, ...], space: str) -> str:
    """`value` in thousands of thousands, to three digits or one decimal."""
    power = 0
    while value >= 999.95 and power < len(suffixes) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 else 2 if value < 9.995 else 1
    return f"{value:,.{digits}f}{space}{suffixes[power]}".rstrip()


def seconds_text(seconds: float) -> str:
    """`147 s`, `24.5 min`, `5.2 h`"""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def usd_text(dollars: float) -> str:
    """`$0.012`, `$12.40`, `$1,240`"""
    if dollars >= 1000:
        return f"${dollars:,.0f}"
    return f"${dollars:.2f}" if dollars >= 0.1 or dollars == 0 else f"${dollars:.2g}"


def rate_text(learning_rate: float) -> str:
    """`3e-4`"""
    mantissa, exponent = f"{learning_rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def ratio_text(ratio: float) -> str:
    """`1.1 times`, `14 times`, `0.07 times`"""
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.{1 if ratio >= 0.95 else 2}f} times"


def share_text(share: float, digits: int = 1) -> str:
    """`3.5 %`"""
    return f"{100 * share:.{digits}f} %"


def metric_text(metric: Metric, value: float, *, unit: bool = True) -> str:
    """A figure: `91.2 %` for a share, `0.3616` for a loss, `5.666` for a perplexity."""
    if metric in SHARES:
        return share_text(value) if unit else f"{100 * value:.1f}"
    return f"{value:.{_DECIMALS[metric]}f}" if abs(value) < 1000 else f"{value:.4g}"


def interval_text(metric: Metric, estimate: Estimate) -> str:
    """`88.5 to 93.4`; the unit stands with the figure."""
    low, high = (metric_text(metric, v, unit=False) for v in (estimate.low, estimate.high))
    return f"{low} to {high}"


def figure_text(metric: Metric, estimate: Estimate) -> str:
    """`91.2 % (88.5 to 93.4)`"""
    return f"{metric_text(metric, estimate.value)} ({interval_text(metric, estimate)})"


def difference_text(metric: Metric, value: float, *, signed: bool = False) -> str:
    """A difference of figures: `1.8 points` for shares, else `0.0123`, in the metric's unit."""
    number = difference_number(metric, value, signed=signed)
    if metric not in SHARES:
        return number
    return f"{number} point{'' if number.lstrip('+-') == '1.0' else 's'}"


def difference_number(metric: Metric, value: float, *, signed: bool = False) -> str:
    """The same without its unit."""
    sign = "+" if signed else ""
    if metric in SHARES:
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.{_DECIMALS[metric]}f}" if abs(value) < 1000 else f"{value:{sign}.4g}"


def gain_text(metric: Metric, gain: Estimate) -> str:
    """A difference with its interval: `+1.2 points (+0.3 to +2.1)`"""
    low, high = (difference_number(metric, x, signed=True) for x in (gain.low, gain.high))
    return f"{difference_text(metric, gain.value, signed=True)} ({low} to {high})"


def sentence(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]
