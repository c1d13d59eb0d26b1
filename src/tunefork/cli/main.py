"""`tunefork`: how the program begins, and how an error ends it.

Exit status: 0 done, 1 a run failed, 2 bad input, 130 interrupted. Tracebacks are shown only with
--debug. The verbs are put together in `cli/app.py`, which is imported inside `main`: a Ctrl-C ends
the program alike whenever it comes.
"""

import atexit
import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line and exit."""
    # Before PyTorch is imported, and inherited by a comparison's processes. Segments that can grow
    # fragment less: a GPU holds little more than the tensors it is given, which can be planned.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which would lose to ours
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Python's end looks through all objects for garbage: a second, after PyTorch's imports.
    atexit.register(gc.freeze)
    ctrl_c = _CtrlC()
    try:
        from tunefork.cli.app import app

        app()
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _end_interrupted()
        raise
    except Exception as error:  # the last stop: whatever it is, say it and set the exit status
        if ctrl_c.came:
            _end_interrupted()
        _end_with(error)


class _CtrlC:
    """Remembers that Ctrl-C came, beside raising KeyboardInterrupt as Python does.

    Where that hits an import, libraries make errors of their own of it, or none: numpy's C code
    loses the exception, and what fails is an import later on.
    """

    def __init__(self) -> None:
        self.came = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored: nohup, &
            signal.signal(signal.SIGINT, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self.came = True
        raise KeyboardInterrupt


_INTERRUPTED = 130
"""What typer makes of Ctrl-C, and `tunefork train` of a run that it stopped."""

_RESUMABLE = frozenset({"train", "compare", "sweep", "train-many"})
_KEEPS_NOTHING = frozenset({"advise", "serve", "chat", "bench-serve"})


def _end_interrupted() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own end has tracebacks too
    verb, kept = set(sys.argv[1:3]), "; what was finished is kept"
    if verb & _RESUMABLE:
        kept = "; the same command goes on from there"
    elif verb & _KEEPS_NOTHING:
        kept = ""
    print(f"stopped{kept}", file=sys.stderr)
    sys.exit(_INTERRUPTED)


def _end_with(error: Exception) -> None:
    from tunefork.errors import TuneforkError

    if "--debug" in sys.argv[1:2]:
        import traceback

        traceback.print_exception(error)
    print(f"error: {_describe(error)}", file=sys.stderr)
    sys.exit(error.exit_status if isinstance(error, TuneforkError) else 1)


def _describe(error: Exception) -> str:
    from tunefork.errors import TuneforkError, is_disk_full

    if isinstance(error, TuneforkError):
        return str(error)
    if is_disk_full(error):
        return f"the disk is full ({error}); free some space and run the same command again"
    return (
        f"{type(error).__name__}: {error}\n"
        "This is a fault of tunefork or of a library; `tunefork --debug ...` shows where."
    )
