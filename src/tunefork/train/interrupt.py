"""A signal, or a file that a scheduler makes, ends a run between two steps, its state saved.

Ctrl-C, SIGTERM (Kubernetes, `docker stop`, Slurm at its limit), SIGUSR1 (Slurm's
`--signal=USR1@60`) or the appearance of `train.preemption_file`.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

_STDERR = 2
_SAID = b"\nstopping after this step; Ctrl-C again stops at once\n"


class Interrupt:
    """While entered, a signal is only noted (`requested`); a second Ctrl-C interrupts.

    A scheduler may send SIGTERM after SIGUSR1, or twice: that does not end what is being saved.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, preemption_file: Path | None = None) -> None:
        self._noted = False
        self._file = preemption_file
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should end after the step at hand."""
        return self._noted or (self._file is not None and self._file.exists())

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; elsewhere a run cannot be signalled.
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._noted:
                raise KeyboardInterrupt
            os.write(_STDERR, _SAID)  # print must not be called from a signal's handler
        self._noted = True
