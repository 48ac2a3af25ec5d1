"""A privacy report as Markdown: what an auditor needs to recompute epsilon, and what it means."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from xpeer import __version__
from xpeer.accounts.chain import Charge
from xpeer.accounts.report import Account, Checked, Verdict

_OF_UNIT: Final = {
    "record": "a document cut into m records: at most m times epsilon, not epsilon",
    "document": "a person, or a sentence, in several documents: each of them is another one",
    "shard": "a person whose text lies in several peers' shards",
}
_NOT_COVERED: Final = (
    "documents that also lie on another machine, or nearly alike: each copy is another record; a "
    "changed text, or one cut into files differently, begins a new account",
    "text that a home with another register trained on, or one without privacy",
    "that this node takes part, how long its steps take, and what is published by hand",
    "whatever was tuned by looking at results on private text",
    "any peer whose own ledger or machine its operator falsifies",
)
_PROTECTED: Final = {
    "record": "any one record (a training sequence) was among its text",
    "document": "any one document was among its text",
    "shard": "it had any text at all",
}


def not_covered(unit: str) -> list[str]:
    """Sentences that must stand wherever epsilon is reported: what it does not cover."""
    return [_OF_UNIT[unit], *_NOT_COVERED]


def markdown(account: Account, verdict: Verdict, charges: Sequence[Charge]) -> str:
    """Write the report: everything that epsilon can be recomputed from."""
    lines = [
        "# Privacy report",
        "",
        f"Made {_date(time.time())} by xpeer {__version__} from ledger `{account.ledger_id}`.",
        "",
        f"- swarm `{account.swarm_id}`, mode **{account.mode}**, per **{account.unit}**",
        f"- **epsilon {account.epsilon_ever:.4f}** at delta {account.delta:.3g}, for all that this "
        "node ever trained on",
        f"- epsilon {account.epsilon_spent:.4f} of {account.epsilon_target:g} for what is in its "
        "shard now",
        *map(_check_line, verdict.checked),
        *_own_line(account),
        f"- {account.steps_charged} steps in {account.charges} charges; last link of their chain "
        f"`{account.chain_head}`",
        "",
        "## What that means",
        "",
        "Whoever sees everything that this node ever sent, all other members together included, "
        f"can hardly tell whether {_PROTECTED[account.unit]}: the probability of any conclusion "
        "changes by a factor of at most e^epsilon, except with probability delta. It needs no "
        "trust in other members, in encryption or in masks.",
        "",
        "Not covered:",
        "",
        *(f"- {what}" for what in not_covered(account.unit)),
        "",
        "## How to recompute it",
        "",
        f"Each step samples every {account.unit} with probability q (Poisson), bounds what it "
        f"gives by norm C ({account.clip_norm:g} at first), adds up and adds N(0, sigma^2 C^2) to "
        f"every coordinate; neighbouring texts differ by one {account.unit} added or removed. "
        "Compose the steps below.",
        "",
        "| sigma | q | steps |",
        "|---|---|---|",
        *(
            f"| {s.noise_multiplier!r} | {s.sampling_probability!r} | {s.steps} |"
            for s in account.segments
        ),
        "",
        *_document_table(account),
        "## Charges",
        "",
        "| no. | time | sigma | q | steps | for |",
        "|---|---|---|---|---|---|",
        *map(_row, charges),
    ]
    if verdict.problems:
        lines[2:2] = [f"**Does not add up: {'; '.join(verdict.problems)}**", ""]
    return "\n".join(lines) + "\n"


def _own_line(account: Account) -> list[str]:
    """What own steps were, and where their effect is. Empty if there were none."""
    own = sum(segment.steps for segment in account.own_segments)
    if not own:
        return []
    return [
        f"- {own} of the steps below are own steps (`xpeer finetune`): their effect is in a model "
        "that stays in this home unless its operator exports it. Epsilon counts them all the same"
    ]


def _check_line(checked: Checked) -> str:
    return (
        f"- {checked.what}: the node's accountant (privacy loss distributions, dp-accounting "
        f"{version('dp-accounting')}) {checked.epsilon_accountant:.4f}; recomputed by Fourier "
        f"transforms (Gopi et al. 2021) {checked.epsilon_replayed:.4f}, certainly between "
        f"{max(0.0, checked.epsilon_lower):.4f} and {checked.epsilon_upper:.4f}; by Renyi's looser "
        f"bound {checked.epsilon_rdp:.4f}"
    )


def _document_table(account: Account) -> list[str]:
    """The cost of each class of documents. Empty where the machine's register knows none."""
    if not account.documents:
        return []
    rows = [
        f"| {each.documents} | {'yes' if each.here else 'no longer'} | {each.homes} | "
        f"{each.epsilon:.4f} | {sum(s.steps for s in each.segments)} |"
        for each in account.documents
    ]
    return [
        "## Documents",
        "",
        "By the register of this machine: what all of its homes charged to documents that this one "
        "trained on or trains on.",
        "",
        "| documents | in the shard | homes | epsilon | steps |",
        "|---|---|---|---|---|",
        *rows,
        *(
            [f"| | | | and {account.classes_left_out} classes of documents with fewer steps | |"]
            if account.classes_left_out
            else []
        ),
        "",
    ]


def _row(charge: Charge) -> str:
    when = _date(charge.about.unix_s) if charge.about else "not noted"
    segment = charge.segment
    return (
        f"| {charge.counter} | {when} | {segment.noise_multiplier!r} | "
        f"{segment.sampling_probability!r} | {segment.steps} | "
        f"{'own model' if charge.about and charge.about.own else 'swarm'} |"
    )


def _date(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(unix_s))
