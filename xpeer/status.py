"""The status of a node: the types that `xpeer status --json` prints and its table shows.

The node's own operator reads them over a private socket. They contain losses on private text, which
never leave the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from xpeer.amounts import size
from xpeer.escape import visible
from xpeer.health import HealthReason, Verdict, duration
from xpeer.leaves import Derived, Local, Noised, Parts, Public, Timing, seen_by
from xpeer.phase import Phase
from xpeer.policies import PrivacyPolicy, privacy_policy

SCHEMA_VERSION = 2
"""In version 2 reasons are objects with a code, a text and a remedy; before, they were texts."""
_REASONS = 5
"""Number of reasons that `by_reason` names; the counts of rarer ones are added up."""


@seen_by("node")
class Progress(Struct, frozen=True, kw_only=True):
    """The trainer's counters. The daemon gets them after steps, every 0.1 s at most, and whenever a
    window ends.
    """

    step: Timing[int] = 0
    window: Timing[int] = 0
    tokens: Local[int] = 0
    planned_steps: Public[int | None] = None
    loss_train: Local[float | None] = None
    """Mean loss per token (nats) of the last step's private batch. Local only."""
    loss_train_age_s: Timing[float | None] = None
    """Seconds since that step; None until there is one."""
    loss_validation: Local[float | None] = None
    """Loss per token on held-out text of this shard; None until it is measured. Local only."""
    loss_public: Derived[float | None] = None
    """Loss per token on the manifest's public text; None until it is measured."""
    loss_public_age: Timing[float] = 0.0
    """Windows of steps or of merges since the public loss was measured."""
    loss_measured_step: Timing[int | None] = None
    """Step at which the public and the validation loss were measured; None until they are."""
    loss_measured_age_s: Timing[float | None] = None
    """Seconds since they were measured; None until they are."""
    loss_problem: Local[str] = ""
    """Why the last attempt to measure these two failed; "" if it succeeded, or there was none."""
    learning_rate: Timing[float] = 0.0
    tokens_per_s: Local[float] = 0.0
    consensus_distance: Derived[float | None] = None
    """||Q(theta_j) - Q(theta_i)|| / ||Q(theta_i)|| of the exchanged fragments, smoothed over
    exchanges."""
    adapter_misalignment: Derived[float | None] = None
    """||mean(BA) - mean(B) mean(A)|| / ||mean(BA)|| between this node and its last partners, over
    all adapters: the fraction of their work that averaging the factors apart loses. Measured with
    the losses. None until each fragment was merged once, or without adapters."""
    merges: Timing[int] = 0
    merges_clipped: Derived[int] = 0
    """Number of partners' differences that were clipped by norm before they were merged. Such a
    merge is one-sided."""
    steps_late: Timing[float] = 0.0
    """Mean number of steps between snapshot and merge."""
    seconds_training: Timing[float] = 0.0
    """Seconds of training in this run, earlier trainers' included."""
    seconds_here: Timing[float] = 0.0
    """Seconds that the trainer spent in steps, in waits and at step boundaries since its start. The
    counts below start there, too."""
    seconds_blocked: Timing[float] = 0.0
    """Part of `seconds_here` in which the loop waited: for the ledger, the group, or a lock."""
    seconds_boundary: Timing[float] = 0.0
    """Part of `seconds_here` between steps: merging, taking snapshots."""
    seconds_saving: Timing[float] = 0.0
    """Seconds spent on copying what checkpoints hold."""
    seconds_snapshot: Timing[float] = 0.0
    """Part of `seconds_boundary`: copying fragments out of the model."""
    seconds_merge: Timing[float] = 0.0
    """Part of `seconds_boundary`: adding corrections to the model."""
    rest_s: Local[float] = 0.0
    """Seconds that remain of the rest that training.throttle asks for; 0 = at work."""


@seen_by("node", "sigma and delta follow from the shard's size")
class PrivacySpent(Struct, frozen=True, kw_only=True):
    """What this node has spent of its privacy budget, by its ledger."""

    mode: Public[str] = "record"
    """`privacy.mode` of the manifest. record: steps are charged; off: nothing is charged."""
    epsilon_spent: Local[float] = 0.0
    epsilon_target: Public[float] = 0.0
    epsilon_kept_back: Local[float] = 0.0
    """The part of the target that the swarm's steps leave for own steps (`privacy.keep_back`)."""
    delta: Local[float] = 0.0
    noise_multiplier: Local[float] = 0.0
    steps_charged: Local[int] = 0
    steps_forfeited: Local[int] = 0
    """Steps that were charged but are not behind this node's parameters, after a crash or a
    restored checkpoint. Taking them again costs a second charge. `steps_charged` includes them."""
    steps_left: Local[int | None] = None
    """Private steps until the target less what is kept back; None without privacy."""
    ends_unix_s: Local[float | None] = None
    """When the last of them will be taken, at the pace of the last hour; None = unknown."""
    unit: Public[str] = "record"
    """What epsilon holds for: one record (training sequence), or one whole document."""
    noise_norm: Local[float] = 0.0
    """Norm of a step's noise over all parameters, in units of the clipping norm C. The mean
    gradient's norm is at most 1 in these units."""
    clip_norm: Noised[float] = 0.0
    """Clipping norm C of the next step; with adaptive clipping it follows released values."""
    documents_elsewhere: Local[int] = 0
    """Documents of the shard that other homes of this machine also trained on. Their charges are
    included here."""
    engine: Local[str] = ""
    """Name of the code that clips the gradients."""
    engine_reason: Local[str] = ""
    """Why this engine was chosen: the speeds of the exact ones, and which were refused."""
    engine_refused: Local[str] = ""
    """Code that is preferred to this engine, and why the test at the start refused it."""

    @property
    def policy(self) -> PrivacyPolicy:
        """The policy of this mode."""
        return privacy_policy(self.mode)


@seen_by("node", "of a corpus that every member holds, by declared speeds")
class CorpusShare(Struct, frozen=True, kw_only=True):
    """The part of the shared corpus that this node trains on."""

    units: Public[int]
    """Corpus blocks of this node."""
    units_total: Public[int]
    unit_tokens: Public[int]
    """Approximate number of tokens in a corpus block: how finely the corpus can be divided."""
    documents: Public[int]
    """Documents, and pieces of long ones, of this node."""
    documents_total: Public[int]
    tokens: Public[int] = 0
    """Tokens in this node's records."""
    weight: Public[float]
    """Fraction of the corpus that this node gets by its speed."""


@seen_by("node")
class ShardSummary(Struct, frozen=True, kw_only=True):
    """Text that the trainer read for the shard, and files that it left out. Local only."""

    files: Local[int] = 0
    """Files that were read."""
    documents: Local[int] = 0
    """Different texts that are not blank."""
    characters: Local[int] = 0
    """Characters in these documents."""
    repeated: Local[int] = 0
    """Texts that are the same as an earlier one."""
    too_short: Local[int] = 0
    """Documents of too few tokens for a record."""
    cut: Local[int] = 0
    """Examples to train on that are longer than a record, and so are cut off."""
    unanswered: Local[int] = 0
    """Those of them that are cut off before their answer: nothing is learnt of them."""
    unpredicted: Local[int] = 0
    """Examples whose answer makes no token: nothing is learnt of these either."""
    skipped: Local[dict[str, int]] = {}
    """Number of rows and files without text, by reason: empty, null, no field, not text."""
    left_out: Local[dict[str, int]] = {}
    """Number of files that were not read, by reason: their kind (a suffix), hidden, broken link,
    pipe, mark-up, JSON, ..."""
    outside: Local[dict[str, int]] = {}
    """Number of files outside a named folder that a link inside it leads to, by that folder."""

    def lines(self) -> list[str]:
        """Describe it in English, a line a fact. Counts of 0 get no line."""
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
        if self.cut:
            lines.append(f"{self.cut:,} examples cut off, {self.unanswered:,} before their answer")
        if self.unpredicted:
            lines.append(f"{self.unpredicted:,} examples whose answer makes no token")
        return lines


def _counted(counts: dict[str, int], what: str, fate: str) -> str:
    """Format a total with its reasons: `12 files left out: .gz 10, .json 2`."""
    total = sum(counts.values())
    return f"{total:,} {what}{'' if total == 1 else 's'} {fate}: {by_reason(counts)}"


def by_reason(counts: Mapping[str, int]) -> str:
    """Format counts: `.gz 10, .json 2`. The most frequent come first; rare ones are added up."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(order) > _REASONS:
        order = [*order[:_REASONS], ("others", sum(count for _, count in order[_REASONS:]))]
    return ", ".join(f"{why} {count:,}" for why, count in order)


@seen_by("node", "how long this node reads its text is seen by nobody")
class TextProgress(Struct, frozen=True, kw_only=True):
    """How far the trainer is with the tokens of its text. Local only."""

    bytes_read: Local[int] = 0
    """Bytes of the text files that are tokenised; those of earlier starts included."""
    bytes_total: Local[int] = 0
    documents: Local[int] = 0
    """Documents that this start tokenised so far."""
    tokens: Local[int] = 0
    """Tokens that this start made so far."""
    bytes_per_s: Local[float] = 0.0
    eta_s: Local[float | None] = None
    """Seconds until all text is tokenised; None = unknown."""

    def in_words(self) -> str:
        """How far it is, how fast, and how long it will take."""
        done = self.bytes_read / self.bytes_total if self.bytes_total else 1.0
        left = "" if self.eta_s is None else f", {duration(self.eta_s)} left"
        return (
            f"{size(self.bytes_read)} of {size(self.bytes_total)} ({done:.0%}) are tokenised, "
            f"{size(self.bytes_per_s)}/s{left}; {self.documents:,} documents"
        )


@seen_by("node", "what others say and do")
class Partner(Struct, frozen=True, kw_only=True):
    """A member of the swarm as this node sees it."""

    peer_id: Public[str]
    name: Public[str] = ""
    """Name that its operator gave it; "" = none, or it runs an earlier version."""
    step: Public[int | None] = None
    """Its step when we last asked it; None = unknown."""
    step_age_s: Public[float | None] = None
    """Seconds since it gave that answer; None = it gave none."""
    exchange_s: Public[float | None] = None
    """Smoothed seconds of an exchange with it; None until there is one."""
    state: Public[Literal["alive", "missed"]] = "alive"
    """missed: it fell silent within the last day, and did not say that it leaves."""
    silent_s: Public[float | None] = None
    """Seconds since a missed member was last seen; None: it is alive."""
    phase: Public[str] = ""
    role: Public[str] = "member"
    addresses: Public[list[str]] = []
    speed: Public[float | None] = None
    """Tokens per second, as its card says; None: unknown."""
    exchanges: Public[int] = 0
    failures: Public[int] = 0
    skipped: Public[int] = 0
    """Slots without an exchange that are no failures: not due, busy, paused, or avoided by us."""
    last_reason: Public[str] = ""
    """Reason code of the last failure, else of the last skipped slot; "" = neither yet."""
    avoided_s: Public[float] = 0.0
    """Seconds for which we still avoid it after a failure; 0 = we do not avoid it."""
    avoided_why: Public[str] = ""
    """Reason code of that failure; "" while we do not avoid it."""
    privacy: Public[str] = ""
    """Privacy that the swarm's manifest demands of its training. Nobody can check that it keeps
    it."""
    ledger_went_back: Public[str] = ""
    """Numbers of charges when its privacy ledger last showed fewer than before; "" = never."""
    ledger_caught_up: Public[bool] = False
    """True iff its ledger once went back, and has shown as many charges again since."""
    last_exchange_age_s: Public[float | None] = None
    """Seconds since the last exchange with it; None until there is one."""
    bytes_in: Public[int] = 0
    """Bytes of payloads merged with it. Both sides of an exchange send payloads of one length, so
    `bytes_out` is the same number."""
    bytes_out: Public[int] = 0


@seen_by("node")
class Fetching(Struct, frozen=True, kw_only=True):
    """How far a transfer of the swarm's parameters to this node is."""

    bytes_done: Timing[int]
    """Of pieces that are here and verified, those of earlier starts included."""
    bytes_total: Public[int]
    bytes_per_s: Timing[float]
    """Over the last 20 s."""
    eta_s: Timing[float | None] = None
    """Seconds until all is here, at that speed; None = nothing came lately."""
    donors: Timing[list[str]] = []
    """PeerIDs of the members that give now."""


@seen_by(
    "node",
    "answered on the Unix socket alone (xpeer_daemon.api); to systemd go health, "
    "state, step, the number of partners and the reasons' texts",
)
class Status(Struct, frozen=True, kw_only=True):
    """Everything that `xpeer status` prints."""

    schema_version: Public[int] = SCHEMA_VERSION
    health: Timing[Verdict] = "degraded"
    reasons: Parts[list[HealthReason]] = []
    """Active conditions: those because of which the node is not ok, worst first, then notes."""
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
    precision: Public[str] = ""
    """In what the model computes: float32 or bfloat16; empty until a trainer is ready."""
    round: Timing[int] = 0
    """Number of the trainer's window."""
    progress: Parts[Progress] = Progress()
    """The last counters that a trainer sent; the ages in them are brought up to date."""
    progress_age_s: Timing[float | None] = None
    """Seconds since a trainer sent them; None = none ever did, and `progress` means nothing."""
    trainer_runs: Timing[bool] = True
    """True iff there is a trainer now. Otherwise progress and privacy are what was last known."""
    eta_unix_s: Timing[float | None] = None
    """When the last step will be taken, the run's or the budget's, at the pace of the last hour;
    None = unknown."""
    fetching: Parts[Fetching | None] = None
    """None: no transfer of parameters to this node is under way."""
    joiners: Timing[int] = 0
    """Members that this node gives its parameters now, or that compare its offer with others."""
    corpus: Parts[CorpusShare | None] = None
    """None: the node trains on a shard of its own."""
    shard: Parts[ShardSummary | None] = None
    """Summary of the text that a trainer read; None until one has."""
    tokenising: Parts[TextProgress | None] = None
    """Progress of a trainer that tokenises its text at its start; None unless one does."""
    privacy: Parts[PrivacySpent] = PrivacySpent()
    privacy_warning: Public[str] = ""
    """Protection that the swarm's privacy mode lacks; "" if it is the usual mode."""
    partners: Parts[list[Partner]] = []
    """Members that are alive or missed, observers too."""
    exchanges_done: Timing[int] = 0
    exchanges_failed: Timing[dict[str, int]] = {}
    """Number of failed exchanges by reason code, without those of `exchanges_skipped`."""
    exchanges_skipped: Timing[dict[str, int]] = {}
    """Number of slots without an exchange by reason code, where that is no failure."""
    one_sided_merges: Timing[int] = 0
    """Exchanges that we merged and the partner did not."""
    bytes_in: Timing[int] = 0
    bytes_out: Timing[int] = 0
    egress_cost: Timing[float] = 0.0
    currency: Public[str] = ""
    compression_ratio: Timing[float | None] = None
    """Float32 bytes of the fragments sent, divided by the bytes that carried them."""
    last_good_round_age_s: Timing[float | None] = None
    """Seconds since the last exchange that was done; None until there is one."""
    last_checkpoint_age_s: Timing[float | None] = None
    """Seconds since this run of the daemon last wrote a checkpoint; None until it has."""
    trainer_restarts: Timing[int] = 0
    sidecar_restarts: Timing[int] = 0
    strangers_refused: Timing[int] = 0
    """Calls and streams of strangers, and their connections to `network.direct_listen`."""
