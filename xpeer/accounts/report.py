"""Reports on a privacy ledger, for its operator and for auditors. Knows no terminals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from msgspec import Struct

from xpeer.accounts import accountant
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import Bounds, steps_within
from xpeer.accounts.chain import ChargeContext
from xpeer.accounts.histories import DocumentClass
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.accounts.replay import replay
from xpeer.accounts.spending import SwarmSpending
from xpeer.errors import LocalError
from xpeer.leaves import Local, Public, seen_by
from xpeer.manifest.privacy import DELTA_MAX

START: Final = "start the node: it charges the lost steps again"
TOLERANCE: Final = 0.01
"""Relative difference that two accountants may have, since both compute on grids."""
_NEGLIGIBLE: Final = 2e-3
"""Absolute difference that they may have on top. It matters where epsilon is tiny."""
_STEPS_MAX: Final = 10_000_000
_MOST_CLASSES: Final = 12
"""Classes of documents that a report lists. Each takes up to half a second."""


@seen_by("home")
class DocumentAccount(Struct, frozen=True, kw_only=True):
    """A class: documents with the same charges in the machine's register."""

    documents: Local[int]
    """Number of documents."""
    here: Local[bool]
    """True iff they were in the shard when the node last started. False: in an earlier shard only.
    """
    homes: Local[int]
    """Number of homes that charged them, this one included."""
    swarms: Local[list[str]]
    """Ids of the swarms that they were charged in."""
    epsilon: Local[float]
    """Cost of all charges to them on this machine, at the node's delta."""
    segments: Local[list[Segment]]
    """All charges to them on this machine."""


class Noted(NamedTuple):
    """A charge that notes what it was for."""

    segment: Segment
    about: ChargeContext


@seen_by("home")
class FileAccount(Struct, frozen=True, kw_only=True):
    """The cost of one file of a shard."""

    path: Local[str]
    documents: Local[int]
    """Number of its documents."""
    epsilon: Local[float]
    """Cost of its most charged document. Charges of all homes of this machine count."""


@seen_by(
    "home",
    "`xpeer privacy status` and `report`: whoever reads sigma, q and delta learns the six "
    "leading bits of the shard's size",
)
class Account(Struct, frozen=True, kw_only=True):
    """The state of a ledger, for `xpeer privacy status` and `report`."""

    ledger_id: Local[str]
    swarm_id: Public[str]
    mode: Public[str]
    unit: Public[str]
    epsilon_spent: Local[float]
    """Cost for documents that were in the shard when the node last started. Charges of other homes
    are included. The budget bounds this number."""
    epsilon_ever: Local[float]
    """The same for all documents that the node ever had."""
    epsilon_target: Public[float]
    epsilon_kept_back: Local[float]
    """The part of the target that the swarm's steps leave for own steps (`privacy.keep_back`)."""
    delta: Local[float]
    clip_norm: Public[float]
    segments: Local[list[Segment]]
    """All steps of this node."""
    own_segments: Local[list[Segment]]
    """Its own steps (`xpeer finetune`). `segments` includes them."""
    steps_charged: Local[int]
    """Number of all steps of this node."""
    charges: Local[int]
    """Number of charges in the ledger."""
    steps_left: Local[int | None]
    """Further steps that fit the budget, with the noise and sampling of the last charge. Swarm
    steps: without the kept-back part."""
    ends_unix_s: Local[float | None]
    """Time at which the budget will be spent, at the pace of the last hour. None = not training
    now."""
    chain_head: Local[str]
    """Hash of the last charge, hex. With it one can check later that no charge was altered."""
    documents: Local[list[DocumentAccount]]
    """The most charged classes of documents; those in the shard come first. Empty without a
    register."""
    classes_left_out: Local[int]
    """Number of classes that `documents` omits. None has more steps than those listed."""
    problems: Local[list[str]]
    """Differences between ledger and register. All numbers here follow the larger of the two."""


@seen_by("home")
class Checked(Struct, frozen=True, kw_only=True):
    """Epsilon of one account, computed in three ways."""

    what: Local[str]
    """Name of the account, for people."""
    epsilon_accountant: Local[float]
    """The node's own number, an upper bound: dp-accounting's privacy loss distributions."""
    epsilon_replayed: Local[float]
    """The estimate of `replay`."""
    epsilon_lower: Local[float]
    """Lower bound of the exact epsilon, by `replay`."""
    epsilon_upper: Local[float]
    """Upper bound of the exact epsilon, by `replay`."""
    epsilon_rdp: Local[float]
    """A looser upper bound, by Renyi differential privacy."""


@seen_by("home")
class Verdict(Struct, frozen=True, kw_only=True):
    """The outcome of `verify`."""

    delta: Local[float]
    epsilon_spent: Local[float]
    """The largest `epsilon_accountant` in `checked`."""
    checked: Local[list[Checked]]
    """The charges of this ledger, then the worst accounts: of the shard's documents, then of all
    that the node ever had."""
    charges: Local[int]
    """Number of charges in the ledger."""
    steps_registered: Local[int | None]
    """Number of this ledger's steps that the machine's register holds. None without a register."""
    problems: Local[list[str]]
    """Disagreements. Empty iff everything adds up."""


def noted_targets(ledger: Ledger) -> tuple[float, float]:
    """Delta and target epsilon of the newest charge that notes them.

    Raises:
        LocalError: no charge notes them.
    """
    noted = _last_noted(ledger).about
    return noted.delta, noted.epsilon_target


def _last_noted(ledger: Ledger) -> Noted:
    for charge in reversed(ledger.charges()):
        if charge.about is not None:
            return Noted(charge.segment, charge.about)
    raise LocalError(
        f"privacy ledger {ledger.path} does not say for which delta it was charged",
        "start the node: its next charge will note delta; or give --delta",
    )


def account(ledger: Ledger, register: Register | None = None, keep_back: float = 0.0) -> Account:
    """Report the state of a ledger. Takes a second or two.

    Args:
        ledger: the node's ledger.
        register: the machine's register; None = there is none.
        keep_back: `privacy.keep_back` of the node.

    Raises:
        LocalError: nothing was charged, all charges were lost, or the charges are those of an old
            version that did not note what they were for.
    """
    view = AccountView(ledger, register)
    if not view.charged:
        raise LocalError(
            f"privacy ledger {ledger.path}: nothing was charged yet",
            "train first: `xpeer start`; if it does not train, `xpeer status` says why",
        )
    if not ledger.counter:
        raise LocalError(f"privacy ledger {ledger.path}: {'; '.join(view.problems())}", START)
    last = _last_noted(ledger)
    noted, delta = last.about, last.about.delta
    target, of_shard = noted.epsilon_target, view.of_shard()
    swarm = SwarmSpending(0.0 if noted.own else keep_back)
    left = _steps_left(swarm.bounds(target, ledger), delta, of_shard, last.segment)
    documents, left_out = _documents(view, delta)
    return Account(
        ledger_id=ledger.id,
        swarm_id=noted.swarm_id,
        mode=noted.mode,
        unit=noted.exact_unit.partition(" of ")[0],
        epsilon_spent=accountant.epsilon_worst(of_shard, delta),
        epsilon_ever=accountant.epsilon_worst(view.ever(), delta),
        epsilon_target=target,
        epsilon_kept_back=keep_back * target,
        delta=delta,
        clip_norm=noted.clip_norm,
        segments=view.charged,
        own_segments=ledger.own_segments(),
        steps_charged=sum(segment.steps for segment in view.charged),
        charges=ledger.counter,
        steps_left=left,
        ends_unix_s=ledger.ends_unix_s(left),
        chain_head=ledger.head,
        documents=documents,
        classes_left_out=left_out,
        problems=view.problems(),
    )


def _steps_left(bounds: Bounds, delta: float, histories: list[list[Segment]], kind: Segment) -> int:
    """The number of further steps of this kind that fit for all documents."""
    sigma, q, left = kind.noise_multiplier, kind.sampling_probability, _STEPS_MAX
    for spent in histories:
        left = steps_within(bounds(spent), delta, sigma, q, left)
    return left


def files(
    ledger: Ledger, register: Register, documents: Iterable[tuple[str, str]], delta: float
) -> list[FileAccount]:
    """Compute the cost of each file of a shard. The most charged file comes first.

    Args:
        ledger: ledger of the node whose shard it is.
        register: the machine's register.
        documents: (id, path) of each document, for every file that holds it.
        delta: delta at which epsilon is computed.
    """
    by_file: dict[str, list[str]] = {}
    for document, path in documents:
        by_file.setdefault(path, []).append(document)
    view = AccountView(ledger, register)
    histories = {
        document: view.with_unregistered(history)
        for document, history in register.of_documents(
            {each for ids in by_file.values() for each in ids}
        ).items()
    }
    costs: dict[tuple[Segment, ...], float] = {}
    for history in histories.values():
        key = tuple(history)
        if key not in costs:
            costs[key] = accountant.epsilon(history, delta)
    accounts = [
        FileAccount(
            path=path,
            documents=len(ids),
            epsilon=max(costs[tuple(histories[each])] for each in ids),
        )
        for path, ids in by_file.items()
    ]
    return sorted(accounts, key=lambda each: (-each.epsilon, each.path))


def _documents(view: AccountView, delta: float) -> tuple[list[DocumentAccount], int]:
    """The most charged classes of documents, and the number of the others."""

    def steps(each: DocumentClass) -> int:
        return sum(segment.steps for segment in each.segments)

    classes = sorted(view.classes(), key=steps, reverse=True)
    listed = []
    for each in sorted(classes[:_MOST_CLASSES], key=lambda each: not each.here):
        segments = view.with_unregistered(each.segments)
        listed.append(
            DocumentAccount(
                documents=each.documents,
                here=each.here,
                homes=each.ledgers,
                swarms=each.swarms,
                epsilon=accountant.epsilon(segments, delta),
                segments=segments,
            )
        )
    return listed, len(classes) - len(listed)


def verify(ledger: Ledger, register: Register | None = None, delta: float | None = None) -> Verdict:
    """Compare the accountant with an independent replay, and with a looser bound.

    The chain of charges is not checked here: that happened when the ledger was read.

    Args:
        ledger: the ledger of a node.
        register: the register of its machine; None = there is none.
        delta: None = the one that the ledger notes, or DELTA_MAX if the ledger lost all charges.

    Raises:
        LocalError: delta is neither given nor noted, or the replay can't compute such a cost.
    """
    view = AccountView(ledger, register)
    if delta is None:
        lost = view.charged and not ledger.counter
        delta = DELTA_MAX if lost else noted_targets(ledger)[0]
    accounts = [("this ledger", ledger.segments())]
    if view.steps_registered:
        distinct = [accountant.merge(ledger.segments())]
        for what, histories in (
            ("documents of the shard, all homes", view.of_shard()),
            ("documents that ever were in the shard, all homes", view.ever()),
        ):
            for history in map(accountant.merge, histories):
                if history not in distinct:
                    distinct.append(history)
                    accounts.append((what, history))
    checked, problems = [], []
    for what, segments in accounts:
        comparison = _checked(what, segments, delta)
        checked.append(comparison)
        problems += _disagreements(comparison)
    problems += view.problems()
    return Verdict(
        delta=delta,
        epsilon_spent=max(each.epsilon_accountant for each in checked),
        checked=checked,
        charges=ledger.counter,
        steps_registered=view.steps_registered,
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


def _disagreements(checked: Checked) -> list[str]:
    ours, again = checked.epsilon_accountant, checked.epsilon_replayed
    problems = []
    if abs(ours - again) > TOLERANCE * max(ours, again) + _NEGLIGIBLE:
        problems.append(f"{checked.what}: the accountant says {ours:.4f}, the replay {again:.4f}")
    if ours < checked.epsilon_lower:
        problems.append(
            f"{checked.what}: the accountant says {ours:.4f}, but epsilon is at least "
            f"{checked.epsilon_lower:.4f}"
        )
    for name, value in (("accountant", ours), ("replay", again)):
        if value > checked.epsilon_rdp * (1 + TOLERANCE):
            problems.append(
                f"{checked.what}: the {name} says {value:.4f}, more than Renyi's bound "
                f"{checked.epsilon_rdp:.4f}"
            )
    return problems
