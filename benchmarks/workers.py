"""A benchmark's cases in processes of their own: one that hangs or dies leaves the others' results.

A worker runs `SCRIPT VERB NAME...`, which imports what it needs, says so, waits for a line, and
prints one of JSON for each case.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

MOST_S = {"prepare": 150.0, "run": 100.0}
"""For one case."""
ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/planner_h200_cache",
    "TORCHINDUCTOR_COMPILE_THREADS": "2",
    "PYTHONHASHSEED": "0",  # for one graph to have one key in every process
}


class Worker:
    """A process that does cases one after the other, once it is told to go."""

    def __init__(self, script: str, verb: str, names: list[str]) -> None:
        self.script, self.verb, self.left = script, verb, list(names)
        self._start()

    def _start(self) -> None:
        command = [sys.executable, self.script, self.verb, *self.left]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        self.lines = _lines(self.process.stdout)

    def wait_until_ready(self) -> None:
        """Until it has imported what it needs, has ended, or takes longer than a case may."""
        with suppress(queue.Empty):
            if self.lines.get(timeout=MOST_S[self.verb]) is None:
                self.lines.put(None)  # for `finish` to tell

    def finish(self, deadline: float, tell: Any) -> bool:
        """Tell each case's row; False where time ran out. A case that ends its process, or hangs,
        is told as an error, and the rest go on in another process."""
        while self.left:
            with suppress(BrokenPipeError):  # it has ended, as its lines will tell
                print("go", file=self.process.stdin, flush=True)
            ended = self._read(deadline, tell)
            self.end()
            if ended is None:
                return False
            if self.left:
                tell({"case": self.left.pop(0), "error": f"{self.verb}: {ended}"})
            if self.left:
                self._start()
        self.end()
        return True

    def _read(self, deadline: float, tell: Any) -> str | None:
        """Rows until the process ends: how it ended, or None where time ran out."""
        while True:
            most = MOST_S[self.verb]
            try:
                line = self.lines.get(timeout=max(0.1, min(most, deadline - time.monotonic())))
            except queue.Empty:
                return None if time.monotonic() >= deadline else f"took longer than {most:g} s"
            if line is None:
                return f"its process ended with status {self.process.wait()}"
            if line.startswith("{"):
                row = json.loads(line)
                self.left.remove(row["case"])
                tell(row)

    def end(self) -> None:
        """Let nothing of it go on."""
        self.process.kill()
        self.process.wait()


def _lines(stream: Any) -> Any:
    """A queue of what comes; None behind the last."""
    found = queue.Queue[Any]()

    def read() -> None:
        for line in stream:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found
