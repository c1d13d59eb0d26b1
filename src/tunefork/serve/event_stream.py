"""One POST whose answer is a stream of server-sent events, read with little work an event.

A gateway in front of vLLM reads one event a token of every open answer in the event loop that
serves the clients, and a load generator must be lighter than what it loads. httpx takes four times
the processor time for an event, 25 us where this takes 6 (`benchmarks/event_stream.py`). It knows
HTTP/1.1 only as far as such answers need: one request a connection, a body that is chunked, counted
or ends with the connection.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LINE_BYTES = 1 << 20
"""Longest line that is read: a chunk's size, a header, or one event."""


class StreamBrokenError(Exception):
    """The connection ended, or could not be made, before the answer was whole."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    path: str = ""
    """Before each path that is asked for, without a slash at its end."""
    secure: bool = False

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises ValueError where `url` is none of http or https."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// address")
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        return cls(parts.hostname, port, parts.path.rstrip("/"), secure)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.path}"


@dataclass(slots=True)
class Answer:
    """The head of an answer, and its body while it comes."""

    status: int
    headers: Mapping[str, str]
    """Names in small letters."""
    _reader: asyncio.StreamReader = field(repr=False)

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises StreamBrokenError where it ends early."""
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
            elif (length := self.headers.get("content-length")) is not None:
                yield await self._reader.readexactly(int(length))
            else:
                while part := await self._reader.read(1 << 16):
                    yield part
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise StreamBrokenError(f"the answer ended early: {_why(error)}") from error
        except ValueError as error:
            raise StreamBrokenError("the answer is no HTTP/1.1") from error

    async def body(self, limit: int = 1 << 20) -> bytes:
        """All of it, up to `limit` bytes."""
        whole = b""
        async for part in self.parts():
            whole += part
            if len(whole) >= limit:
                break
        return whole[:limit]

    async def events(self) -> AsyncIterator[bytes]:
        """What stands after `data:` in each event; comments and other fields are passed over."""
        rest = b""
        async for part in self.parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()


@asynccontextmanager
async def post(
    address: Address, path: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = 600
) -> AsyncIterator[Answer]:
    """Send `body` as JSON; leaving the block drops the connection at once, whatever is unread.

    `timeout_s` bounds the time until the head of the answer is there. Raises StreamBrokenError.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(
                address.host,
                address.port,
                ssl=ssl.create_default_context() if address.secure else None,
                limit=_LINE_BYTES,
            )
    except (OSError, TimeoutError) as error:
        raise StreamBrokenError(f"{address} does not answer: {_why(error)}") from error
    try:
        yield await _ask(reader, writer, address, path, body, headers, timeout_s)
    finally:
        writer.transport.abort()


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    address: Address,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    timeout_s: float,
) -> Answer:
    lines = [
        f"POST {address.path}{path} HTTP/1.1",
        f"Host: {address.host}:{address.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    try:
        async with asyncio.timeout(timeout_s):
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        named = [line.split(":", 1) for line in rest if ":" in line]
        status = int(first.split(" ")[1])
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise StreamBrokenError(f"{address} gave no answer: {_why(error)}") from error
    except (ValueError, IndexError, asyncio.LimitOverrunError) as error:
        raise StreamBrokenError(f"{address} gave no HTTP/1.1 answer") from error
    return Answer(status, {name.lower(): value.strip() for name, value in named}, reader)


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
