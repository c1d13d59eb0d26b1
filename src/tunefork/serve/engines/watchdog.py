"""Runs a command, and ends it with all that it started once the pipe on standard input closes.

That happens when the process that holds its other end stops it, and also when that was killed: the
kernel closes the pipe. vLLM starts processes of its own that live on when its first one is killed;
they become children of this one (PR_SET_CHILD_SUBREAPER, prctl(2)) and are found there.

Started by path, `python watchdog.py FOLDER COMMAND ...`; FOLDER is removed once the pipe closed: a
command that ended by itself leaves it, with its log, to who reads that. Needs nothing but the
standard library.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_SUBREAPER = 36
_GRACE_S = 10.0
"""Time to end by itself after SIGTERM."""


def main() -> int:
    """Until the command ended; its exit status."""
    folder, command = sys.argv[1], sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    closed = threading.Event()
    threading.Thread(target=_end_with_pipe, args=(child, closed), daemon=True).start()
    status = child.wait()
    end_descendants()
    if closed.is_set():
        shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


def _end_with_pipe(child: subprocess.Popen[bytes], closed: threading.Event) -> None:
    """Waits for the pipe to close; then the command is asked to end, and made to."""
    while os.read(0, 4096):
        pass
    closed.set()
    child.terminate()
    deadline = time.monotonic() + _GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()


def end_descendants() -> None:
    """Kill every process below this one, until there is none."""
    for _ in range(1000):
        children = _children()
        if not children:
            return
        for pid in children:
            _kill_tree(pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _kill_tree(pid: int) -> None:
    for below in _children(pid):
        _kill_tree(below)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _children(pid: int | str = "self") -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(one) for one in (task / "children").read_text().split()]
    return found


if __name__ == "__main__":
    sys.exit(main())
