"""What is known of a privacy ledger, for its operator and for auditors. Knows no terminals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from msgspec import Struct

from xpeer.accounts import accountant
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.accountant import Segment
from xpeer.accounts.chain import ChargeContext
from xpeer.accounts.histories import DocumentClass
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.accounts.replay import replay
from xpeer.errors import LocalError
from xpeer.leaves import Local, Public, seen_by
from xpeer.manifest import DELTA_MAX

START: Final = "start the node: it takes up what was lost"
TOLERANCE: Final = 0.01
"""By which two accountants may differ, relative: both have grids."""
_NEGLIGIBLE: Final = 2e-3
"""The grids' errors, absolute: more than TOLERANCE where epsilon is tiny."""
_STEPS_MAX: Final = 10_000_000
_MOST_CLASSES: Final = 12
"""Of documents, that are told one by one; each takes up to half a second."""


@seen_by("home")
class DocumentAccount(Struct, frozen=True, kw_only=True):
    """Documents of one history, by the machine's register."""

    documents: Local[int]
    here: Local[bool]
    """Whether they are in the shard as the node last started; else they were."""
    homes: Local[int]
    """That were charged for them, this one included."""
    swarms: Local[list[str]]
    epsilon: Local[float]
    """All that was charged to them on this machine, at the node's delta."""
    segments: Local[list[Segment]]


class Noted(NamedTuple):
    """A charge, and what it was for."""

    segment: Segment
    about: ChargeContext


@seen_by("home")
class FileAccount(Struct, frozen=True, kw_only=True):
    """One file of a shard."""

    path: Local[str]
    documents: Local[int]
    epsilon: Local[float]
    """Of its document that was charged most, by all homes of this machine."""


@seen_by(
    "home",
    "`xpeer privacy status` and `report`: sigma, q and delta tell the shard's size by "
    "six bits to whoever is shown them",
)
class Account(Struct, frozen=True, kw_only=True):
    """Where a ledger stands."""

    ledger_id: Local[str]
    swarm_id: Public[str]
    mode: Public[str]
    unit: Public[str]
    epsilon_spent: Local[float]
    """Of documents in the shard as the node last started, charges of other homes included: what the
    budget is compared with."""
    epsilon_ever: Local[float]
    """Of all documents that the node ever had."""
    epsilon_target: Public[float]
    delta: Local[float]
    clip_norm: Public[float]
    segments: Local[list[Segment]]
    """All steps of this node."""
    steps_charged: Local[int]
    charges: Local[int]
    steps_left: Local[int | None]
    """At the last charge's noise and sampling."""
    ends_unix_s: Local[float | None]
    """At the pace of the last hour; None = not training now."""
    chain_head: Local[str]
    """The last link of the chain of charges: who knows it can tell that none was altered."""
    documents: Local[list[DocumentAccount]]
    """By the machine's register; largest first. Empty: there is none."""
    classes_left_out: Local[int]
    """Of documents, charged no more steps than any that is told."""
    problems: Local[list[str]]
    """Where ledger and register differ; the larger of the two is told."""


@seen_by("home")
class Checked(Struct, frozen=True, kw_only=True):
    """One account by three roads."""

    what: Local[str]
    epsilon_accountant: Local[float]
    """dp-accounting's privacy loss distributions: the node's own number, an upper bound."""
    epsilon_replayed: Local[float]
    """`replay`: an estimate, that lies, for certain, between"""
    epsilon_lower: Local[float]
    """this"""
    epsilon_upper: Local[float]
    """and this."""
    epsilon_rdp: Local[float]
    """Renyi differential privacy: a looser upper bound."""


@seen_by("home")
class Verdict(Struct, frozen=True, kw_only=True):
    """Whether stored charges and epsilon add up."""

    delta: Local[float]
    epsilon_spent: Local[float]
    """The largest of what is checked, by the accountant."""
    checked: Local[list[Checked]]
    """This ledger, and the documents charged most by all homes: of its shard, and of all it had."""
    charges: Local[int]
    steps_registered: Local[int | None]
    """Of this ledger's steps, in the machine's register; None = there is none."""
    problems: Local[list[str]]
    """Empty: they agree."""


def about(ledger: Ledger) -> tuple[float, float]:
    """Delta and the target of the last charge that noted them.

    Raises:
        LocalError: none did.
    """
    noted = _last_noted(ledger).about
    return noted.delta, noted.epsilon_target


def _last_noted(ledger: Ledger) -> Noted:
    for charge in reversed(ledger.charges()):
        if charge.about is not None:
            return Noted(charge.segment, charge.about)
    raise LocalError(
        f"privacy ledger {ledger.path} does not say for which delta it was charged",
        "start the node: it notes it with its next charge; or give --delta",
    )


def account(ledger: Ledger, register: Register | None = None) -> Account:
    """Where it stands; takes a second or two.

    Args:
        ledger: of the node.
        register: of the machine.

    Raises:
        LocalError: nothing was charged, or by a version that noted too little.
    """
    together = AccountView(ledger, register)
    if not together.charged:
        raise LocalError(
            f"privacy ledger {ledger.path}: nothing was charged yet",
            "train first: `xpeer start`; if it does not train, `xpeer status` says why",
        )
    if not ledger.counter:
        raise LocalError(f"privacy ledger {ledger.path}: {'; '.join(together.problems())}", START)
    last = _last_noted(ledger)
    noted, delta = last.about, last.about.delta
    left, of_shard = _STEPS_MAX, together.of_shard()
    for spent in of_shard:
        left = accountant.steps_within(
            noted.epsilon_target,
            delta,
            spent,
            last.segment.noise_multiplier,
            last.segment.sampling_probability,
            left,
        )
    documents, left_out = _documents(together, delta)
    return Account(
        ledger_id=ledger.id,
        swarm_id=noted.swarm_id,
        mode=noted.mode,
        unit=noted.exact_unit.partition(" of ")[0],
        epsilon_spent=accountant.epsilon_worst(of_shard, delta),
        epsilon_ever=accountant.epsilon_worst(together.ever(), delta),
        epsilon_target=noted.epsilon_target,
        delta=delta,
        clip_norm=noted.clip_norm,
        segments=together.charged,
        steps_charged=sum(segment.steps for segment in together.charged),
        charges=ledger.counter,
        steps_left=left,
        ends_unix_s=ledger.ends_unix_s(left),
        chain_head=ledger.head,
        documents=documents,
        classes_left_out=left_out,
        problems=together.problems(),
    )


def files(
    ledger: Ledger, register: Register, documents: Iterable[tuple[str, str]], delta: float
) -> list[FileAccount]:
    """Which files of a shard hold documents that were charged; the most charged first.

    Args:
        ledger: of the node whose shard it is.
        register: of the machine.
        documents: ids, and the files that they lie in.
        delta: for which epsilon holds.
    """
    by_file: dict[str, list[str]] = {}
    for document, path in documents:
        by_file.setdefault(path, []).append(document)
    together = AccountView(ledger, register)
    histories = {
        document: together.with_unregistered(history)
        for document, history in register.of_documents(
            each for ids in by_file.values() for each in ids
        ).items()
    }
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


def _documents(together: AccountView, delta: float) -> tuple[list[DocumentAccount], int]:
    def steps(found: DocumentClass) -> int:
        return sum(segment.steps for segment in found.segments)

    classes = sorted(together.classes(), key=steps, reverse=True)
    told = []
    for found in sorted(classes[:_MOST_CLASSES], key=lambda each: not each.here):
        segments = together.with_unregistered(found.segments)
        told.append(
            DocumentAccount(
                documents=found.documents,
                here=found.here,
                homes=found.ledgers,
                swarms=found.swarms,
                epsilon=accountant.epsilon(segments, delta),
                segments=segments,
            )
        )
    return told, len(classes) - len(told)


def verify(ledger: Ledger, register: Register | None = None, delta: float | None = None) -> Verdict:
    """Compare the accountant with an independent replay, and with a looser bound.

    That the chain of charges holds was checked when the ledger was read.

    Args:
        ledger: of a node.
        register: of its machine.
        delta: None = as noted in the ledger; the largest there is if the ledger forgot all.

    Raises:
        LocalError: delta is neither given nor noted, or the replay is out of reach.
    """
    together = AccountView(ledger, register)
    if delta is None:
        lost = together.charged and not ledger.counter
        delta = DELTA_MAX if lost else about(ledger)[0]
    accounts = [("this ledger", ledger.segments())]
    if together.steps_registered:
        told = [accountant.merge(ledger.segments())]
        for what, histories in (
            ("documents of the shard, all homes", together.of_shard()),
            ("documents that ever were in the shard, all homes", together.ever()),
        ):
            for history in map(accountant.merge, histories):
                if history not in told:
                    told.append(history)
                    accounts.append((what, history))
    checked, problems = [], []
    for what, segments in accounts:
        found = _checked(what, segments, delta)
        checked.append(found)
        problems += _disagreements(found)
    problems += together.problems()
    return Verdict(
        delta=delta,
        epsilon_spent=max(found.epsilon_accountant for found in checked),
        checked=checked,
        charges=ledger.counter,
        steps_registered=together.steps_registered,
        problems=problems,
    )


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
