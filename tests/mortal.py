"""Processes that a test kills wherever it likes.

They are forked from a server that has no threads. A test's own process has some (torch's, those of
event loops), and a copy of it that is made while one of them holds a lock waits for that for ever.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

_IMPORTED = ("tests.unit.accounts.test_restored_register", "tests.unit.trainer.test_killed")
"""Once, by the server: what takes seconds to import."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_IMPORTED))


def exit_code(run: Callable[..., None], *arguments: Any) -> int:
    """Call a function of a module in such a process; its exit code, or minus its signal."""
    process = _context.Process(target=_called, args=(dict(os.environ), run, arguments))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _called(
    environment: Mapping[str, str], run: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    run(*arguments)
