"""All ways in which data leaves a node, besides fields of structures.

These are protocols, frames, routes, events, log lines, files, and the output of commands. Fields of
structures are declared at the fields: see `leaves`.

The tables filter nothing. `tests/unit/test_surfaces.py` compares them with the code, and fails for
anything that is missing on either side.
"""

from __future__ import annotations

from typing import Final

PROTOCOLS: Final[dict[str, str]] = {
    "xpeer/exchange/1": "exchange: wire.messages in a sealed session, and payloads",
    "xpeer/state/2": "a joiner's parameters: wire.messages in a sealed session, hashes, and pieces",
    "xpeer/roster/1": "spreading: cards and beats, sealed with the swarm key",
    "xpeer/present/1": "present: credentials and addresses",
    "xpeer/about/1": "about: name and step",
    "xpeer/admit/1": "joining: manifest and swarm key, sealed to the joiner",
    "xpeer/nudge/1": "nothing but that it came: timing",
}
"""Every libp2p protocol that a member serves, except the DHT's (`dht.SignedValue`)."""

FRAMES: Final = ("MESSAGE", "BULK", "END", "ELSEWHERE")
"""Kinds of frames of a session. Kinds and lengths are public: the network shows them."""

EVENTS: Final = (
    "trainer-restarted",
    "donor-refused",
    "took-over",
    "caught-up",
    "not-caught-up",
    "no-longer-ahead",
    "began-anew",
    "finished",
    "ledger-went-back",
    "ledger-caught-up",
)
"""Kinds of events in state.sqlite."""

TRAINER_LOGS: Final[dict[str, tuple[str, ...]]] = {
    "xpeer.trainer.child": ("%s", "%s", "%s", "%s"),
    "xpeer.accounts.register_file": ("%s",),
    "xpeer.trainer.channel": ("%s", "%s"),
    "xpeer.trainer.client": ("parameters replaced at step %d: public loss %.4f -> %.4f",),
    "xpeer.privacy.fitting": ("out of memory: going on with %s",),
    "xpeer.training.loop": ("charged steps were not used up: %s",),
    "xpeer.trainer.main": ("the trainer's receiver failed",),
    "xpeer.training.measuring": ("the loss can't be measured: %s",),
    "xpeer.trainer.saving": ("no checkpoint was written: %s",),
    "xpeer.training.room": (
        "lists of files and documents are kept in memory, since %s has no room for them: %s",
    ),
    "xpeer.training.token_cache": ("tokens are made again: %s: %s",),
    "xpeer.trainer.server": ("%s failed: %s",),
    "xpeer.trainer.threads": ("a helper of the trainer failed",),
    "xpeer.trainer.worker": (
        "saved step %d before the trainer ends",
        "the steps since the last checkpoint could not be saved",
    ),
    "xpeer.wire.kernels": ("codec kernels are not compiled, so the codec is slower: %s: %s",),
}
"""Log lines of the trainer process and its client. They are local, and never hold a loss, a count
or a text of records."""

EXPORTED: Final = ("config.json", "generation_config.json", "model.safetensors")
"""Files of `xpeer checkpoint export`: released parameters and the manifest's config. Files of the
tokenizer, of the source and of `model_card.FILES` come on top."""

COMMANDS: Final[dict[str, str]] = {
    "init": "new home", "plan": "its arguments",
    "estimate": "Estimate", "id": "PeerID", "invite": "Token, Issued",
    "bootstrap": "addresses", "start": "the log",
    "checkpoint": "Bundle, EXPORTED", "finetune": "OwnModel", "logs": "Entry", "events": "History",
    "demo": "Status, of text on this machine", "completion": "nothing", "version": "versions",
    "generate": "text of the model that is named", "eval": "a loss of the text that is named",
    "data": "Inspection",
    "privacy": "Account, FileAccount, Verdict, Plan, Charge",
}  # fmt: skip
"""Output of each command, for the operator: the structures that it prints or writes. Those that ask
the daemon print its answers (`control.ROUTES`)."""
