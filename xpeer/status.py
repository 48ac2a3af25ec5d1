"""What a node says of itself: one leaf type that `--json` prints and the table shows.

Values here are read by the node's own operator over its private socket. Losses on private text are
in it; they never leave the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from xpeer.escape import visible
from xpeer.health import HealthReason, Verdict
from xpeer.leaves import Derived, Local, Noised, Parts, Public, Timing, seen_by
from xpeer.phase import Phase
from xpeer.policies import PrivacyPolicy, privacy_policy

SCHEMA_VERSION = 2
_REASONS = 5
"""2: reasons are objects with a code, a text and a remedy; before, they were texts."""


@seen_by("node")
class Progress(Struct, frozen=True, kw_only=True):
    """The trainer's counters, sent to the daemon after every step."""

    step: Timing[int] = 0
    window: Timing[int] = 0
    tokens: Local[int] = 0
    planned_steps: Public[int | None] = None
    loss_train: Local[float | None] = None
    """Mean loss per token (nats) of the last step's private batch. Local only."""
    loss_train_age_s: Timing[float | None] = None
    """Since that step; None = there was none."""
    loss_validation: Local[float | None] = None
    """On held-out text of this shard. Local only."""
    loss_public: Derived[float | None] = None
    """On the manifest's public text."""
    loss_public_age: Timing[float] = 0.0
    """Windows of steps or of merges since then."""
    loss_measured_step: Timing[int | None] = None
    """At which the public and the validation loss were measured; None = not yet."""
    loss_measured_age_s: Timing[float | None] = None
    """Since then."""
    loss_problem: Local[str] = ""
    """Why they could not be measured the last time; empty: they could, or it was not tried."""
    learning_rate: Timing[float] = 0.0
    tokens_per_s: Local[float] = 0.0
    consensus_distance: Derived[float | None] = None
    """||s_j - s_i|| / ||s_i||, smoothed over exchanges."""
    merges: Timing[int] = 0
    merges_clipped: Derived[int] = 0
    """Of these, how many were clipped by norm and so are one-sided."""
    steps_late: Timing[float] = 0.0
    """Mean steps between snapshot and merge."""
    seconds_training: Timing[float] = 0.0
    """Of this run, earlier trainers' included."""
    seconds_here: Timing[float] = 0.0
    """Seconds of training since the trainer's start. All further seconds began then, too."""
    seconds_blocked: Timing[float] = 0.0
    """Seconds of `seconds_here` in which the loop waited for anything else than computing."""
    seconds_boundary: Timing[float] = 0.0
    """Between steps: merging, taking snapshots."""
    seconds_saving: Timing[float] = 0.0
    """Copying what checkpoints hold."""
    seconds_snapshot: Timing[float] = 0.0
    """Of these, copying fragments out of the model."""
    seconds_merge: Timing[float] = 0.0
    """Of these, adding corrections to it."""
    rest_s: Local[float] = 0.0
    """Left of the rest that training.throttle asks for; 0 = at work."""


@seen_by("node", "sigma and delta follow from the shard's size")
class PrivacySpent(Struct, frozen=True, kw_only=True):
    """The ledger's answer."""

    mode: Public[str] = "record"
    """Of the manifest. record: steps are charged; off: nothing."""
    epsilon_spent: Local[float] = 0.0
    epsilon_target: Public[float] = 0.0
    delta: Local[float] = 0.0
    noise_multiplier: Local[float] = 0.0
    steps_charged: Local[int] = 0
    steps_forfeited: Local[int] = 0
    """Of these, charged before a crash or a restored checkpoint and not behind this node's
    parameters: they are paid for a second time when they are taken again."""
    steps_left: Local[int | None] = None
    """Private steps until the target; None without privacy."""
    ends_unix_s: Local[float | None] = None
    """When they will be taken at the pace of the last hour; None = unknown."""
    unit: Public[str] = "record"
    """What epsilon holds for: one record (training sequence), or one whole document."""
    noise_norm: Local[float] = 0.0
    """Of a step's noise over all parameters, against a mean gradient of norm 1 (C) at most."""
    clip_norm: Noised[float] = 0.0
    """C of the next step; with adaptive clipping it follows released values."""
    documents_elsewhere: Local[int] = 0
    """Of the shard, that other homes of this machine trained on, too: counted together."""
    engine: Local[str] = ""
    engine_reason: Local[str] = ""
    """Why this one clips: speeds of the exact ones, and what was refused."""

    @property
    def policy(self) -> PrivacyPolicy:
        """What the mode asks of those who report it."""
        return privacy_policy(self.mode)


@seen_by("node", "of a corpus that every member holds, by declared speeds")
class CorpusShare(Struct, frozen=True, kw_only=True):
    """What of the shared corpus this node trains on."""

    units: Public[int]
    units_total: Public[int]
    unit_tokens: Public[int]
    """Of a unit, about: the granularity."""
    documents: Public[int]
    """Documents, and pieces of long ones."""
    documents_total: Public[int]
    tokens: Public[int] = 0
    """Of this node's records."""
    weight: Public[float]
    """This node's share by speed."""


@seen_by("node")
class ShardSummary(Struct, frozen=True, kw_only=True):
    """What the trainer found where the shard's text was said to be. Local only."""

    files: Local[int] = 0
    """That were read."""
    documents: Local[int] = 0
    """Different texts, each with something to see."""
    characters: Local[int] = 0
    """Of these."""
    repeated: Local[int] = 0
    """Texts that were there already."""
    too_short: Local[int] = 0
    """Documents of too few tokens for a record."""
    skipped: Local[dict[str, int]] = {}
    """Rows and files without text, by reason: empty, null, no field, not text."""
    left_out: Local[dict[str, int]] = {}
    """Files by reason: their kind (a suffix), hidden, broken link, pipe, mark-up, JSON, ..."""
    outside: Local[dict[str, int]] = {}
    """Files that only links in a folder lead to, by that folder."""

    def lines(self) -> list[str]:
        """In words; what there is none of goes unsaid."""
        lines = [
            f"{self.documents:,} documents, {self.characters:,} characters, in {self.files:,} files"
        ]
        if self.left_out:
            lines.append(_counted(self.left_out, "file", "left out"))
        for folder, count in self.outside.items():
            lines.append(f"{count:,} file{'' if count == 1 else 's'} outside {visible(folder)}")
        if self.skipped:
            lines.append(_counted(self.skipped, "row", "without text"))
        if self.repeated:
            lines.append(f"{self.repeated:,} texts that came before")
        if self.too_short:
            lines.append(f"{self.too_short:,} documents too short for a record")
        return lines


def _counted(counts: dict[str, int], what: str, fate: str) -> str:
    """`12 files left out: .gz 10, .json 2`."""
    total = sum(counts.values())
    return f"{total:,} {what}{'' if total == 1 else 's'} {fate}: {by_reason(counts)}"


def by_reason(counts: Mapping[str, int]) -> str:
    """`.gz 10, .json 2`: the most frequent first, rare ones together."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(order) > _REASONS:
        order = [*order[:_REASONS], ("others", sum(count for _, count in order[_REASONS:]))]
    return ", ".join(f"{why} {count:,}" for why, count in order)


@seen_by("node", "what others say and do")
class Partner(Struct, frozen=True, kw_only=True):
    """A member of the swarm as this node sees it."""

    peer_id: Public[str]
    name: Public[str] = ""
    """As its operator calls it; empty = not at all, or it is of an earlier version."""
    step: Public[int | None] = None
    """That it was at when it was last asked; None = unknown."""
    step_age_s: Public[float | None] = None
    """Since then."""
    exchange_s: Public[float | None] = None
    """That an exchange with it takes, smoothed; None = there was none."""
    state: Public[Literal["alive", "missed"]] = "alive"
    """missed: it fell silent without a word, within the last day."""
    silent_s: Public[float | None] = None
    """Seconds since a missed member was last seen; None: it is alive."""
    phase: Public[str] = ""
    role: Public[str] = "member"
    addresses: Public[list[str]] = []
    speed: Public[float | None] = None
    """Tokens per second, as it says; None: unknown."""
    exchanges: Public[int] = 0
    failures: Public[int] = 0
    skipped: Public[int] = 0
    """Slots that the schedule left out: not due, busy, paused, or avoided by us."""
    last_reason: Public[str] = ""
    avoided_s: Public[float] = 0.0
    """It failed, and is left alone for so much longer; 0 = it is not."""
    avoided_why: Public[str] = ""
    """The reason code of that failure."""
    privacy: Public[str] = ""
    """What the swarm's manifest binds its training to; its word, which nobody can check."""
    ledger_went_back: Public[str] = ""
    """What was seen when it showed fewer privacy charges than before; empty = never."""
    ledger_caught_up: Public[bool] = False
    """It has shown as many charges again as it once did."""
    last_exchange_age_s: Public[float | None] = None
    bytes_in: Public[int] = 0
    bytes_out: Public[int] = 0


@seen_by(
    "node",
    "answered on the Unix socket alone (xpeer_daemon.api); to systemd go health, "
    "state, step, the number of partners and the reasons' texts",
)
class Status(Struct, frozen=True, kw_only=True):
    """The whole answer of `xpeer status`."""

    schema_version: Public[int] = SCHEMA_VERSION
    health: Timing[Verdict] = "degraded"
    reasons: Parts[list[HealthReason]] = []
    """Why not ok, worst first, and notes."""
    state: Timing[Phase] = Phase.STARTING
    peer_id: Public[str] = ""
    name: Public[str] = ""
    swarm_id: Public[str] = ""
    swarm_name: Public[str] = ""
    version: Public[str] = ""
    pid: Public[int] = 0
    uptime_s: Timing[float] = 0.0
    addresses: Public[list[str]] = []
    num_params: Public[int] = 0
    device: Public[str] = ""
    round: Timing[int] = 0
    progress: Parts[Progress] = Progress()
    """As a trainer said last; ages are of now."""
    progress_age_s: Timing[float | None] = None
    """Since it said so; None = none has ever, and all numbers of it are unknown."""
    trainer_runs: Timing[bool] = True
    """False: progress and privacy are what was last known."""
    eta_unix_s: Timing[float | None] = None
    """When the run's last step will be taken, or the budget's, at the pace of the last hour; None =
    unknown."""
    corpus: Parts[CorpusShare | None] = None
    """None: a shard of its own."""
    shard: Parts[ShardSummary | None] = None
    """What was found where the text was said to be; None: no trainer yet."""
    privacy: Parts[PrivacySpent] = PrivacySpent()
    privacy_warning: Public[str] = ""
    """What the swarm's privacy mode does not give, if that is out of the ordinary."""
    partners: Parts[list[Partner]] = []
    exchanges_done: Timing[int] = 0
    exchanges_failed: Timing[dict[str, int]] = {}
    """Count by reason code; what the schedule leaves out is not among them."""
    exchanges_skipped: Timing[dict[str, int]] = {}
    """Slots that the schedule left out, by reason code: no failures."""
    one_sided_merges: Timing[int] = 0
    bytes_in: Timing[int] = 0
    bytes_out: Timing[int] = 0
    egress_cost: Timing[float] = 0.0
    currency: Public[str] = ""
    compression_ratio: Timing[float | None] = None
    """Float32 bytes of the fragments sent over the bytes that carried them."""
    last_good_round_age_s: Timing[float | None] = None
    last_checkpoint_age_s: Timing[float | None] = None
    trainer_restarts: Timing[int] = 0
    sidecar_restarts: Timing[int] = 0
    strangers_refused: Timing[int] = 0
