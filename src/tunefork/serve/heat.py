"""Which adapters are asked so much that a merged copy of the base would pay for itself.

What a replica saves is the adapters' part of each pass, for as long as its own batches are full;
what it costs is the memory of one more base, and fuller batches elsewhere. So it pays once one
adapter alone keeps half of the engine's places busy (a rule of thumb: measure yours with
`tunefork bench-serve`). The number of its answers that run is a decaying mean over some minutes.
"""

import math

_HALF_LIFE_S = 300.0
SHARE = 0.5
"""Of the engine's places."""


class Heat:
    """Seconds of running answers by adapter, forgotten by halves."""

    def __init__(self) -> None:
        self._seconds: dict[str, tuple[float, float]] = {}
        """Name -> (decayed seconds, when)."""

    def add(self, name: str, running_s: float, now: float) -> None:
        """An answer of `name` ran so long."""
        self._seconds[name] = (self._decayed(name, now) + running_s, now)

    def mean_running(self, now: float) -> dict[str, float]:
        """About how many answers of each were running at any time of the last minutes."""
        rate = math.log(2) / _HALF_LIFE_S
        return {name: self._decayed(name, now) * rate for name in self._seconds}

    def _decayed(self, name: str, now: float) -> float:
        seconds, then = self._seconds.get(name, (0.0, now))
        return float(seconds * 0.5 ** ((now - then) / _HALF_LIFE_S))
