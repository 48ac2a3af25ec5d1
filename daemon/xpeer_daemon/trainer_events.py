"""Passes the trainer's events on to the parts of the node that need them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from xpeer.trainer.answers import error_of
from xpeer.trainer.client import (
    Crashed,
    Event,
    LookedAtText,
    Progressed,
    Saved,
    SaveFailed,
    Starting,
)
from xpeer_daemon.node import Node
from xpeer_daemon.windows import Windows

log = logging.getLogger("xpeer.daemon")


class TrainerEvents:
    """Callback for events of the trainer, on the event loop.

    Args:
        node: follows the trainer.
        windows: writes down each window.
        renew: has the trainer started anew soon.
    """

    def __init__(self, node: Node, windows: Windows, renew: Callable[[], object]) -> None:
        self._node = node
        self._windows = windows
        self._renew = renew

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        record = self._node.record
        if isinstance(event, Starting):
            record.starting = event
            return
        if isinstance(event, Progressed | Crashed):
            record.starting = None
        if isinstance(event, Progressed):
            self._node.follow_trainer(event.state, event.progress, event.privacy)
            if event.privacy is not None:
                self._windows.poll()
        elif isinstance(event, Saved):
            record.saved()
        elif isinstance(event, SaveFailed):
            record.health.failed("checkpoint-failing", event.problem)
        elif isinstance(event, LookedAtText):
            if event.problem:
                record.looked_at_text(event.problem)
            else:  # the condition stays until a new trainer has read the text
                log.info("the text can be read again: the trainer is started anew")
                self._renew()
        elif isinstance(event, Crashed):
            crash = error_of(event.failure)
            log.error("trainer: %s", crash)  # its trace is logged already
            record.crashed(crash)
