"""What reading one server-sent event costs: tunefork's reader against httpx.

    python benchmarks/event_stream.py [--events 2000] [--streams 16] [--rounds 5]

A process sends events as vLLM does, one a chunk, each with one token; the streams are read at the
same time in one event loop, and every event is parsed. The processor time of the reading process,
by event, is what a gateway pays for each token, and bounds what a load generator can measure.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.results import write
from tunefork.model.device import describe, pick_device
from tunefork.serve.event_stream import Address, post

_CHOICE = {"index": 0, "text": " fox", "logprobs": None, "finish_reason": None, "token_ids": [417]}
_EVENT = json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [_CHOICE]})
_BYTES = f"data: {_EVENT}\n\n".encode()
_CHUNK = f"{len(_BYTES):x}\r\n".encode() + _BYTES + b"\r\n"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _serve(events: int, told: Connection) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_HEAD)
        for _ in range(events):
            writer.write(_CHUNK)
            await writer.drain()
            await asyncio.sleep(0)  # other streams take turns, as tokens of a batch do
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        async with server:
            await server.serve_forever()

    asyncio.run(main())


async def _by_tunefork(port: int) -> int:
    count = 0
    async with post(Address("127.0.0.1", port), "/", b"{}", {}) as answer:
        async for event in answer.events():
            count += len(json.loads(event)["choices"])
    return count


async def _by_httpx(port: int) -> int:
    count = 0
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"http://127.0.0.1:{port}/", json={}) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                count += len(json.loads(line[5:])["choices"])
    return count


READERS: dict[str, Callable[[int], Awaitable[int]]] = {
    "tunefork": _by_tunefork,
    "httpx": _by_httpx,
}


def _measure(read: Callable[[int], Awaitable[int]], port: int, streams: int, events: int) -> float:
    async def all_of_them() -> None:
        counts = await asyncio.gather(*(read(port) for _ in range(streams)))
        assert counts == [events] * streams

    before = time.process_time()
    asyncio.run(all_of_them())
    return (time.process_time() - before) / (streams * events) * 1e6


def main() -> None:
    """Measure both in turns, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=2000, help="of each stream")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_serve, args=(options.events, theirs), daemon=True)
    server.start()
    port = ours.recv()
    times: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(options.rounds):
        for name, read in READERS.items():
            times[name].append(_measure(read, port, options.streams, options.events))
    server.terminate()
    rows = []
    for name, each in times.items():
        median = statistics.median(each)
        rows.append(
            {
                "case": f"{options.streams} streams, {options.events} events each",
                "tool": name,
                "ours": name == "tunefork",
                "cpu_us_per_event": round(median, 2),
                "spread": round(max(each) - min(each), 2),
            }
        )
        print(f"{name}: {median:.1f} us of processor time an event")
    device = describe(pick_device())
    print(write("event_stream", rows, device=f"{device['name']}, {device['threads']} threads"))


if __name__ == "__main__":
    main()
