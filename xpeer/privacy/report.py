"""What is known of a privacy ledger, for its operator and for auditors. Knows no terminals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from xpeer.errors import LocalError
from xpeer.privacy import accountant
from xpeer.privacy.accountant import Segment
from xpeer.privacy.histories import (
    ByUnit,
    DocumentClass,
    History,
    at_least,
    combined,
    missing,
    segments_of,
    steps_of,
)
from xpeer.privacy.ledger import Ledger
from xpeer.privacy.register import Register
from xpeer.privacy.replay import replay

TOLERANCE: Final = 0.01
"""By which two accountants may differ, relative: both have grids."""
_NEGLIGIBLE: Final = 2e-3
"""The grids' errors, absolute: more than TOLERANCE where epsilon is tiny."""
_STEPS_MAX: Final = 10_000_000
_LOOKS: Final = 5
"""At a ledger whose node may just be charging: the register first, the ledger some ms later."""
_MOST_CLASSES: Final = 12
"""Of documents, that are told one by one; each takes up to half a second."""


class DocumentAccount(Struct, frozen=True, kw_only=True):
    """Documents of one history, by the machine's register."""

    documents: int
    here: bool
    """Whether they are in the shard as the node last started; else they were."""
    homes: int
    """That were charged for them, this one included."""
    swarms: list[str]
    epsilon: float
    """All that was charged to them on this machine, at the node's delta."""
    segments: list[Segment]


class FileAccount(Struct, frozen=True, kw_only=True):
    """One file of a shard."""

    path: str
    documents: int
    epsilon: float
    """Of its document that was charged most, by all homes of this machine."""


class Account(Struct, frozen=True, kw_only=True):
    """Where a ledger stands."""

    ledger_id: str
    swarm_id: str
    mode: str
    unit: str
    epsilon_spent: float
    epsilon_target: float
    delta: float
    clip_norm: float
    segments: list[Segment]
    steps_charged: int
    charges: int
    steps_left: int | None
    """At the last charge's noise and sampling."""
    ends_unix_s: float | None
    """At the pace of the last hour; None = not training now."""
    chain_head: str
    """The last link of the chain of charges: who knows it can tell that none was altered."""
    documents: list[DocumentAccount]
    """By the machine's register; largest first. Empty: there is none."""
    classes_left_out: int
    """Of documents, charged no more steps than the last one that is told."""


class Checked(Struct, frozen=True, kw_only=True):
    """One account by three roads."""

    what: str
    epsilon_accountant: float
    """dp-accounting's privacy loss distributions: the node's own number, an upper bound."""
    epsilon_replayed: float
    """`replay`: an estimate, that lies, for certain, between"""
    epsilon_lower: float
    """this"""
    epsilon_upper: float
    """and this."""
    epsilon_rdp: float
    """Renyi differential privacy: a looser upper bound."""


class Verdict(Struct, frozen=True, kw_only=True):
    """Whether stored charges and epsilon add up."""

    delta: float
    epsilon_spent: float
    """The largest of what is checked, by the accountant."""
    checked: list[Checked]
    """This ledger, and the documents of its shard that were charged most by all homes."""
    charges: int
    steps_registered: int | None
    """Of this ledger's steps, in the machine's register; None = there is none."""
    problems: list[str]
    """Empty: they agree."""


def about(ledger: Ledger) -> tuple[float, float]:
    """Delta and the target of the last charge that noted them.

    Raises:
        LocalError: none did.
    """
    noted = [charge.about for charge in ledger.charges() if charge.about is not None]
    if not noted:
        raise LocalError(
            f"privacy ledger {ledger.path} does not say for which delta it was charged",
            "start the node: it notes it with the next charge; or give --delta",
        )
    return noted[-1].delta, noted[-1].epsilon_target


def charged(ledger: Ledger, register: Register | None) -> list[Segment]:
    """What a ledger charged, by its own word and by the register's, whichever is more."""
    told = [ledger.by_unit(), register.own(ledger.id) if register else {}]
    return segments_of(at_least(_of_all_units(each) for each in told))


def account(ledger: Ledger, register: Register | None = None) -> Account:
    """Where it stands; takes a second or two.

    Args:
        ledger: of the node.
        register: of the machine.

    Raises:
        LocalError: nothing was charged, or by a version that noted too little.
    """
    charges = ledger.charges()
    if not charges:
        raise LocalError(
            f"privacy ledger {ledger.path}: nothing was charged yet",
            "train first: `xpeer start`; if it does not train, `xpeer status` says why",
        )
    delta, target = about(ledger)
    last = [charge for charge in charges if charge.about is not None][-1]
    if last.about is None:
        raise LocalError(f"privacy ledger {ledger.path}: the last charge notes nothing")
    kind = last.segment
    left = _STEPS_MAX
    histories = _histories(ledger, register)
    for spent in histories:
        left = accountant.steps_within(
            target, delta, spent, kind.noise_multiplier, kind.sampling_probability, left
        )
    documents, left_out = _documents(ledger, register, delta)
    return Account(
        ledger_id=ledger.id,
        swarm_id=last.about.swarm_id,
        mode=last.about.mode,
        unit=last.about.unit,
        epsilon_spent=accountant.epsilon_worst(histories, delta),
        epsilon_target=target,
        delta=delta,
        clip_norm=last.about.clip_norm,
        segments=ledger.segments(),
        steps_charged=ledger.steps_charged,
        charges=ledger.counter,
        steps_left=left,
        ends_unix_s=ledger.ends_unix_s(left),
        chain_head=ledger.head,
        documents=documents,
        classes_left_out=left_out,
    )


def files(
    register: Register, documents: Iterable[tuple[str, str]], delta: float
) -> list[FileAccount]:
    """Which files of a shard hold documents that were charged; the most charged first.

    Args:
        register: of the machine.
        documents: ids, and the files that they lie in.
        delta: for which epsilon holds.
    """
    by_file: dict[str, list[str]] = {}
    for document, path in documents:
        by_file.setdefault(path, []).append(document)
    histories = register.of_documents(each for ids in by_file.values() for each in ids)
    costs: dict[tuple[Segment, ...], float] = {}
    for history in histories.values():
        key = tuple(history)
        if key not in costs:
            costs[key] = accountant.epsilon(history, delta)
    found = [
        FileAccount(
            path=path,
            documents=len(ids),
            epsilon=max(costs[tuple(histories[each])] for each in ids),
        )
        for path, ids in by_file.items()
    ]
    return sorted(found, key=lambda each: (-each.epsilon, each.path))


def _histories(ledger: Ledger, register: Register | None) -> list[list[Segment]]:
    """Of the documents that the shard has; of the ledger as long as nobody knows them."""
    found = register.looked_up(ledger.id) if register else []
    return found or [charged(ledger, register)]


def _of_all_units(told: ByUnit) -> History:
    return combined(dict(enumerate(told.values())), range(len(told)))


def _documents(
    ledger: Ledger, register: Register | None, delta: float
) -> tuple[list[DocumentAccount], int]:
    def steps(found: DocumentClass) -> tuple[bool, int]:
        return found.here, sum(segment.steps for segment in found.segments)

    classes = register.classes(ledger.id) if register else []
    classes.sort(key=steps, reverse=True)
    told = [
        DocumentAccount(
            documents=found.documents,
            here=found.here,
            homes=found.ledgers,
            swarms=found.swarms,
            epsilon=accountant.epsilon(found.segments, delta),
            segments=found.segments,
        )
        for found in classes[:_MOST_CLASSES]
    ]
    return told, len(classes) - len(told)


def verify(ledger: Ledger, register: Register | None = None, delta: float | None = None) -> Verdict:
    """Compare the accountant with an independent replay, and with a looser bound.

    That the chain of charges holds was checked when the ledger was read.

    Args:
        ledger: of a node.
        register: of its machine.
        delta: None = as noted in the ledger.

    Raises:
        LocalError: delta is neither given nor noted, or the replay is out of reach.
    """
    if delta is None:
        delta = about(ledger)[0]
    accounts = [("this ledger", ledger.segments())]
    registered = steps_of(register.own(ledger.id)) if register else None
    if register and registered:
        accounts += [
            ("documents of the shard, all homes", history)
            for history in register.looked_up(ledger.id)
            if accountant.merge(history) != accountant.merge(ledger.segments())
        ]
    checked, problems = [], []
    for what, segments in accounts:
        found = _checked(what, segments, delta)
        checked.append(found)
        problems += _disagreements(found)
    if registered is not None and registered < ledger.steps_charged:
        problems.append(
            f"the machine's register holds {registered} of this ledger's {ledger.steps_charged} "
            "steps: it is older, or was lost; the node adds them when it starts"
        )
    if register and (behind := _behind(ledger, register)):
        problems.append(
            f"this ledger lacks {behind} steps that the machine's register holds of it: an older "
            "copy was restored; the node charges them again when it starts"
        )
    return Verdict(
        delta=delta,
        epsilon_spent=max(found.epsilon_accountant for found in checked),
        checked=checked,
        charges=ledger.counter,
        steps_registered=registered,
        problems=problems,
    )


def _behind(ledger: Ledger, register: Register) -> int:
    """Steps; 0 as well where a charge was on its way from the register to the ledger."""
    registered = register.own(ledger.id)
    lacking = missing(registered, ledger.by_unit())
    for _ in range(_LOOKS):
        if not lacking:
            break
        with Ledger.look(ledger.path) as now:
            lacking = missing(registered, now.by_unit())
    return steps_of(lacking)


def _checked(what: str, segments: list[Segment], delta: float) -> Checked:
    again = replay(segments, delta)
    return Checked(
        what=what,
        epsilon_accountant=accountant.epsilon(segments, delta),
        epsilon_replayed=again.estimate,
        epsilon_lower=again.lower,
        epsilon_upper=again.upper,
        epsilon_rdp=accountant.epsilon_rdp(segments, delta) if segments else 0.0,
    )


def _disagreements(found: Checked) -> list[str]:
    ours, again = found.epsilon_accountant, found.epsilon_replayed
    problems = []
    if abs(ours - again) > TOLERANCE * max(ours, again) + _NEGLIGIBLE:
        problems.append(f"{found.what}: the accountant says {ours:.4f}, the replay {again:.4f}")
    if ours < found.epsilon_lower:
        problems.append(
            f"{found.what}: the accountant says {ours:.4f}, but epsilon is at least "
            f"{found.epsilon_lower:.4f}"
        )
    for name, value in (("accountant", ours), ("replay", again)):
        if value > found.epsilon_rdp * (1 + TOLERANCE):
            problems.append(
                f"{found.what}: the {name} says {value:.4f}, more than Renyi's bound "
                f"{found.epsilon_rdp:.4f}"
            )
    return problems
