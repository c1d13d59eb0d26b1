"""`tunefork serve` as a program of its own, with a store of adapters, as users run it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.serve.servers import eventually
from tunefork.registry.store import Store

_MAIN = "from tunefork.cli.main import main; main()"


@dataclass(frozen=True)
class Program:
    """A server that answers."""

    process: "subprocess.Popen[bytes]"
    url: str
    home: Path
    keys: dict[str, str]
    """Tenant -> key; empty where none is demanded."""

    def http(self, tenant: str | None = None) -> httpx.Client:
        """A client with the tenant's key."""
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"} if tenant else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def below(self) -> list[psutil.Process]:
        """Every process that it started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def rss(self) -> int:
        """Bytes of memory that it holds."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def served(
    base: Path,
    folder: Path,
    *,
    adapters: dict[str, Path] | None = None,
    tenants: tuple[str, ...] = (),
    settings: dict[str, object] | None = None,
) -> Iterator[Program]:
    """`tunefork serve` over `base`, once it is ready. Each tenant sees `TENANT/*`."""
    environment = os.environ | {"TUNEFORK_HOME": str(folder / "home")}
    with Store.open(folder / "home") as store:
        for name, artefact in (adapters or {}).items():
            store.publish(artefact, name, tags=("prod",))
    keys = {}
    for tenant in tenants:
        words = ["serve", "keys", "add", tenant, "--models", f"{tenant}/*", "--operator"]
        made = subprocess.run(
            [sys.executable, "-c", _MAIN, *words], env=environment, check=True, capture_output=True
        )
        keys[tenant] = made.stdout.decode().split()[-1]
    sets = [f"--set={name}={json.dumps(value)}" for name, value in (settings or {}).items()]
    words = ["serve", "--base", str(base), "--port=0", *sets]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *words], env=environment, stderr=said
        )
    try:
        eventually(lambda: _address(folder, process), within_s=300)
        program = Program(process, _address(folder, process), folder / "home", keys)
        eventually(lambda: httpx.get(f"{program.url}/ready").status_code == 200, within_s=60)
        yield program
    finally:
        process.kill()
        process.wait()


def _address(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    said = (folder / "said").read_text()
    assert process.poll() is None, said
    return said.split(" at ")[-1].split("/v1")[0] if " at http://" in said else ""
