"""The documents that a home charges for, as its ledger and the machine's register need them; and
what the operator should know of their accounts.
"""

from __future__ import annotations

import msgspec

from xpeer.accounts.budget import delta_of
from xpeer.accounts.chain import ChargeContext
from xpeer.accounts.histories import DeclaredDocuments
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.config import privacy_register
from xpeer.manifest import Manifest
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.text import Text


def declare_documents(
    ledger: Ledger, setup: TrainerSetup, manifest: Manifest, text: Text
) -> DeclaredDocuments:
    """Have charges counted for these documents on the whole machine."""
    register = Register.open(privacy_register(setup.config))
    return ledger.declare_documents(
        register, text.documents, _context_of(manifest, setup.swarm_id, text)
    )


def notes_of(joined: DeclaredDocuments, ledger: Ledger) -> list[str]:
    """What the operator should know of the documents' accounts."""
    notes = []
    if joined.elsewhere:
        notes.append(
            f"privacy: {joined.elsewhere} of {joined.documents} documents were trained on by "
            "other homes of this machine; their account goes on"
        )
    if joined.new and ledger.counter:
        notes.append(
            f"privacy: {joined.new} of {joined.documents} documents are new to this machine and "
            "begin with a whole budget; text that was merely altered counts as new, too"
        )
    return notes


def warnings_of(joined: DeclaredDocuments) -> list[str]:
    """Which files were lost or restored."""
    warnings = []
    if joined.recovered_steps:
        warnings.append(
            f"privacy: the machine's register lacked {joined.recovered_steps} steps of this "
            "home's ledger; they count for all documents that this home has or will have"
        )
    elif joined.unknown_steps:
        warnings.append(
            f"privacy: {joined.unknown_steps} steps of this home's ledger were once lost to the "
            "machine's register; they count for all of its documents, new ones included"
        )
    return warnings + warnings_of_lost(joined.steps_behind)


def warnings_of_lost(steps: int) -> list[str]:
    """Whether the ledger is an older copy: steps that only the register still held."""
    if not steps:
        return []
    return [
        f"privacy: this home's ledger lacked {steps} steps that the machine's register holds (an "
        "older copy was restored, or the node died while charging); they are charged to it again"
    ]


def _context_of(manifest: Manifest, swarm_id: str, text: Text) -> ChargeContext:
    """What the ledger notes beside each charge."""
    rules, length = manifest.privacy, manifest.optimiser.sequence_tokens
    about = ChargeContext(swarm_id, rules.mode, rules.clip_norm, 0.0, rules.epsilon)
    if rules.unit == "document":
        delta = delta_of(manifest, len(set(text.owners.tolist())))
        return msgspec.structs.replace(about, delta=delta, unit="document")
    tokens = manifest.tokenizer.digest[:16] or manifest.tokenizer.kind
    return msgspec.structs.replace(
        about, delta=delta_of(manifest, len(text.records)), cut=f"{length} {tokens} tokens"
    )
