"""One piece of a comparison in a process of its own, and how its parent starts it.

A process each, so that a peak of memory is one method's own, and so that one method's death (out of
memory, say) leaves the others' results standing. A child reads the comparison folder's recipe.yaml
and writes its results there; its progress goes to the terminal it shares with its parent. When it
fails it leaves `error.json`; when it leaves nothing, it was killed.

    python -m tunefork.compare.worker FOLDER base
    python -m tunefork.compare.worker FOLDER search METHOD
    python -m tunefork.compare.worker FOLDER train METHOD SEED LEARNING_RATE

Signals reach the child by way of its parent only, once each. A child whose parent is gone, however
it went, sees its standard input end, and ends too.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunefork.errors import BadInputError, TuneforkError, is_disk_full
from tunefork.recipe import Method
from tunefork.recipe_file import load
from tunefork.registry.run import RECIPE, write_atomically

ERROR = "error.json"
_CPU_MEMORY = "can't allocate memory"  # in the message of PyTorch's CPU allocator


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a piece failed."""

    message: str
    is_bad_input: bool = False


def seed_folder(folder: Path, method: Method, seed: int) -> Path:
    """Where the run of one method and seed lies in a comparison's folder."""
    return folder / str(method) / f"seed-{seed}"


def start(folder: Path, *task: str, lock: int | None = None) -> Failure | None:
    """Run one piece to its end; None if it succeeded. The piece holds `lock` too, while it lives.

    Raises KeyboardInterrupt where the piece was interrupted: the comparison ends too.
    """
    error_file = folder / ERROR
    error_file.unlink(missing_ok=True)
    with _child(folder, *task, lock=lock) as (process, was_asked_to_end):
        status = process.wait()
    if status == 0 and not was_asked_to_end.is_set():
        return None
    if status == _INTERRUPTED or was_asked_to_end.is_set():
        error_file.unlink(missing_ok=True)  # of libraries that make an error of Ctrl-C
        raise KeyboardInterrupt
    if status == _DISK_FULL:
        return Failure(_DISK_IS_FULL)
    if error_file.exists():
        error = json.loads(error_file.read_text(encoding="utf-8"))
        error_file.unlink()
        return Failure(error["message"], error["is_bad_input"])
    if status == -signal.SIGKILL:
        return Failure("killed (SIGKILL): the machine was probably out of memory")
    if status < 0:
        return Failure(f"killed by {signal.Signals(-status).name}")
    return Failure(f"its process ended with status {status} and no message")


_INTERRUPTED = 130
_DISK_FULL = 74  # EX_IOERR of sysexits.h: a full disk takes no error.json either
_DISK_IS_FULL = "the disk is full; free some space and run the same command again"

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, a scheduler's request, a terminal that was closed, a scheduler's early warning."""


@contextmanager
def _child(
    folder: Path, *task: str, lock: int | None
) -> Iterator[tuple[subprocess.Popen[bytes], threading.Event]]:
    """The piece's process, which the signals to this one are passed on to, and whether any was.

    Signals are blocked while it starts. The child inherits that and unblocks them once it can heed
    them, so that none is lost and none ends either process half way in with a traceback. Python
    handles signals in the main thread only; elsewhere they do what they did.
    """
    command = [sys.executable, "-m", "tunefork.compare.worker", str(folder), *task]
    asked = threading.Event()
    before = {}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        # A process group of its own: the terminal's Ctrl-C does not reach it beside ours.
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            process_group=0,
            pass_fds=() if lock is None else (lock,),
        ) as process:

            def pass_on(number: int, _frame: object) -> None:
                asked.set()
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

            if threading.current_thread() is threading.main_thread():
                before = {number: signal.signal(number, pass_on) for number in _heeded()}
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield process, asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def main(arguments: list[str]) -> int:
    """Run the piece that `arguments` name; returns the exit status."""
    folder, task = Path(arguments[0]), arguments[1:]
    try:
        _run(folder, task)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:  # reported to the parent, whatever it is, with its traceback kept
        if is_disk_full(error):
            return _DISK_FULL
        write_atomically(folder / ERROR, json.dumps(_describe(error)))
        if not isinstance(error, TuneforkError):
            (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    return 0


def _run(folder: Path, task: list[str]) -> None:
    from tunefork.compare.search import search
    from tunefork.trial.trial import run_trial

    recipe = load(folder / RECIPE)
    match task:
        case ["base"]:
            run_trial(recipe, None, folder / "base", seed=recipe.train.seed, learning_rate=None)
        case ["search", method]:
            search(recipe, Method(method), folder / method)
        case ["train", method, seed, learning_rate]:
            run_trial(
                recipe,
                Method(method),
                seed_folder(folder, Method(method), int(seed)),
                seed=int(seed),
                learning_rate=float(learning_rate),
                keep_interrupted=False,  # the next call goes on from its checkpoint
            )
        case _:
            raise ValueError(f"no such task: {task}")


def _describe(error: Exception) -> dict[str, str | bool]:
    import torch

    if isinstance(error, TuneforkError):
        return {"message": str(error), "is_bad_input": isinstance(error, BadInputError)}
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_MEMORY in str(error):
        message = f"out of memory: {error}; lower train.micro_batch_tokens, or set "
        message += "train.activation_checkpointing: full"
    else:
        message = f"{type(error).__name__}: {error} (traceback.txt in the run folder has more)"
    return {"message": message, "is_bad_input": False}


def _in_child(arguments: list[str]) -> int:
    """`main`, in a process that heeds signals and its parent's end from its first line to its last.

    Until PyTorch and transformers are loaded, which takes seconds, a signal ends the process at
    once: there is nothing to lose yet, and an exception would come up inside their imports, which
    make other errors of it.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    before = {number: signal.signal(number, _end_at_once) for number in _heeded()}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    import tunefork.compare.search
    import tunefork.trial.trial  # noqa: F401

    try:
        for number, handler in before.items():
            signal.signal(number, handler)
        return main(arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        for number in _ENDING:  # Python's own end has tracebacks too
            signal.signal(number, signal.SIG_IGN)


def _heeded() -> list[signal.Signals]:
    """All of `_ENDING` but those that whoever started us wants ignored (nohup)."""
    return [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]


def _end_at_once(_number: int, _frame: object) -> None:
    os._exit(_INTERRUPTED)


def _end_with_parent() -> None:
    """Wait for the end of standard input, whose other end the parent holds and never writes to.

    As Linux's PR_SET_PDEATHSIG, but on macOS too and whichever thread of the parent started us.
    """
    os.read(sys.stdin.fileno(), 1)
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(_in_child(sys.argv[1:]))
