"""A status as lines for people: plain text always, coloured by rich only on a terminal.

Names and addresses in it came from other peers, so control characters are made visible.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from xpeer.escape import visible
from xpeer.health import duration
from xpeer.status import SHOUTED, CorpusShare, Partner, Status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDTH = 80
"""Of a terminal, as status is written for."""
_LABEL = 12
_COLOURS = {"ok": "bold green", "degraded": "bold yellow", "down": "bold red"}
_PEER_COLUMNS = (
    "PEER", "STATE", "PHASE", "ROLE", "SPEED", "PRIVACY", "LEDGER", "DONE", "FAILED", "LAST",
    "REASON", "IN", "OUT", "ADDRESS",
)  # fmt: skip


def status_lines(status: Status) -> list[str]:
    """What can't be overlooked, health and its reasons, then what an operator asks next."""
    lines = [status.privacy_warning] if status.privacy_warning else []
    lines.append(f"{'health':{_LABEL}}{status.health}")
    for reason in status.reasons:
        lines += _wrapped("note" if reason.severity == "note" else "reason", reason.text)
        lines += _wrapped("", f"-> {reason.remedy}") if reason.remedy else []
    rows = (*_who(status), *_training(status), *_privacy(status), *_exchange(status))
    return [*lines, *(f"{label:{_LABEL}}{visible(text)}" for label, text in rows)]


def health(status: Status) -> str:
    """Health with its reasons, in one line."""
    reasons = "; ".join(reason.text for reason in status.reasons)
    return visible(f"{status.health}: {reasons}" if reasons else status.health)


def summary(status: Status) -> str:
    """A status in one line, for `--watch` into a pipe."""
    progress, privacy = status.progress, status.privacy
    spent = (
        "PRIVACY OFF"
        if privacy.mode == "off"
        else f"epsilon {privacy.epsilon_spent:.3f}/{privacy.epsilon_target:g}"
    )
    return visible(
        f"{health(status)} | {status.state} round {status.round} step {progress.step}"
        f" | public loss {number(progress.loss_public)} | {progress.tokens_per_s:,.0f} tokens/s"
        f" | {live(status.partners)} partners | {spent} | out {size(status.bytes_out)}"
    )


def peer_lines(partners: Sequence[Partner]) -> list[str]:
    """A table of the members, columns as wide as they need to be."""
    rows = [_PEER_COLUMNS, *(_peer_row(partner) for partner in partners)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_PEER_COLUMNS))]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def show(lines: Sequence[str]) -> None:
    """Print lines: as they are into a pipe or file, coloured on a terminal."""
    if sys.stdout.isatty():
        console().print(painted(lines), soft_wrap=True)
    else:
        click.echo("\n".join(lines))


def console() -> Console:
    """Rich's view of stdout; without colour if NO_COLOR is set."""
    from rich.console import Console  # noqa: PLC0415 - only a terminal needs rich

    return Console(highlight=False, no_color=bool(os.environ.get("NO_COLOR")))


def painted(lines: Sequence[str]) -> Text:
    """Lines with labels dimmed and health and warnings coloured."""
    from rich.text import Text  # noqa: PLC0415 - only a terminal needs rich

    text = Text()
    for index, line in enumerate(lines):
        if line in SHOUTED.values():
            text.append(line, style="bold white on red")
        elif line.startswith("health "):
            word = line[_LABEL:].partition(":")[0]
            text.append(line[:_LABEL], style="dim").append(line[_LABEL:], _COLOURS.get(word, ""))
        elif line.startswith("PEER "):
            text.append(line, style="bold")
        elif line[_LABEL - 1 : _LABEL] == " ":
            text.append(line[:_LABEL], style="dim").append(line[_LABEL:])
        else:
            text.append(line)
        if index < len(lines) - 1:
            text.append("\n")
    return text


def live(partners: Sequence[Partner]) -> int:
    """How many of them are alive."""
    return sum(partner.state == "alive" for partner in partners)


def moment(unix_s: float) -> str:
    """Local time, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def size(num_bytes: float) -> str:
    """Decimal units, as networks are priced."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def number(value: float | None) -> str:
    """A loss or a distance; a dash if there is none yet."""
    return "-" if value is None else f"{value:.4f}"


def ago(age_s: float | None) -> str:
    """An age."""
    return "never" if age_s is None else f"{duration(age_s)} ago"


def _wrapped(label: str, text: str) -> list[str]:
    """A row in as many lines as it needs."""
    parts = textwrap.wrap(
        visible(text), WIDTH - _LABEL, break_on_hyphens=False, drop_whitespace=True
    )
    return [f"{label if i == 0 else '':{_LABEL}}{part}" for i, part in enumerate(parts)]


def _who(status: Status) -> Iterator[tuple[str, str]]:
    yield "swarm", f"{status.swarm_name or '-'} ({status.swarm_id[:16] or 'unknown'})"
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
    yield "state", f"{status.state}, round {status.round}, step {progress.step}{planned}"
    yield (
        "loss",
        f"public {number(progress.loss_public)}; never leaving this node: "
        f"train {number(progress.loss_train)}, validation {number(progress.loss_validation)}",
    )
    blocked = progress.seconds_blocked / progress.seconds_training * 100 if (
        progress.seconds_training
    ) else 0.0  # fmt: skip
    yield (
        "speed",
        f"{progress.tokens_per_s:,.0f} tokens/s on {status.device or '-'}, "
        f"{progress.tokens:,} tokens so far, {blocked:.1f}% of the time blocked",
    )
    for index, line in enumerate(status.shard.lines() if status.shard else []):
        yield "text" if index == 0 else "", line
    if status.corpus is not None:
        yield "corpus", _corpus(status.corpus)
    yield "checkpoint", ago(status.last_checkpoint_age_s)


def _corpus(share: CorpusShare) -> str:
    return (
        f"{share.units:,} of {share.units_total:,} units of {share.unit_tokens:,} tokens "
        f"({share.units / share.units_total:.1%}; by speed {share.weight:.1%}): "
        f"{share.documents:,} of {share.documents_total:,} documents, {share.tokens:,} tokens"
    )


def _privacy(status: Status) -> Iterator[tuple[str, str]]:
    privacy = status.privacy
    if privacy.mode == "off":
        return
    if not privacy.epsilon_target:
        yield "privacy", "-"  # no trainer yet
        return
    left = privacy.epsilon_target - privacy.epsilon_spent
    unit = "windows" if privacy.mode == "update" else "steps"
    steps = "" if privacy.steps_left is None else f" or {privacy.steps_left} {unit}"
    yield (
        "privacy",
        f"epsilon {privacy.epsilon_spent:.3f} of {privacy.epsilon_target:g} spent per "
        f"{privacy.unit}, "
        f"{max(left, 0.0):.3f}{steps} left; delta {privacy.delta:.1e}, "
        f"noise {privacy.noise_multiplier:.3f}, {privacy.steps_charged} {unit} charged",
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


def _exchange(status: Status) -> Iterator[tuple[str, str]]:
    gone = len(status.partners) - live(status.partners)
    yield "partners", f"{live(status.partners)} live" + (f", {gone} not" if gone else "")
    back = [p for p in status.partners if _is_back(p)]
    if back:
        names = "; ".join(f"{p.peer_id}: {p.ledger_went_back}" for p in back)
        yield "ledgers", f"{len(back)} went back, may spend a budget twice ({names})"
    yield (
        "exchanges",
        f"{status.exchanges_done} done, {_counted(status.exchanges_failed, 'failed')}, "
        f"{status.one_sided_merges} one-sided; last good round {ago(status.last_good_round_age_s)}",
    )
    if status.exchanges_skipped:
        yield "skipped", _counted(status.exchanges_skipped, "slots by the schedule")
    yield "distance", f"{number(status.progress.consensus_distance)} (consensus, relative)"
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
    """How many, and how many of them for which reason."""
    each = ", ".join(f"{count} {why}" for why, count in sorted(reasons.items()))
    return f"{sum(reasons.values())} {what}{f' ({each})' if each else ''}"


def _is_back(partner: Partner) -> bool:
    """Whether its ledger shows fewer charges than it once did."""
    return bool(partner.ledger_went_back) and not partner.ledger_caught_up


def _reason(partner: Partner) -> str:
    if partner.avoided_s > 0:
        return f"{partner.avoided_why}: avoided for {duration(partner.avoided_s)}"
    return partner.last_reason or "-"


def _peer_row(partner: Partner) -> tuple[str, ...]:
    cells = (
        partner.peer_id, partner.state, partner.phase or "-", partner.role,
        f"{partner.speed:g}" if partner.speed else "-",
        partner.privacy or "-", "WENT BACK" if _is_back(partner) else "ok",
        str(partner.exchanges), str(partner.failures), ago(partner.last_exchange_age_s),
        _reason(partner), size(partner.bytes_in), size(partner.bytes_out),
        partner.addresses[0] if partner.addresses else "-",
    )  # fmt: skip
    return tuple(visible(cell) for cell in cells)
