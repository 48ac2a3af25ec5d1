"""A status as lines for people: plain text always, coloured by rich only on a terminal.

Names and addresses in it come from other peers, so control characters are made visible.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from xpeer.escape import visible
from xpeer.health import duration
from xpeer.status import CorpusShare, Partner, PrivacySpent, Progress, Status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDTH = 80
"""Width that the lines are made for, in characters."""
_LABEL = 12
_COLOURS = {"ok": "bold green", "degraded": "bold yellow", "down": "bold red"}
HEADS = ("NAME ", "PEER ")
_PARTNERS = 8
"""Members that get a line each in a status."""


def status_lines(status: Status, *, wide: bool = False) -> list[str]:
    """A whole status: first warnings, health and its reasons, then details.

    Args:
        status: of the node.
        wide: True = do not wrap lines, so that addresses and ids can be copied.
    """
    width = 10**6 if wide else WIDTH
    lines = textwrap.wrap(visible(status.privacy_warning), width)
    lines.append(f"{'health':{_LABEL}}{status.health}")
    for reason in status.reasons:
        label = "note" if reason.severity == "note" else "reason"
        lines += _wrapped(label, reason.text, width)
        lines += _wrapped("", f"-> {reason.remedy}", width) if reason.remedy else []
    for label, text in (*_who(status), *_training(status), *_privacy(status), *_exchange(status)):
        lines += _wrapped(label, text, width)
    return lines


def health(status: Status) -> str:
    """Health with its reasons, in one line."""
    reasons = "; ".join(reason.text for reason in status.reasons)
    return visible(f"{status.health}: {reasons}" if reasons else status.health)


def summary(status: Status) -> str:
    """A status in one line, for `--watch` when it writes into a pipe."""
    progress, privacy = status.progress, status.privacy
    spent = (
        f"epsilon {privacy.epsilon_spent:.3f}/{privacy.epsilon_target:g}"
        if privacy.policy.charges
        else "PRIVACY OFF"
    )
    return visible(
        f"{health(status)} | {status.state} round {status.round} step {_step(status)}"
        f" | public loss {number(progress.loss_public)} | {_speed(status)}"
        f" | {live(status.partners)} partners | {spent} | out {size(status.bytes_out)}"
    )


def show(lines: Sequence[str]) -> None:
    """Print lines: coloured on a terminal, plain elsewhere."""
    if sys.stdout.isatty():
        console().print(painted(lines), soft_wrap=True)
    else:
        click.echo("\n".join(lines))


def console() -> Console:
    """Rich's console on stdout; it has no colours if NO_COLOR is set."""
    from rich.console import Console  # noqa: PLC0415 - only a terminal needs rich

    return Console(highlight=False, no_color=bool(os.environ.get("NO_COLOR")))


def painted(lines: Sequence[str]) -> Text:
    """Colour lines of a status or a table: labels dim, health and warnings bright."""
    from rich.text import Text  # noqa: PLC0415 - only a terminal needs rich

    text, shouting = Text(), True
    for index, line in enumerate(lines):
        shouting = shouting and not line.startswith(("health ", *HEADS))
        if shouting:
            text.append(line, style="bold white on red")
        elif line.startswith("health "):
            word = line[_LABEL:].partition(":")[0]
            text.append(line[:_LABEL], style="dim").append(line[_LABEL:], _COLOURS.get(word, ""))
        elif line.startswith(HEADS):
            text.append(line, style="bold")
        elif line[_LABEL - 1 : _LABEL] == " ":
            text.append(line[:_LABEL], style="dim").append(line[_LABEL:])
        else:
            text.append(line)
        if index < len(lines) - 1:
            text.append("\n")
    return text


def live(partners: Sequence[Partner]) -> int:
    """How many of these members are alive."""
    return sum(partner.state == "alive" for partner in partners)


def moment(unix_s: float) -> str:
    """A time in the local zone, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def size(num_bytes: float) -> str:
    """A number of bytes in decimal units, as traffic is priced."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def number(value: float | None) -> str:
    """A loss or a distance; a dash if there is none yet."""
    return "-" if value is None else f"{value:.4f}"


def ago(age_s: float | None) -> str:
    """An age in words; "never" for None."""
    return "never" if age_s is None else f"{duration(age_s)} ago"


def _wrapped(label: str, text: str, width: int) -> list[str]:
    """Wrap a row. An address that is too long breaks before its PeerID."""
    text = visible(text)
    if len(text) > width - _LABEL:
        text = re.sub(r"(?<=\S)/p2p/", " /p2p/", text)
    parts = textwrap.wrap(text, width - _LABEL, break_on_hyphens=False)
    return [f"{label if i == 0 else '':{_LABEL}}{part}" for i, part in enumerate(parts or ["-"])]


def _who(status: Status) -> Iterator[tuple[str, str]]:
    yield "swarm", f"{status.swarm_name or '-'} ({status.swarm_id[:16] or 'unknown'})"
    if status.name:
        yield "name", status.name
    yield "peer", status.peer_id or "-"
    if status.addresses:
        yield "address", status.addresses[0]
    running = f"up {duration(status.uptime_s)}, pid {status.pid}, xpeer {status.version}"
    yield "daemon", running
    if status.trainer_restarts or status.sidecar_restarts:
        yield "restarts", f"trainer {status.trainer_restarts}, sidecar {status.sidecar_restarts}"


def _training(status: Status) -> Iterator[tuple[str, str]]:
    progress = status.progress
    planned = f" of {progress.planned_steps}" if progress.planned_steps else ""
    state = f"{status.state}, round {status.round}, step {_step(status)}{planned}"
    yield "state", state + _as_last_known(status)
    if (fetching := status.fetching) is not None:
        done, total = fetching.bytes_done / 1e6, fetching.bytes_total / 1e6
        left = "" if fetching.eta_s is None else f", {duration(fetching.eta_s)} left"
        speed = f"{fetching.bytes_per_s / 1e6:.1f} MB/s from {len(fetching.donors)} members"
        yield "fetching", f"{done:.1f} of {total:.1f} MB, {speed}{left}"
    if status.joiners:
        yield "joiners", f"{status.joiners} are given parameters by this node"
    if progress.seconds_training:
        eta = f"; ETA {moment(status.eta_unix_s)}" if status.eta_unix_s is not None else ""
        yield "time", f"{duration(progress.seconds_training)} of training so far{eta}"
    yield "loss", f"public {_measured(progress.loss_public, progress)}"
    if progress.loss_train is not None or progress.loss_validation is not None:
        train = f"train {number(progress.loss_train)}{_old(progress.loss_train_age_s)}"
        validation = f"validation {_measured(progress.loss_validation, progress)}"
        yield "", f"never leaving this node: {train}; {validation}"
    blocked = ""
    if progress.seconds_here:
        share = progress.seconds_blocked / progress.seconds_here
        blocked = f", {share:.1%} of the time blocked"
    place = f"{status.device or '-'}{f' in {status.precision}' if status.precision else ''}"
    yield "speed", f"{_speed(status)} on {place}, {progress.tokens:,} tokens so far{blocked}"
    if progress.learning_rate:
        yield "rate", f"learning rate {progress.learning_rate:.3g}"
    for index, line in enumerate(status.shard.lines() if status.shard else []):
        yield "text" if index == 0 else "", line
    if status.tokenising is not None:
        yield "tokens", status.tokenising.in_words()
    if status.corpus is not None:
        yield "corpus", _corpus(status.corpus)
    yield "checkpoint", ago(status.last_checkpoint_age_s)


def _step(status: Status) -> str:
    """The step; "-" while it is unknown."""
    unknown = not status.trainer_runs and status.progress_age_s is None
    return "-" if unknown else str(status.progress.step)


def _speed(status: Status) -> str:
    speed = status.progress.tokens_per_s
    return f"{speed:,.0f} tokens/s" if speed else "- tokens/s"


def _as_last_known(status: Status) -> str:
    if status.trainer_runs:
        return ""
    if status.progress_age_s is None:
        return " (nothing is known yet: no trainer has run)"
    return f" (as last known {ago(status.progress_age_s)}: no trainer runs)"


def _measured(loss: float | None, progress: Progress) -> str:
    if loss is None:
        return "-"
    step = progress.loss_measured_step
    at = f" at step {step}" if step is not None else ""
    return f"{number(loss)}{_old(progress.loss_measured_age_s)}{at}"


def _old(age_s: float | None) -> str:
    return "" if age_s is None else f", {ago(age_s)}"


def _corpus(share: CorpusShare) -> str:
    return (
        f"{share.units:,} of {share.units_total:,} units of {share.unit_tokens:,} tokens "
        f"({share.units / share.units_total:.1%}; by speed {share.weight:.1%}): "
        f"{share.documents:,} of {share.documents_total:,} documents, {share.tokens:,} tokens"
    )


def _privacy(status: Status) -> Iterator[tuple[str, str]]:
    privacy = status.privacy
    if not privacy.policy.charges:
        return
    if not privacy.epsilon_target:
        yield "privacy", "-"  # no trainer yet
        return
    yield (
        "privacy",
        f"epsilon {privacy.epsilon_spent:.3f} of {privacy.epsilon_target:g} spent per "
        f"{privacy.unit}, {_left(privacy)}; delta {privacy.delta:.1e}, "
        f"noise {privacy.noise_multiplier:.3f}, {privacy.steps_charged} steps charged",
    )
    if privacy.steps_forfeited:
        yield (
            "charged twice",
            f"{privacy.steps_forfeited} of these steps: charged, then lost at a crash or stop",
        )
    if privacy.ends_unix_s is not None and privacy.steps_left:
        yield "budget ends", f"about {moment(privacy.ends_unix_s)}, at the pace of the last hour"
    if privacy.documents_elsewhere:
        yield (
            "documents",
            f"{privacy.documents_elsewhere} were trained on by other homes of this machine, too: "
            "counted together",
        )
    if privacy.engine:
        reason = f": {privacy.engine_reason}" if privacy.engine_reason else ""
        yield "clipping", f"to {privacy.clip_norm:.3g} by {privacy.engine}{reason}"


def _left(privacy: PrivacySpent) -> str:
    """What is left of the budget. If the rest is too small for another step, it says so."""
    left = max(0.0, privacy.epsilon_target - privacy.epsilon_spent)
    if kept := privacy.epsilon_kept_back:
        steps = f"{privacy.steps_left} of the swarm's steps left" if privacy.steps_left else ""
        return f"{steps or 'no steps left'}; {kept:g} is kept back for `xpeer finetune`"
    if privacy.steps_left is None:
        return f"{left:.3f} left"
    if privacy.steps_left == 0:
        rest = f": the other {left:.3f} are less than one costs" if left >= 0.0005 else ""
        return f"no steps left{rest}"
    return f"{left:.3f} or {privacy.steps_left} steps left"


def _exchange(status: Status) -> Iterator[tuple[str, str]]:
    yield "partners", _in_phases(status.partners)
    for partner in status.partners[:_PARTNERS]:
        yield "", _partner(partner)
    if len(status.partners) > _PARTNERS:
        yield "", f"and {len(status.partners) - _PARTNERS} more: `xpeer peers`"
    back = [p for p in status.partners if is_back(p)]
    if back:
        names = "; ".join(f"{_called(p)}: {p.ledger_went_back}" for p in back)
        yield "ledgers", f"{len(back)} went back, may spend a budget twice ({names})"
    yield (
        "exchanges",
        f"{status.exchanges_done} done, {_counted(status.exchanges_failed, 'failed')}, "
        f"{status.one_sided_merges} one-sided; last good round {ago(status.last_good_round_age_s)}",
    )
    if status.exchanges_skipped:
        yield "skipped", _counted(status.exchanges_skipped, "slots by the schedule")
    lost = status.progress.adapter_misalignment
    adapters = "" if lost is None else f"; averaging loses {lost:.2%} of what the adapters do"
    yield (
        "distance",
        f"{number(status.progress.consensus_distance)} (consensus, relative){adapters}",
    )
    ratio = f" ({status.compression_ratio:.2f}x compressed)" if status.compression_ratio else ""
    price = (
        f", at {status.egress_cost / status.bytes_out * 1e9:g} per GB" if status.bytes_out else ""
    )
    yield (
        "traffic",
        f"in {size(status.bytes_in)}, out {size(status.bytes_out)}{ratio}; "
        f"cost {status.egress_cost:.4f} {status.currency}{price}",
    )
    if status.strangers_refused:
        yield "strangers", f"{status.strangers_refused} refused"


def _counted(reasons: dict[str, int], what: str) -> str:
    """The sum, with the count of each reason in brackets."""
    each = ", ".join(f"{count} {why}" for why, count in sorted(reasons.items()))
    return f"{sum(reasons.values())} {what}{f' ({each})' if each else ''}"


def is_back(partner: Partner) -> bool:
    """Whether this member's ledger has fewer charges than it once had."""
    return bool(partner.ledger_went_back) and not partner.ledger_caught_up


def _in_phases(partners: Sequence[Partner]) -> str:
    """How many members are live, and how many of them are in each phase.

    A node that waits for peers counts only some phases, so the operator needs these numbers.
    """
    gone = len(partners) - live(partners)
    phases = Counter(p.phase for p in partners if p.state == "alive" and p.phase)
    each = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
    missed = f", {gone} missed" if gone else ""
    return f"{live(partners)} live{f' ({each})' if each else ''}{missed}"


def _partner(partner: Partner) -> str:
    """A member in one line."""
    step = "" if partner.step is None else f", step {partner.step}"
    took = "" if partner.exchange_s is None else f", takes {partner.exchange_s:.1f} s"
    met = f"exchange {ago(partner.last_exchange_age_s)}" if partner.exchanges else "no exchange yet"
    doing = partner.phase or partner.state
    if partner.silent_s is not None:
        doing = f"missed for {duration(partner.silent_s)}"
    return f"{_called(partner)}: {doing}{step}; {met}{took}"


def _called(partner: Partner) -> str:
    """A member's name with the end of its PeerID, since two members may have the same name."""
    short = partner.peer_id[-8:]
    return f"{partner.name} ({short})" if partner.name else short
