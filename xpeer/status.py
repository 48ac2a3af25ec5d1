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
from xpeer.phase import Phase
from xpeer.policies import PrivacyPolicy, privacy_policy

SCHEMA_VERSION = 2
_REASONS = 5
"""2: reasons are objects with a code, a text and a remedy; before, they were texts."""


class Progress(Struct, frozen=True, kw_only=True):
    """The trainer's counters, sent to the daemon after every step."""

    step: int = 0
    window: int = 0
    tokens: int = 0
    planned_steps: int | None = None
    loss_train: float | None = None
    """Mean loss per token (nats) of the last step's private batch. Local only."""
    loss_train_age_s: float | None = None
    """Since that step; None = there was none."""
    loss_validation: float | None = None
    """On held-out text of this shard. Local only."""
    loss_public: float | None = None
    """On the manifest's public text."""
    loss_public_age: float = 0.0
    """Windows of steps or of merges since then."""
    loss_measured_step: int | None = None
    """At which the public and the validation loss were measured; None = not yet."""
    loss_measured_age_s: float | None = None
    """Since then."""
    loss_problem: str = ""
    """Why they could not be measured the last time; empty: they could, or it was not tried."""
    learning_rate: float = 0.0
    tokens_per_s: float = 0.0
    consensus_distance: float | None = None
    """||s_j - s_i|| / ||s_i||, smoothed over exchanges."""
    merges: int = 0
    merges_clipped: int = 0
    """Of these, how many were clipped by norm and so are one-sided."""
    steps_late: float = 0.0
    """Mean steps between snapshot and merge."""
    seconds_training: float = 0.0
    """Of this run, earlier trainers' included."""
    seconds_here: float = 0.0
    """Seconds of training since the trainer's start. All further seconds began then, too."""
    seconds_blocked: float = 0.0
    """Seconds of `seconds_here` in which the loop waited for anything else than computing."""
    seconds_boundary: float = 0.0
    """Between steps: merging, taking snapshots."""
    seconds_saving: float = 0.0
    """Copying what checkpoints hold."""
    seconds_snapshot: float = 0.0
    """Of these, copying fragments out of the model."""
    seconds_merge: float = 0.0
    """Of these, adding corrections to it."""
    rest_s: float = 0.0
    """Left of the rest that training.throttle asks for; 0 = at work."""


class PrivacySpent(Struct, frozen=True, kw_only=True):
    """The ledger's answer."""

    mode: str = "record"
    """Of the manifest. record: steps are charged; off: nothing."""
    epsilon_spent: float = 0.0
    epsilon_target: float = 0.0
    delta: float = 0.0
    noise_multiplier: float = 0.0
    steps_charged: int = 0
    steps_forfeited: int = 0
    """Of these, charged before a crash or a restored checkpoint and not behind this node's
    parameters: they are paid for a second time when they are taken again."""
    steps_left: int | None = None
    """Private steps until the target; None without privacy."""
    ends_unix_s: float | None = None
    """When they will be taken at the pace of the last hour; None = unknown."""
    unit: str = "record"
    """What epsilon holds for: one record (training sequence), or one whole document."""
    noise_norm: float = 0.0
    """Of a step's noise over all parameters, against a mean gradient of norm 1 (C) at most."""
    clip_norm: float = 0.0
    """C of the next step; with adaptive clipping it follows released values."""
    documents_elsewhere: int = 0
    """Of the shard, that other homes of this machine trained on, too: counted together."""
    engine: str = ""
    engine_reason: str = ""
    """Why this one clips: speeds of the exact ones, and what was refused."""

    @property
    def policy(self) -> PrivacyPolicy:
        """What the mode asks of those who report it."""
        return privacy_policy(self.mode)


class CorpusShare(Struct, frozen=True, kw_only=True):
    """What of the shared corpus this node trains on."""

    units: int
    units_total: int
    unit_tokens: int
    """Of a unit, about: the granularity."""
    documents: int
    """Documents, and pieces of long ones."""
    documents_total: int
    tokens: int = 0
    """Of this node's records."""
    weight: float
    """This node's share by speed."""


class ShardSummary(Struct, frozen=True, kw_only=True):
    """What the trainer found where the shard's text was said to be. Local only."""

    files: int = 0
    """That were read."""
    documents: int = 0
    """Different texts, each with something to see."""
    characters: int = 0
    """Of these."""
    repeated: int = 0
    """Texts that were there already."""
    too_short: int = 0
    """Documents of too few tokens for a record."""
    skipped: dict[str, int] = {}
    """Rows and files without text, by reason: empty, null, no field, not text."""
    left_out: dict[str, int] = {}
    """Files by reason: their kind (a suffix), hidden, broken link, pipe, mark-up, JSON, ..."""
    outside: dict[str, int] = {}
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


class Partner(Struct, frozen=True, kw_only=True):
    """A member of the swarm as this node sees it."""

    peer_id: str
    name: str = ""
    """As its operator calls it; empty = not at all, or it is of an earlier version."""
    step: int | None = None
    """That it was at when it was last asked; None = unknown."""
    step_age_s: float | None = None
    """Since then."""
    exchange_s: float | None = None
    """That an exchange with it takes, smoothed; None = there was none."""
    state: Literal["alive", "missed"] = "alive"
    """missed: it fell silent without a word, within the last day."""
    silent_s: float | None = None
    """Seconds since a missed member was last seen; None: it is alive."""
    phase: str = ""
    role: str = "member"
    addresses: list[str] = []
    speed: float | None = None
    """Tokens per second, as it says; None: unknown."""
    exchanges: int = 0
    failures: int = 0
    skipped: int = 0
    """Slots that the schedule left out: not due, busy, paused, or avoided by us."""
    last_reason: str = ""
    avoided_s: float = 0.0
    """It failed, and is left alone for so much longer; 0 = it is not."""
    avoided_why: str = ""
    """The reason code of that failure."""
    privacy: str = ""
    """What the swarm's manifest binds its training to; its word, which nobody can check."""
    ledger_went_back: str = ""
    """What was seen when it showed fewer privacy charges than before; empty = never."""
    ledger_caught_up: bool = False
    """It has shown as many charges again as it once did."""
    last_exchange_age_s: float | None = None
    bytes_in: int = 0
    bytes_out: int = 0


class Status(Struct, frozen=True, kw_only=True):
    """The whole answer of `xpeer status`."""

    schema_version: int = SCHEMA_VERSION
    health: Verdict = "degraded"
    reasons: list[HealthReason] = []
    """Why not ok, worst first, and notes."""
    state: Phase = Phase.STARTING
    peer_id: str = ""
    name: str = ""
    swarm_id: str = ""
    swarm_name: str = ""
    version: str = ""
    pid: int = 0
    uptime_s: float = 0.0
    addresses: list[str] = []
    num_params: int = 0
    device: str = ""
    round: int = 0
    progress: Progress = Progress()
    """As a trainer said last; ages are of now."""
    progress_age_s: float | None = None
    """Since it said so; None = none has ever, and all numbers of it are unknown."""
    trainer_runs: bool = True
    """False: progress and privacy are what was last known."""
    eta_unix_s: float | None = None
    """When the run's last step will be taken, or the budget's, at the pace of the last hour; None =
    unknown."""
    corpus: CorpusShare | None = None
    """None: a shard of its own."""
    shard: ShardSummary | None = None
    """What was found where the text was said to be; None: no trainer yet."""
    privacy: PrivacySpent = PrivacySpent()
    privacy_warning: str = ""
    """What the swarm's privacy mode does not give, if that is out of the ordinary."""
    partners: list[Partner] = []
    exchanges_done: int = 0
    exchanges_failed: dict[str, int] = {}
    """Count by reason code; what the schedule leaves out is not among them."""
    exchanges_skipped: dict[str, int] = {}
    """Slots that the schedule left out, by reason code: no failures."""
    one_sided_merges: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    egress_cost: float = 0.0
    currency: str = ""
    compression_ratio: float | None = None
    """Float32 bytes of the fragments sent over the bytes that carried them."""
    last_good_round_age_s: float | None = None
    last_checkpoint_age_s: float | None = None
    trainer_restarts: int = 0
    sidecar_restarts: int = 0
    strangers_refused: int = 0
