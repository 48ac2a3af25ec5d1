"""What an exported model says of the privacy of the text behind it, for people and programs."""

from __future__ import annotations

import math

import msgspec
from msgspec import Struct

from xpeer import __version__
from xpeer.accounts import accountant, report
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import LocalError
from xpeer.leaves import Public, Timing, seen_by
from xpeer.manifest import Manifest
from xpeer.policies import privacy_policy

FILES = ("README.md", "privacy.json")


_GRID = 0.5
"""Of the epsilon that is told."""


@seen_by(
    "export",
    "no sigma, no q, no size; epsilon and delta are rounded up to a coarse grid",
)
class PrivacyCard(Struct, frozen=True, kw_only=True):
    """Of one export. Anybody may read it, so what would tell the shard's size is not in it: noise
    and sampling are left out, epsilon and delta are rounded up, coarsely.
    """

    swarm_id: Public[str]
    swarm_name: Public[str]
    step: Timing[int]
    xpeer: Public[str] = __version__
    mode: Public[str]
    """privacy.mode of the manifest."""
    unit: Public[str | None] = None
    """What epsilon holds for; None without privacy."""
    epsilon_target: Public[float | None] = None
    """No member's text is trained on beyond it."""
    epsilon_spent: Timing[float | None] = None
    """By the node that exported, on any of its units, at most: a multiple of 0.5, or the target."""
    delta: Timing[float | None] = None
    """For which both epsilons hold at that node: a power of ten, unless the manifest sets it. Each
    member's follows from its own text.
    """


def card_of(
    manifest: Manifest,
    swarm_id: str,
    step: int,
    ledger: Ledger | None,
    register: Register | None = None,
) -> PrivacyCard:
    """Of an export of now; takes a second.

    Args:
        manifest: of the swarm.
        swarm_id: its fingerprint.
        step: of the checkpoint.
        ledger: None = this node has trained on no text.
        register: of the machine, which knows what a restored ledger has forgotten.
    """
    rules = manifest.privacy
    if not rules.policy.charges:
        return PrivacyCard(swarm_id=swarm_id, swarm_name=manifest.name, step=step, mode=rules.mode)
    together = AccountView(ledger, register) if ledger else None
    charged = together.own() if together and together.charged else []
    if ledger and charged and not ledger.counter:
        raise LocalError(f"privacy ledger {ledger.path} has lost all charges", report.START)
    noted = report.about(ledger)[0] if ledger and charged else None
    # (epsilon, delta) holds for every larger epsilon and delta, too
    delta = noted and (rules.delta or 10.0 ** math.ceil(math.log10(noted)))
    spent = accountant.epsilon_worst(charged, min(noted, delta)) if noted and delta else 0.0
    told = math.ceil(spent / _GRID) * _GRID
    return PrivacyCard(
        swarm_id=swarm_id,
        swarm_name=manifest.name,
        step=step,
        mode=rules.mode,
        unit=rules.unit,
        epsilon_target=rules.epsilon,
        epsilon_spent=told if spent > rules.epsilon else min(told, rules.epsilon),
        delta=delta,
    )


def files(card: PrivacyCard) -> dict[str, bytes]:
    """By name, in the order of `FILES`."""
    machine = msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n"
    return dict(zip(FILES, (_words(card).encode(), machine), strict=True))


def _words(card: PrivacyCard) -> str:
    head = (
        f"# {card.swarm_name}\n\nTrained by the members of an xpeer swarm (`{card.swarm_id}`), "
        f"each on text of its own; exported at step {card.step} by xpeer {card.xpeer}.\n\n"
        "## Privacy\n\n"
    )
    if not privacy_policy(card.mode).charges:
        return head + (
            "**None.** The swarm trained without differential privacy: the model may repeat parts "
            "of its members' text.\n"
        )
    own = (
        "The node that exported this has trained on no text of its own."
        if card.delta is None
        else "The node that exported this had spent at most epsilon = "
        f"{card.epsilon_spent:.12g} at delta = {card.delta:.12g}."
    )
    return head + (
        f"Differential privacy in mode `{card.mode}`, for each **{card.unit}** of each member's "
        f"text: epsilon at most {card.epsilon_target:.12g} by each member's own ledger. {own} It "
        "bounds what this model, and everything else that members sent, tells of any one "
        f"{card.unit}.\n\n"
        "Not covered: text that stands in several of them, or with several members; what the same "
        "text lost in other swarms; what members "
        "published besides; a member that altered its own node. Epsilon of members is their own "
        "word; this node's is in its ledger (`xpeer privacy report`).\n"
    )
