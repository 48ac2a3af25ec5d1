"""What is known of a privacy ledger, for its operator and for auditors. Knows no terminals."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from xpeer import __version__
from xpeer.errors import ConfigError, LocalError
from xpeer.privacy import accountant
from xpeer.privacy.accountant import Segment
from xpeer.privacy.ledger import Charge, Ledger
from xpeer.privacy.replay import epsilon_replayed

TOLERANCE: Final = 0.01
"""By which two accountants may differ, relative: both have grids."""
_STEPS_MAX: Final = 10_000_000
NOT_COVERED: Final = (
    "a document cut into m records: at most m times epsilon, not epsilon",
    "documents that also lie elsewhere, or nearly alike: each copy is another record",
    "that this node takes part, how long its steps take, and what is published by hand",
    "whatever was tuned by looking at results on private text",
    "any peer whose own ledger or machine its operator falsifies",
)
"""By mode record, and said in every report."""
_PROTECTED: Final = {
    "record": "any one record (a training sequence) was among its text",
    "document": "any one document was among its text",
    "shard": "it had any text at all",
}


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


class Verdict(Struct, frozen=True, kw_only=True):
    """Epsilon of the stored charges by three roads."""

    delta: float
    epsilon_accountant: float
    """dp-accounting's privacy loss distributions: the node's own number."""
    epsilon_replayed: float
    """`replay`."""
    epsilon_rdp: float
    """Renyi differential privacy: looser."""
    charges: int
    problems: list[str]
    """Empty: they agree."""


class Plan(Struct, frozen=True, kw_only=True):
    """What a budget asks for."""

    epsilon: float
    delta: float
    records: int
    batch: int
    sampling_probability: float
    steps: int
    noise_multiplier: float
    noise_to_signal: float
    """Expected norm of a step's noise, per square root of a parameter, over the clipping norm's
    part of the mean gradient: sigma / batch."""
    passes: float
    """Over the shard."""
    tokens_per_step: int | None
    curve: list[tuple[int, float]]
    """(steps, epsilon) on the way."""


def about(ledger: Ledger) -> tuple[float, float]:
    """Delta and the target of the last charge that noted them.

    Raises:
        LocalError: none did.
    """
    noted = [charge.about for charge in ledger.charges() if charge.about is not None]
    if not noted:
        raise LocalError(
            f"privacy ledger {ledger.path} does not say for which delta it was charged",
            "give --delta",
        )
    return noted[-1].delta, noted[-1].epsilon_target


def account(ledger: Ledger) -> Account:
    """Where it stands; takes a second or two.

    Raises:
        LocalError: nothing was charged, or by a version that noted too little.
    """
    charges = ledger.charges()
    if not charges:
        raise LocalError(
            f"privacy ledger {ledger.path}: nothing was charged yet", "train first: `xpeer start`"
        )
    delta, target = about(ledger)
    last = [charge for charge in charges if charge.about is not None][-1]
    if last.about is None:
        raise LocalError(f"privacy ledger {ledger.path}: the last charge notes nothing")
    kind = last.segment
    left = accountant.steps_within(
        target,
        delta,
        ledger.segments(),
        kind.noise_multiplier,
        kind.sampling_probability,
        _STEPS_MAX,
    )
    return Account(
        ledger_id=ledger.id,
        swarm_id=last.about.swarm_id,
        mode=last.about.mode,
        unit=last.about.unit,
        epsilon_spent=accountant.epsilon(ledger.segments(), delta),
        epsilon_target=target,
        delta=delta,
        clip_norm=last.about.clip_norm,
        segments=ledger.segments(),
        steps_charged=ledger.steps_charged,
        charges=ledger.counter,
        steps_left=left,
        ends_unix_s=ledger.ends_unix_s(left),
        chain_head=ledger.head,
    )


def verify(ledger: Ledger, delta: float | None = None) -> Verdict:
    """Compare the accountant with an independent replay, and with a looser bound.

    That the chain of charges holds was checked when the ledger was read.

    Raises:
        LocalError: delta is neither given nor noted, or the replay is out of reach.
    """
    if delta is None:
        delta = about(ledger)[0]
    segments = ledger.segments()
    ours, again = accountant.epsilon(segments, delta), epsilon_replayed(segments, delta)
    loose = accountant.epsilon_rdp(segments, delta) if segments else 0.0
    problems = []
    if abs(ours - again) > TOLERANCE * max(ours, again):
        problems.append(f"the accountant says {ours:.4f}, the replay {again:.4f}")
    for name, value in (("the accountant", ours), ("the replay", again)):
        if value > loose * (1 + TOLERANCE):
            problems.append(f"{name} says {value:.4f}, more than Renyi's bound {loose:.4f}")
    return Verdict(
        delta=delta,
        epsilon_accountant=ours,
        epsilon_replayed=again,
        epsilon_rdp=loose,
        charges=ledger.counter,
        problems=problems,
    )


def plan(
    *,
    epsilon: float,
    records: int,
    batch: int,
    steps: int,
    delta: float | None = None,
    sequence_tokens: int | None = None,
) -> Plan:
    """Calibrate: which noise so many private steps need. Takes seconds.

    Args:
        epsilon: to be spent by the last step.
        records: n, of the shard.
        batch: expected records a step.
        steps: private ones.
        delta: None = `accountant.default_delta`.
        sequence_tokens: of a record, to tell what a step costs.

    Raises:
        ConfigError: a number out of range, or out of reach.
    """
    for name, value in (("--records", records), ("--batch", batch), ("--steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} {value} is not positive", "give at least 1")
    if batch > records:
        raise ConfigError(
            f"--batch {batch} is more than the {records} records", "give --batch of at most that"
        )
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"--epsilon {epsilon} is not positive", "e.g. --epsilon 8")
    if delta is not None and not 0 < delta < 1:
        raise ConfigError(f"--delta {delta} is not between 0 and 1", "e.g. --delta 1e-5")
    delta = delta or accountant.default_delta(records)
    q = batch / records
    sigma = accountant.calibrate(epsilon, delta, q, steps)
    marks = sorted({max(1, round(steps * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
    return Plan(
        epsilon=epsilon,
        delta=delta,
        records=records,
        batch=batch,
        sampling_probability=q,
        steps=steps,
        noise_multiplier=sigma,
        noise_to_signal=sigma / batch,
        passes=steps * q,
        tokens_per_step=batch * sequence_tokens if sequence_tokens else None,
        curve=[(at, accountant.epsilon([Segment(sigma, q, at)], delta)) for at in marks],
    )


def report(found: Account, verdict: Verdict, charges: Sequence[Charge]) -> str:
    """Markdown for an auditor: everything that epsilon can be recomputed from."""
    lines = [
        "# Privacy report",
        "",
        f"Made {_date(time.time())} by xpeer {__version__} from ledger `{found.ledger_id}`.",
        "",
        f"- swarm `{found.swarm_id}`, mode **{found.mode}**, per **{found.unit}**",
        f"- **epsilon {found.epsilon_spent:.4f}** of {found.epsilon_target:g} spent, at delta "
        f"{found.delta:.3g}",
        f"- independently recomputed: {verdict.epsilon_replayed:.4f}; by Renyi's looser bound: "
        f"{verdict.epsilon_rdp:.4f}",
        f"- {found.steps_charged} steps in {found.charges} charges; last link of their chain "
        f"`{found.chain_head}`",
        "",
        "## What that means",
        "",
        "Whoever sees everything that this node ever sent, all other members together included, "
        f"can hardly tell whether {_PROTECTED[found.unit]}: the probability of any conclusion "
        "changes by a factor of at most e^epsilon, except with probability delta. It needs no "
        "trust in other members, in encryption or in masks.",
        "",
        "Not covered:",
        "",
        *(f"- {what}" for what in NOT_COVERED),
        "",
        "## How to recompute it",
        "",
        f"Each step samples every {found.unit} with probability q (Poisson), bounds what it gives "
        f"by norm C ({found.clip_norm:g} at first), adds up and adds N(0, sigma^2 C^2) to every "
        f"coordinate; neighbouring texts differ by one {found.unit} added or removed. Compose the "
        "steps below (mode update: releases, one a window).",
        "",
        "| sigma | q | steps |",
        "|---|---|---|",
        *(
            f"| {s.noise_multiplier!r} | {s.sampling_probability!r} | {s.steps} |"
            for s in found.segments
        ),
        "",
        "## Charges",
        "",
        "| no. | time | sigma | q | steps |",
        "|---|---|---|---|---|",
        *map(_row, charges),
    ]
    if verdict.problems:
        lines[2:2] = [f"**Does not add up: {'; '.join(verdict.problems)}**", ""]
    return "\n".join(lines) + "\n"


def _row(charge: Charge) -> str:
    when = _date(charge.about.unix_s) if charge.about else "not noted"
    segment = charge.segment
    return (
        f"| {charge.counter} | {when} | {segment.noise_multiplier!r} | "
        f"{segment.sampling_probability!r} | {segment.steps} |"
    )


def _date(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(unix_s))
