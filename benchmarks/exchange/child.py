"""The child's end: requests in, answers out, one line of JSON each."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import uvloop

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Requests:
    """Standard input as a stream of requests; standard output is kept for the answers alone."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """For a child without an event loop."""
        return map(json.loads, sys.stdin)

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Until the input ends."""
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            yield json.loads(line)

    def answer(self, **answer: Any) -> None:
        """To the last request."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    async def serve(self, handle: Handler) -> None:
        """Answer all requests; an error is an answer."""
        async for request in self:
            try:
                self.answer(**await handle(request))
            except Exception as e:  # noqa: BLE001 - told to the parent, which ends us
                traceback.print_exc()
                self.answer(error=repr(e))


def run(main: Callable[[Requests], Coroutine[Any, Any, None]]) -> None:
    """A child's whole life, on uvloop as in production."""
    uvloop.run(main(Requests()))
