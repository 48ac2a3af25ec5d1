"""The privacy card of an exported model, for people and programs."""

from __future__ import annotations

import math

import msgspec
from msgspec import Struct, structs

from xpeer import __version__
from xpeer.accounts import accountant, report
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.own_model import OwnModel
from xpeer.accounts.register import Register
from xpeer.errors import LocalError
from xpeer.leaves import Public, Timing, seen_by
from xpeer.manifest import Manifest
from xpeer.policies import privacy_policy

FILES = ("README.md", "privacy.json")

_GRID = 0.5
"""The card's epsilon is a multiple of this."""


@seen_by(
    "export",
    "no sigma, no q, no size; epsilon and delta are rounded up to a coarse grid",
)
class PrivacyCard(Struct, frozen=True, kw_only=True):
    """Privacy of the text behind one export.

    Anybody may read it, so it must not reveal the shard's size. Noise and sampling are left out.
    Epsilon and delta are rounded up coarsely.
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
    """Bound that every member keeps for its own text. None without privacy."""
    epsilon_spent: Timing[float | None] = None
    """Upper bound of what the exporting node spent on any one unit: rounded up to a multiple of
    0.5, and capped at the target unless the target was exceeded. None without privacy."""
    delta: Timing[float | None] = None
    """Delta of both epsilons at the exporting node: a power of ten, unless the manifest sets it.
    Other members' deltas follow from their own text. None without privacy, and if the node trained
    on no text."""
    own_steps: Timing[int | None] = None
    """Steps on the exporting node's text alone, after the swarm's (`xpeer finetune`). None = it is
    the swarm's model."""
    chosen: Public[bool] = False
    """True iff the loss on text held out at the exporting node decided which step was exported."""


def card_of(
    manifest: Manifest,
    swarm_id: str,
    step: int,
    ledger: Ledger | None,
    register: Register | None = None,
    own: OwnModel | None = None,
) -> PrivacyCard:
    """Make the card of an export. Takes about a second.

    Args:
        manifest: the swarm's manifest.
        swarm_id: its fingerprint.
        step: step of the exported checkpoint.
        ledger: the node's ledger; None = this node has trained on no text.
        register: the machine's register, which knows what a restored ledger has forgotten.
        own: facts about the own model, if that is exported.

    Raises:
        LocalError: the ledger has lost all its charges.
    """
    section = manifest.privacy
    card = PrivacyCard(
        swarm_id=swarm_id,
        swarm_name=manifest.name,
        step=own.plan.swarm_step if own else step,
        mode=section.mode,
        own_steps=own.kept_step if own else None,
        chosen=own is not None and own.chosen,
    )
    if not section.policy.charges:
        return card
    view = AccountView(ledger, register) if ledger else None
    charged = view.of_home() if view and view.charged else []
    if ledger and charged and not ledger.counter:
        raise LocalError(f"privacy ledger {ledger.path} has lost all charges", report.START)
    noted = report.noted_targets(ledger)[0] if ledger and charged else None
    # rounding up is safe: a guarantee holds for every larger epsilon and delta, too
    delta = noted and (section.delta or 10.0 ** math.ceil(math.log10(noted)))
    spent = accountant.epsilon_worst(charged, min(noted, delta)) if noted and delta else 0.0
    rounded = math.ceil(spent / _GRID) * _GRID
    return structs.replace(
        card,
        unit=section.unit,
        epsilon_target=section.epsilon,
        epsilon_spent=rounded if spent > section.epsilon else min(rounded, section.epsilon),
        delta=delta,
    )


def files(card: PrivacyCard) -> dict[str, bytes]:
    """Contents of the card's files by name, in the order of `FILES`."""
    machine = msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n"
    return dict(zip(FILES, (_words(card).encode(), machine), strict=True))


def _words_of_own(card: PrivacyCard) -> str:
    """What has to be known of a model that is not the swarm's."""
    words = (
        f"**This is not the swarm's model.** The node that exported it trained it for "
        f"{card.own_steps} further steps on its own text alone (`xpeer finetune`). It was made for "
        "use at home; whoever passes it on answers for that text.\n\n"
    )
    if card.chosen and privacy_policy(card.mode).charges:
        words += (
            "Which step was kept was decided by the loss on text that the node held out. Epsilon "
            "does not cover that choice.\n\n"
        )
    return words


def _words(card: PrivacyCard) -> str:
    head = (
        f"# {card.swarm_name}\n\nTrained by the members of an xpeer swarm (`{card.swarm_id}`), "
        f"each on text of its own; exported at step {card.step} by xpeer {card.xpeer}.\n\n"
        "## Privacy\n\n"
    )
    if card.own_steps is not None:
        head += _words_of_own(card)
    if not privacy_policy(card.mode).charges:
        return head + (
            "**None.** The swarm trained without differential privacy: the model may repeat parts "
            "of its members' text.\n"
        )
    exporter = (
        "The node that exported this has trained on no text of its own."
        if card.delta is None
        else "The node that exported this had spent at most epsilon = "
        f"{card.epsilon_spent:.12g} at delta = {card.delta:.12g}."
    )
    return head + (
        f"Differential privacy in mode `{card.mode}`, for each **{card.unit}** of each member's "
        f"text: epsilon at most {card.epsilon_target:.12g} by each member's own ledger. {exporter} "
        "Epsilon bounds what this model, and everything else that members sent, tells of any one "
        f"{card.unit}.\n\n"
        f"Not covered: text that occurs in several {card.unit}s, or with several members; what the "
        "same text lost in other swarms; what members published besides; a member that altered its "
        "own node. Epsilon of members is their own word; this node's is in its ledger (`xpeer "
        "privacy report`).\n"
    )
