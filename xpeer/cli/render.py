"""A status as lines for people. Plain text: `xpeer status` must answer at once."""

from __future__ import annotations

from xpeer.status import Partner, Status


def status_lines(status: Status) -> list[str]:
    """Health first, with its reasons; then what an operator asks next."""
    lines = [f"health     {status.health}"]
    lines += [f"           - {reason}" for reason in status.reasons]
    if status.privacy.mode == "off":
        lines.append("PRIVACY IS OFF: the manifest says so; what is shared protects no record")
    lines += [
        f"swarm      {status.swarm_name or '-'} ({status.swarm_id[:16] or 'unknown'})",
        f"peer       {status.peer_id}",
        f"state      {status.state}, up {duration(status.uptime_s)}, xpeer {status.version}",
        *_training(status),
        *_privacy(status),
        *_exchange(status),
    ]
    if status.addresses:
        lines.append(f"address    {status.addresses[0]}")
    return lines


def _training(status: Status) -> list[str]:
    progress = status.progress
    planned = f" of {progress.planned_steps}" if progress.planned_steps else ""
    lines = [
        f"round      {status.round}, step {progress.step}{planned}, "
        f"{progress.tokens_per_s:,.0f} tokens/s on {status.device or '-'}",
        f"loss       public {_number(progress.loss_public)}; this node only: "
        f"train {_number(progress.loss_train)}, validation {_number(progress.loss_validation)}",
        f"checkpoint {_ago(status.last_checkpoint_age_s)}",
    ]
    if status.trainer_restarts or status.sidecar_restarts:
        lines.append(
            f"restarts   trainer {status.trainer_restarts}, sidecar {status.sidecar_restarts}"
        )
    return lines


def _privacy(status: Status) -> list[str]:
    privacy = status.privacy
    if privacy.mode == "off":
        return []
    left = "-" if privacy.steps_left is None else str(privacy.steps_left)
    return [
        f"privacy    epsilon {privacy.epsilon_spent:.3f} of {privacy.epsilon_target:g} spent "
        f"(delta {privacy.delta:.1e}), {left} steps left; {privacy.engine or '-'}"
    ]


def _exchange(status: Status) -> list[str]:
    failed = sum(status.exchanges_failed.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in status.exchanges_failed.items())
    alive = len(status.partners)
    ratio = f", {status.compression_ratio:.2f}x compressed" if status.compression_ratio else ""
    return [
        f"partners   {alive} alive; last good exchange {_ago(status.last_good_round_age_s)}",
        f"exchanges  {status.exchanges_done} done, {status.one_sided_merges} one-sided, "
        f"{failed} skipped{f' ({reasons})' if reasons else ''}",
        f"distance   {_number(status.progress.consensus_distance)} (consensus, relative)",
        f"traffic    {size(status.bytes_in)} in, {size(status.bytes_out)} out{ratio}, "
        f"{status.egress_cost:.4f} {status.currency}",
    ]


def partner_lines(partners: list[Partner]) -> list[str]:
    """A table of the members."""
    lines = [f"{'PEER':52} {'PHASE':12} {'SPEED':>5} {'DONE':>6} {'FAILED':>6} {'LAST':>8} REASON"]
    lines += [
        f"{p.peer_id:52} {p.phase:12} {p.speed:5g} {p.exchanges:6d} {p.failures:6d} "
        f"{_ago(p.last_exchange_age_s):>8} {p.last_reason}"
        for p in partners
    ]
    return lines


def duration(seconds: float) -> str:
    """Two units at most: 42s, 3m 5s, 7h 2m, 4d 1h."""
    whole = int(seconds)
    for length, unit, smaller, name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= length:
            return f"{whole // length}{unit} {whole % length // smaller}{name}"
    return f"{whole}s"


def size(num_bytes: float) -> str:
    """Decimal units, as networks are priced."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ago(age_s: float | None) -> str:
    return "never" if age_s is None else f"{duration(age_s)} ago"
