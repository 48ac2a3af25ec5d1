"""Declares the text's documents to the ledger and the machine's register, and reports on them."""

from __future__ import annotations

import msgspec

from xpeer.accounts.bound import open_register
from xpeer.accounts.budget import delta_of
from xpeer.accounts.chain import ChargeContext
from xpeer.accounts.histories import DeclaredDocuments
from xpeer.accounts.ledger import Ledger
from xpeer.config import privacy_register
from xpeer.manifest import Manifest
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.text import Text


def declare_documents(
    ledger: Ledger, setup: TrainerSetup, manifest: Manifest, text: Text, *, own: bool = False
) -> DeclaredDocuments:
    """Declare the documents, so that the whole machine counts their charges.

    Args:
        ledger: of the home.
        setup: names register and swarm.
        manifest: of the swarm.
        text: what is trained on.
        own: whether the charges are for own steps.
    """
    register = open_register(ledger, privacy_register(setup.config))
    about = msgspec.structs.replace(_context_of(manifest, setup.swarm_id, text), own=own)
    return ledger.declare_documents(register, text.documents, about)


def notes_of(declared: DeclaredDocuments, ledger: Ledger) -> list[str]:
    """Lines for the operator about the documents' accounts."""
    notes = []
    if declared.elsewhere:
        notes.append(
            f"privacy: {declared.elsewhere} of {declared.documents} documents were trained on by "
            "other homes of this machine; their account goes on"
        )
    if declared.new and ledger.counter:
        notes.append(
            f"privacy: {declared.new} of {declared.documents} documents are new to this machine "
            "and begin with a whole budget; text that was merely altered counts as new, too"
        )
    return notes


def warnings_of(declared: DeclaredDocuments) -> list[str]:
    """Warn of charges that the ledger or the register had lost."""
    warnings = []
    if declared.recovered_steps:
        warnings.append(
            f"privacy: the machine's register lacked {declared.recovered_steps} steps of this "
            "home's ledger; they count for all documents that this home has or will have"
        )
    elif declared.unknown_steps:
        warnings.append(
            f"privacy: {declared.unknown_steps} steps of this home's ledger were once lost to the "
            "machine's register; they count for all of its documents, new ones included"
        )
    return warnings + warnings_of_lost(declared.steps_behind)


def warnings_of_lost(steps: int) -> list[str]:
    """Warn of steps that only the register held."""
    if not steps:
        return []
    return [
        f"privacy: this home's ledger lacked {steps} steps that the machine's register holds (an "
        "older copy was restored, or the node died while charging); they are charged to it again"
    ]


def _context_of(manifest: Manifest, swarm_id: str, text: Text) -> ChargeContext:
    """The context that the ledger notes beside each charge."""
    rules, length = manifest.privacy, manifest.optimiser.sequence_tokens
    context = ChargeContext(swarm_id, rules.mode, rules.clip_norm, 0.0, rules.epsilon)
    if rules.unit == "document":
        delta = delta_of(manifest, text.num_owners)
        return msgspec.structs.replace(context, delta=delta, unit="document")
    tokens = manifest.tokenizer.digest[:16] or manifest.tokenizer.kind
    return msgspec.structs.replace(
        context, delta=delta_of(manifest, len(text.records)), cut=f"{length} {tokens} tokens"
    )
