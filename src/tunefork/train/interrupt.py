"""A signal, or a file that a scheduler makes, ends a run between two steps, its state saved.

Ctrl-C, SIGTERM (Kubernetes, `docker stop`, Slurm at its limit), SIGUSR1 (Slurm's
`--signal=USR1@60`) or the appearance of `train.preemption_file`.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

_TOLD = "stopping after this step; Ctrl-C again stops at once"


class Interrupt:
    """While entered, a signal is only noted (`requested`); a second Ctrl-C interrupts.

    A scheduler may send SIGTERM after SIGUSR1, or twice: that does not end what is being saved.
    `told` goes to standard error when a signal is noted.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, preemption_file: Path | None = None, told: str = _TOLD) -> None:
        self._noted = self._is_at_once = False
        self._file, self._told = preemption_file, told
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should end after the step at hand."""
        return self._noted or (self._file is not None and self._file.exists())

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, any signal interrupts: where nothing would be lost, and the wait be long."""
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; elsewhere a run cannot be signalled.
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._is_at_once or (self._noted and number == signal.SIGINT):
            self._noted = True
            raise KeyboardInterrupt
        if not self._noted:
            os.write(2, f"\n{self._told}\n".encode())  # a handler may come amidst another's print
        self._noted = True
