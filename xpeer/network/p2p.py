"""hivemind's P2P with a gate before every handler. It notices when its sidecar dies.

Faults of hivemind 1.1.12 that are closed here: its handlers parse bytes of strangers. A unary reply
over 4 MiB hangs the caller for ever; so does every call when the local sidecar dies. Errors of
handlers reach the caller in full. The sidecar's sockets lie in a public folder.

What stays open: a stranger can complete a handshake, and libp2p's own protocols (identify,
routing) send it addresses. A stream ends in the same way if its far end dies, has no room for it,
or closes it: the framing above has to tell these apart, and may try again. Only the timeouts of
calls notice a sidecar that hangs without dying.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerInfo, StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from xpeer.errors import Reason
from xpeer.identity import PeerId
from xpeer.network.membership.certificates import Scope
from xpeer.network.scratch import Scratch, sweep

log = logging.getLogger("xpeer.network")

# At import, hivemind sends its own lines past the usual log, and renames a level for all loggers.
use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")

MAX_REPLY_BYTES = 2 << 20
STARTUP_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
"""The sidecar is killed if it has not ended by itself after this long."""
MAX_OPENING = 32
"""Streams that we open at the same time. If it were several hundred, many would fail silently."""
MAX_STREAMS, STREAMS_PER_PEER = 256, 2
"""Incoming streams of a protocol at the same time, in all and from one peer. A partner may come
back before we notice (within 40 s) that its old stream broke, so it may need two."""
_OK, _NO = b"\x00", b"\x01"

CallHandler = Callable[[PeerId, bytes], Awaitable[bytes]]
StreamHandler = Callable[[PeerId, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Gate(Protocol):
    """Decides whether a peer may call us, before a byte of it is read."""

    def admits(self, peer_id: PeerId, scope: Scope | None) -> bool:
        """Whether this peer may call a handler of this scope; None = open to all, within limits."""

    async def introduce(self, peer_id: PeerId) -> bool:
        """Make sure that a peer knows who we are, before we call it.

        Returns:
            True: we introduced ourselves now. False: we did so earlier; if the peer does not know
            us, it has forgotten.
        """

    def rejected_by(self, peer_id: PeerId) -> None:
        """Note that a peer does not know us: we have to introduce ourselves again."""


class _Waiting(dict[Any, "asyncio.Future[Any]"]):
    """Calls that wait for an answer. A cancelled call counts as absent.

    hivemind would set a result on a cancelled future. The error would silently end the task that
    reads the sidecar's answers, and every later call would hang for ever.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)
        return future is not None and not future.done()


class _Handling(dict[Any, "asyncio.Task[None]"]):
    """Calls that we are answering. hivemind alone would keep those that the caller cancelled."""

    def __setitem__(self, call_id: Any, task: asyncio.Task[None]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


class GatedP2P(P2P):
    """One sidecar process. Start it with `launch`.

    Attributes:
        gate: decides who may call us.
        died: set once the sidecar has ended, for whatever reason.
    """

    DHT_MODE_MAPPING: Final[dict[str, dict[str, int]]] = {"none": {}}
    """libp2p's own Kademlia stays off. Strangers could ask it for members' addresses. And at every
    call to a peer that is gone it asked all others (60 kB per minute for each of 32 peers)."""
    gate: Gate
    died: asyncio.Event
    _scratch: Scratch
    _watcher: asyncio.Task[None]
    _opening: asyncio.Semaphore
    _serving: set[asyncio.Task[Any]]

    @classmethod
    async def launch(
        cls,
        *,
        gate: Gate,
        identity_path: Path,
        listen: list[str],
        announce: list[str],
        nat_port_map: bool,
    ) -> GatedP2P:
        """Start the sidecar with this identity. No peer needs to be reachable.

        Raises:
            P2PDaemonError: the sidecar did not start.
        """
        sweep()
        scratch = Scratch.make()  # 0700: only we control the sidecar
        kind: Any = type("Sidecar", (cls,), {"_UNIX_SOCKET_PREFIX": f"/unix{scratch.path}/"})
        try:
            self: GatedP2P = await kind.create(
                identity_path=str(identity_path),
                check_if_identity_free=False,
                host_maddrs=listen,
                announce_maddrs=announce or None,
                nat_port_map=nat_port_map,
                dht_mode="none",
                auto_nat=False,
                use_relay=False,
                startup_timeout=STARTUP_TIMEOUT_S,
            )
        except BaseException:
            scratch.close()
            raise
        self.gate = gate
        self.died = asyncio.Event()
        self._opening = asyncio.Semaphore(MAX_OPENING)
        self._serving = set()
        self._scratch = scratch
        control = self._client.control
        control._pending_calls, control._handler_tasks = _Waiting(), _Handling()
        for task in (control._read_task, control._write_task):
            task.add_done_callback(self._channel_ended)
        self._watcher = asyncio.create_task(self._watch())
        return self

    def _channel_ended(self, task: asyncio.Task[None]) -> None:
        """Kill a sidecar whose channel broke: it is useless then, and has to be restarted."""
        if task.cancelled() or self.died.is_set():
            return
        if (error := task.exception()) is not None:
            log.error("the channel to the sidecar broke: %r", error)
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()

    async def shutdown(self) -> None:
        """End the sidecar and remove its sockets."""
        control = self._client.control
        serving = self._serving - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        self._terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._child.wait()
        except TimeoutError:  # it hangs, or was stopped
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()
        # hivemind does not await its two tasks, and Python would warn when it collects them.
        await asyncio.gather(
            self._watcher, control._read_task, control._write_task, return_exceptions=True
        )
        self._child._transport.close()
        self._scratch.close()

    async def _watch(self) -> None:
        code = await self._child.wait()
        self._alive = False
        self.died.set()
        for future in list(self._client.control._pending_calls.values()):
            if not future.done():
                future.set_exception(P2PDaemonError(f"the sidecar exited with {code}"))

    # Incoming

    async def add_binary_stream_handler(
        self, name: str, handler: Any, balanced: bool = False
    ) -> None:
        """Refuse: hivemind would register a handler here that has no gate."""
        raise PermissionError(f"{name}: stream handlers need a scope; use serve_stream")

    async def serve_stream(self, name: str, handler: StreamHandler, scope: Scope) -> None:
        """Register a raw stream handler behind the gate."""
        open_now: Counter[PeerId] = Counter()

        async def gated(
            info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            peer_id = PeerId(info.peer_id.to_base58())
            task = asyncio.current_task()
            if task is not None:  # asyncio forgets it once its transport is closed
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)
            try:
                if not self.gate.admits(peer_id, scope):
                    return
                if open_now[peer_id] >= STREAMS_PER_PEER or open_now.total() >= MAX_STREAMS:
                    log.debug("%s: too many streams; one of %s is refused", name, peer_id[-8:])
                    return
                open_now[peer_id] += 1
                try:
                    await handler(peer_id, reader, writer)
                finally:
                    open_now[peer_id] -= 1
                    if not open_now[peer_id]:
                        del open_now[peer_id]
            except asyncio.CancelledError:
                log.debug("%s: a stream of %s ended with us", name, peer_id[-8:])
            finally:
                writer.close()

        if self._listen_task is None:
            self._start_listening()
        control = self._client.control
        control.handlers[name] = gated
        where = control.listen_maddr.to_bytes()
        await self._ask(
            type=p2pd_pb2.Request.STREAM_HANDLER,
            streamHandler=p2pd_pb2.StreamHandlerRequest(addr=where, proto=[name], balanced=False),
        )

    async def serve_call(
        self, name: str, handler: CallHandler, scope: Scope | None, max_request: int
    ) -> None:
        """Register a bounded request-reply handler behind the gate. No caller sees its errors."""

        async def gated(request: bytes, remote: PeerID) -> bytes:
            peer_id = PeerId(remote.to_base58())
            if not self.gate.admits(peer_id, scope):
                return _NO + Reason.NOT_A_MEMBER.encode()
            if len(request) > max_request:
                return _NO + Reason.OVERSIZE.encode()
            try:
                reply = await handler(peer_id, request)
            except Exception:  # a bug of ours: log it, and say nothing of it to the caller
                log.exception("%s: a call of %s failed", name, peer_id[-8:])
                return _NO + Reason.REFUSED.encode()
            if len(reply) > MAX_REPLY_BYTES:
                log.error("%s: a reply of %d bytes was not sent", name, len(reply))
                return _NO + Reason.OVERSIZE.encode()
            return _OK + reply

        await self._client.add_unary_handler(name, gated)

    async def _add_protobuf_unary_handler(
        self, handle_name: str, handler: Any, input_protobuf_type: Any, balanced: bool = False
    ) -> None:
        """Register a handler of hivemind's DHT behind the gate."""

        async def gated(request: bytes, remote: PeerID) -> bytes:
            if not self.gate.admits(PeerId(remote.to_base58()), "dht"):
                raise PermissionError(Reason.NOT_A_MEMBER)
            context = P2PContext(handle_name, self.peer_id, remote)
            try:
                response = await handler(input_protobuf_type.FromString(request), context)
                data: bytes = response.SerializeToString()
            except Exception:  # hivemind's asserts and decoders fail on a caller's bad bytes
                log.debug("%s: a bad request of %s", handle_name, remote, exc_info=True)
                raise ValueError(Reason.MALFORMED) from None
            if len(data) > MAX_REPLY_BYTES:
                raise ValueError(Reason.OVERSIZE)
            return data

        await self._client.add_unary_handler(handle_name, gated, balanced=balanced)

    # Outgoing

    async def call(self, peer: PeerID, name: str, request: bytes) -> tuple[bool, bytes]:
        """Call one of our own protocols at a peer.

        Returns:
            (True, the reply), or (False, the reason code).
        """
        self._require_sidecar()
        reply: bytes = await self._client.call_unary_handler(peer, name, request)
        return reply[:1] == _OK, reply[1:]

    async def open_stream(
        self, peer: PeerID, name: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a raw stream to a peer's handler."""
        async with self._opening:
            self._require_sidecar()
            reader, writer, _ = await self._request(
                type=p2pd_pb2.Request.STREAM_OPEN,
                streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer.to_bytes(), proto=[name]),
            )
        return reader, writer

    async def dial(self, peer: PeerID, maddrs: list[Multiaddr]) -> None:
        """Make the sidecar connect to a peer."""
        await self._ask(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(
                peer=peer.to_bytes(), addrs=[maddr.to_bytes() for maddr in maddrs]
            ),
        )

    async def list_peers(self) -> list[PeerInfo]:
        """The peers that the sidecar is connected to."""
        answer = await self._ask(type=p2pd_pb2.Request.LIST_PEERS)
        return [PeerInfo.from_protobuf(peer) for peer in answer.peers]

    async def _ask(self, **request: Any) -> Any:
        """Send one request to the sidecar on a new connection; returns its `p2pd_pb2.Response`."""
        _, writer, answer = await self._request(**request)
        writer.transport.abort()
        return answer

    async def _request(
        self, **request: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Any]:
        """As `_ask`, and keep the connection open for the caller.

        hivemind's own functions leak it if they fail or are cancelled.

        Raises:
            ControlFailure: the sidecar refuses.
            asyncio.IncompleteReadError, OSError: the sidecar is gone.
        """
        reader, writer = await self._client.control.daemon_connector.open_connection()
        try:
            await write_pbmsg(writer, p2pd_pb2.Request(**request))
            answer = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, answer)
            raise_if_failed(answer)
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer, answer

    async def _call_unary_protobuf_handler(
        self, peer_id: PeerID, handle_name: str, input: Any, output_protobuf_type: Any
    ) -> Any:
        """Make a call of hivemind's DHT, after an introduction."""
        self._require_sidecar()
        name = PeerId(peer_id.to_base58())
        just_now = await self.gate.introduce(name)
        ask = super()._call_unary_protobuf_handler
        try:
            return await ask(peer_id, handle_name, input, output_protobuf_type)
        except P2PHandlerError as e:
            if just_now or Reason.NOT_A_MEMBER not in str(e):
                raise
        self.gate.rejected_by(name)  # the peer was restarted, and has forgotten us
        await self.gate.introduce(name)
        return await ask(peer_id, handle_name, input, output_protobuf_type)

    def _require_sidecar(self) -> None:
        if self.died.is_set():
            raise P2PDaemonError("the sidecar is down")
