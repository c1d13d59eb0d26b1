"""The vLLM server as a child: a loopback port, a key of its own, and an end with this process.

The key is given in the environment, where `ps` does not show it. The child runs under
`watchdog.py`, so that no process of it is left whatever happens to this one.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from tunefork.errors import BadInputError, EngineDeadError
from tunefork.home import home
from tunefork.model.load import Source
from tunefork.serve.engines.vllm_settings import VllmSettings
from tunefork.serve.event_stream import Address

SERVED_NAME = "base"
"""What the base is called inside. Ids of the store hold a colon, so that none is the same."""

_WATCHDOG = Path(__file__).with_name("watchdog.py")
_END_S = 20.0
"""The watchdog's grace, and more: after it, the child is killed outright."""
_DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Of this interpreter; the child's is another."""


def command(base: Source, settings: VllmSettings, port: int, more: int = 0) -> list[str]:
    """What starts the server, with room for `more` adapters than are served."""
    optional = {"--revision": base.revision, "--max-model-len": settings.max_model_len}
    return [
        *(str(settings.python), "-m", "vllm.entrypoints.cli.main", "serve", base.location),
        *("--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-lora", "--max-loras", str(settings.slots + more)),
        *("--max-cpu-loras", str(settings.host_adapters + more)),
        *("--max-lora-rank", str(settings.rank_step)),
        *("--max-num-seqs", str(settings.max_requests)),
        # a model's generation_config.json would change answers behind the gateway's back
        *("--generation-config", "vllm", "--disable-uvicorn-access-log"),
        *("--api-server-count", "1"),
        *(text for name, value in optional.items() if value for text in (name, str(value))),
        *settings.args,
    ]


def find_python(settings: VllmSettings) -> Path:
    """The interpreter with vLLM. Raises BadInputError where it cannot be run."""
    if settings.python is None or not os.access(settings.python, os.X_OK):
        raise BadInputError(
            f"vllm.python: {settings.python} cannot be run; give the interpreter of an "
            "environment that has vLLM, or vllm.url, where a server runs"
        )
    return settings.python


@dataclass(slots=True)
class Child:
    """One life of the server."""

    address: Address
    key: str
    folder: Path
    """Its adapters' files and, where no other file is named, its log; removed with the process."""
    log: Path
    process: Process

    @classmethod
    async def start(cls, base: Source, settings: VllmSettings, more: int) -> "Child":
        """Start the process; it is not ready yet. See `command`."""
        spool = settings.spool or home() / "vllm"
        spool.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(prefix="server-", dir=spool.absolute()))
        log, key, port = settings.log or folder / "log", secrets.token_urlsafe(32), _free_port()
        words = [sys.executable, "-I", str(_WATCHDOG), str(folder)]
        words += command(base, settings, port, more)
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=PIPE,
                stdout=output,
                stderr=output,
                env=_environment(key),
                start_new_session=True,  # Ctrl-C ends the gateway, which drains first
            )
        return cls(Address("127.0.0.1", port), key, folder, log, process)

    def ensure_running(self) -> None:
        """Raises EngineDeadError with the end of the log where the process has ended."""
        if why := self.why_ended():
            raise EngineDeadError(why)

    def why_ended(self) -> str:
        """Status and the end of the log; nothing while it runs."""
        if self.process.returncode is None:
            return ""
        return f"vLLM ended with status {self.process.returncode}. {self.log_tail()}"

    def log_tail(self, lines: int = 12) -> str:
        """The end of what the server said."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
                text = log.read().decode(errors="replace")
        except OSError:  # the watchdog removed it
            return "Set vllm.log to keep what it says."
        return "Its last words:\n" + "\n".join(text.splitlines()[-lines:])

    async def stop(self) -> None:
        """End it with all its processes and files; idempotent."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(_END_S):
                await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


def _environment(key: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _DROPPED} | {
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
