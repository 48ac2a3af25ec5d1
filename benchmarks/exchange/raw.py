"""The links themselves: one p2pd stream or one TCP connection, unsealed, received and counted.

Each is moved in two ways: as asyncio programs do it (`streams`: 256 KiB at a time, drained), and
with the blocking reads and writes in a thread that our own links use (`threads`).
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from benchmarks.exchange.child import Requests, run
from xpeer.network.stream import Stream

PART_BYTES = 256 << 10
TIMEOUT_S = 300.0
NAME = "benchmark-raw"


async def send(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, num_bytes: int, how: str
) -> float:
    """Send, and wait for the receiver's byte; seconds."""
    payload = memoryview(os.urandom(1 << 20) * (num_bytes >> 20))
    header = num_bytes.to_bytes(8, "big") + how.encode().ljust(8)
    start = time.perf_counter()
    if how == "streams":
        writer.write(header)
        for offset in range(0, num_bytes, PART_BYTES):
            writer.write(payload[offset : offset + PART_BYTES])
            await writer.drain()
        await reader.readexactly(1)
        writer.close()
    else:
        stream = await Stream.adopt(reader, writer)
        await stream.write(header)
        await stream.in_thread(lambda: stream.send(payload, TIMEOUT_S))
        await stream.read(1)
        stream.shutdown()
    return time.perf_counter() - start


async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The other end."""
    num_bytes = int.from_bytes(await reader.readexactly(8), "big")
    if (await reader.readexactly(8)).strip() == b"streams":
        for _ in range(num_bytes // PART_BYTES):
            await reader.readexactly(PART_BYTES)
        writer.write(b"!")
        await writer.drain()
        await reader.read(1)
        writer.close()
        return
    stream = await Stream.adopt(reader, writer)
    part = memoryview(bytearray(PART_BYTES))

    def drain() -> None:
        for _ in range(num_bytes // PART_BYTES):
            stream.fill(part, TIMEOUT_S)

    await stream.in_thread(drain)
    await stream.write(b"!")
    stream.shutdown()


async def main(requests: Requests) -> None:
    """Start, and do what the parent says."""
    address = (await anext(aiter(requests)))["address"]
    p2p = await P2P.create(
        host_maddrs=[f"/ip4/{address}/tcp/0"],
        use_relay=False,
        auto_nat=False,
        nat_port_map=False,
    )

    async def heard(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await receive(reader, writer)

    await p2p.add_binary_stream_handler(NAME, heard)
    server = await asyncio.start_server(receive, address, 0, limit=2 * PART_BYTES)
    port = server.sockets[0].getsockname()[1]
    maddrs = [str(a) for a in await p2p.get_visible_maddrs()]
    requests.answer(peer_id=p2p.peer_id.to_base58(), maddrs=maddrs, host=address, port=port)

    async def handle(request: dict[str, Any]) -> dict[str, Any]:
        to, how = request["to"], request["how"]
        peer = PeerID.from_base58(to["peer_id"])
        if request["link"] == "p2pd":
            plain = [Multiaddr(a.rpartition("/p2p/")[0]) for a in to["maddrs"]]
            await p2p._client.connect(peer, plain)
            _, reader, writer = await p2p.call_binary_stream_handler(peer, NAME)
        else:
            reader, writer = await asyncio.open_connection(to["host"], to["port"])
        return {"seconds": await send(reader, writer, request["num_bytes"], how)}

    try:
        await requests.serve(handle)
    finally:
        server.close()
        await p2p.shutdown()


if __name__ == "__main__":
    run(main)
