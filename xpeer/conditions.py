"""All health conditions of a node that its operator should know of.

Status, exit codes, systemd's line and the table in docs/operating.md come from this list.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["note", "degraded", "down"]
"""note: worth knowing, but the node is well. degraded: work is lost or late. down: no work is done.
"""

_OF_THE_TRACKER = frozenset({"age", "count", "cause"})
"""Fields of texts that `Health` fills in by itself."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Something that can be the matter with a node.

    Args:
        code: its name for programs. It never changes.
        severity: how it affects the node's health.
        text: for people. `set` gets the values of its {fields}; the tracker fills in {age}, {count}
            and {cause}.
        remedy: what the operator can do; for docs and status.
        clears: when it goes away, for the docs.
        grace_s: how long it has to last before it shows; 0 = show it at once.
        hides: codes of conditions that do not show while this one does.
    """

    code: str
    severity: Severity
    text: str
    remedy: str
    clears: str
    grace_s: float = 0.0
    hides: tuple[str, ...] = ()

    @property
    def facts(self) -> frozenset[str]:
        """Names of the fields that `set` needs values for."""
        named = {name for _, name, _, _ in string.Formatter().parse(self.text) if name}
        return frozenset(named - _OF_THE_TRACKER)


def _registry(*conditions: Condition) -> dict[str, Condition]:
    return {condition.code: condition for condition in conditions}


_RENEW: Final = (
    "ask an admin for a new token: `xpeer invite create --for PEERID`, with what `xpeer id` prints "
    "here; then `xpeer stop` and `xpeer start --join TOKEN`"
)
_SEEDS: Final = "check the address, the firewall, the port; give another with --bootstrap"
_DISK: Final = "free space, or correct owner and mode of HOME"

CONDITIONS: Final[dict[str, Condition]] = _registry(
    # Beginning and end
    Condition(
        code="starting",
        severity="degraded",
        text="{note}",
        remedy="wait; `xpeer logs` says how far it is",
        clears="the trainer has read model and text",
    ),
    Condition(
        code="joining",
        severity="degraded",
        text="{note}",
        remedy=_SEEDS,
        clears="a member has answered",
        hides=("no-seed",),
    ),
    Condition(
        code="fetching",
        severity="degraded",
        text="{note}",
        remedy="wait; are members up that could give their parameters? `xpeer peers`",
        clears="a member's parameters are taken over",
    ),
    Condition(
        code="catching-up",
        severity="degraded",
        text="others may be far ahead, and nothing is exchanged before that is known: {note}",
        remedy="wait: it ends by itself. `xpeer events` says who was refused, and why",
        clears="better parameters are taken over, or none are found",
        grace_s=30.0,
        hides=("starting", "no-step", "no-exchange", "checkpoint-late", "evaluation-late"),
    ),
    Condition(
        code="not-caught-up",
        severity="degraded",
        text="others may be far ahead of this node, which goes on from step {step} with its own "
        "parameters: {who} gave none",
        remedy="when they can give theirs, `xpeer stop` and `xpeer start`. `xpeer peers` says how "
        "far they are, `xpeer events` who was refused, and why",
        clears="the node has looked again: at its next start, or its trainer's",
    ),
    Condition(
        code="donor-doubtful",
        severity="degraded",
        text="the parameters that {who} offers are worse than what the swarm started from: public "
        "loss {loss:.3f}, and {start:.3f} at the start. Nobody else offers such. "
        "`xpeer start --accept-donor {peer_id}` would take them over",
        remedy="have another member come back that holds the swarm's parameters. Only if these are "
        "right: `xpeer stop`, and start with that option",
        clears="other parameters are offered, or a second member's are as good",
    ),
    Condition(
        code="waiting-for-peers",
        severity="degraded",
        text="{note}",
        remedy="start the others, or lower training.min_peers",
        clears="enough members are there",
    ),
    Condition(
        code="stopping",
        severity="degraded",
        text="state is stopping",
        remedy="wait: the daemon saves and ends",
        clears="the daemon has ended",
    ),
    Condition(
        code="paused",
        severity="degraded",
        text="paused by the operator",
        remedy="`xpeer resume`",
        clears="`xpeer resume`",
    ),
    Condition(
        code="resting",
        severity="note",
        text="resting for {rest_s:.0f} s after a step, as training.throttle says",
        remedy="raise training.throttle to rest less",
        clears="the next step begins",
    ),
    Condition(
        code="noise-drowns-signal",
        severity="note",
        text="a step's privacy noise is {norm:.0f} times its signal: next to nothing is learnt",
        remedy="found a swarm with more records a step (optimiser.batch_records), more steps, or "
        "adapters alone (--lora-rank)",
        clears="another swarm, or a larger shard of a new home",
    ),
    Condition(
        code="run-had-ended",
        severity="degraded",
        text="the run had ended when this node joined: none of its text was used",
        remedy="found a longer run (`end.steps`), and have the founder wait: `--min-peers`",
        clears="never in this run",
    ),
    Condition(
        code="budget-spent",
        severity="degraded",
        text="the privacy budget is spent: mixing and serving only",
        remedy="nothing: the node mixes and serves on. If only some documents are spent (`xpeer "
        "privacy status`), take their files out of the shard (`xpeer privacy documents --above "
        "EPSILON`) and start again",
        clears="the node trains again",
    ),
    Condition(
        code="text-missing",
        severity="degraded",
        text="the text can't be read for {age} ({count} tried), so this node mixes and serves "
        "without training: {cause}",
        remedy="mend what it names; it is looked at again by itself, every 5 minutes at least",
        clears="it can be read; training goes on",
    ),
    # Processes
    Condition(
        code="trainer-down",
        severity="down",
        text="no trainer for {age}: {why}",
        remedy="it is restarted with growing pauses; see `xpeer logs --level warning`. Out of "
        "memory: lower `training.micro_batch`",
        clears="the trainer runs again",
    ),
    Condition(
        code="ledger-failing",
        severity="down",
        text="no privacy charge can be written for {age} ({count} tried), so no step is taken: "
        "{cause}",
        remedy=f"{_DISK}/ledger.sqlite and of `privacy.register`; it is tried again by itself, "
        "every 2 minutes at least",
        clears="a step is charged",
        hides=("trainer-down", "no-step"),
    ),
    Condition(
        code="steps-lost",
        severity="degraded",
        text="the trainer was at step {at}, ended without a checkpoint, and is at step {step} now: "
        "the steps between are taken, and charged, again",
        remedy="`xpeer logs --level warning` says why it died; a shorter checkpoint.every_s loses "
        "less",
        clears="it is further than it was",
    ),
    Condition(
        code="no-step",
        severity="degraded",
        text="no step for {silent_s:.0f} s",
        remedy="is the machine overloaded or suspended, or a GPU stuck? `xpeer logs`, then `xpeer "
        "stop` and start again",
        clears="a step is taken",
    ),
    Condition(
        code="steps-slower",
        severity="note",
        text="steps take longer than they could, up to twice as long on a CPU: {why}",
        remedy="only time is lost, results are right. Out of memory: end what else runs there, or "
        "set training.micro_batch to 1, and start again. Else update torch and xpeer, or report it "
        "with that line of the log; without training.compile no start tries to compile",
        clears="the node starts and nothing is refused",
    ),
    Condition(
        code="sidecar-down",
        severity="down",
        text="the libp2p sidecar is down for {age}",
        remedy="it is restarted with the same identity; see `xpeer logs --level warning`",
        clears="it runs again",
        hides=("no-seed", "no-partner", "no-exchange", "partners-lost"),
    ),
    # Partners
    Condition(
        code="certificate-expiring",
        severity="degraded",
        text="this node's membership expires in {left}, at {ends}: no member meets it after that",
        remedy=_RENEW,
        clears="the node has started with a new token",
    ),
    Condition(
        code="certificate-expired",
        severity="down",
        text="this node's membership expired {age} ago, at {ends}: no member meets it",
        remedy=_RENEW,
        clears="the node has started with a new token",
        hides=(
            "joining",
            "fetching",
            "waiting-for-peers",
            "no-partner",
            "partners-lost",
            "no-exchange",
            "roster-failing",
            "card-failing",
            "no-seed",
        ),
    ),
    Condition(
        code="no-partner",
        severity="degraded",
        text="no live partner: nothing is averaged",
        remedy="training goes on alone. Are the others up? `xpeer peers`",
        clears="a member is there that exchanges",
        hides=("no-exchange",),
    ),
    Condition(
        code="partners-lost",
        severity="degraded",
        text="{lost} of {known} known partners are gone: {who}",
        remedy="are they up, and is the network between? `xpeer peers`. One that is gone for good "
        "leaves with `xpeer leave`, or is forgotten after a day",
        clears="they are back, have left, or are gone for a day",
    ),
    Condition(
        code="no-exchange",
        severity="degraded",
        text="no good exchange for {silent_s:.0f} s",
        remedy="`xpeer status` counts failures by reason; `xpeer logs --level warning`",
        clears="an exchange succeeds",
    ),
    Condition(
        code="exchange-failed",
        severity="note",
        text="{count} exchanges in a row failed in the last {age}, the last one with {cause}",
        remedy="`xpeer peers` shows the reason by partner; one failure now and then is nothing",
        clears="an exchange succeeds",
    ),
    Condition(
        code="adapters-misaligned",
        severity="degraded",
        text="averaging the adapters loses {lost:.0%} of what they do: members are too far apart, "
        "and the two factors of an adapter are averaged each by itself",
        remedy="exchange more often: are links slow, or members lost (`xpeer peers`)? In a new "
        "swarm a smaller optimiser.learning_rate, round.fragments or round.window_steps; or "
        "adapters whose average is exact (`xpeer init --lora-train B`)",
        clears="it is 5% or less when the losses are next measured",
    ),
    Condition(
        code="ledger-behind",
        severity="degraded",
        text="{refusing} partners do not meet this node until it has caught up: they say "
        "that they saw more privacy charges of it than it shows: {who}",
        remedy="home and register were restored from an older copy, or a copy of this home runs "
        "elsewhere. Restore newer copies, or let it go on alone: it is met again when it has made "
        "as many charges",
        clears="they meet this node again",
    ),
    Condition(
        code="waiting-for-the-end",
        severity="degraded",
        text="this node has taken its steps and has waited {waited} for {who}",
        remedy="wait, or ask their operators whether they still train",
        clears="they have ended or are gone",
    ),
    # Periodic work
    Condition(
        code="checkpoint-failing",
        severity="degraded",
        text="no checkpoint could be written for {age} ({count} tried): {cause}",
        remedy=f"{_DISK}/checkpoints; steps since the last checkpoint are lost if the node ends",
        clears="one is written",
        hides=("checkpoint-late",),
    ),
    Condition(
        code="checkpoint-late",
        severity="degraded",
        text="no checkpoint for {late_s:.0f} s, though one is due every {every_s:.0f} s",
        remedy="is the trainer stuck, or the disk slow? `xpeer logs`, `xpeer checkpoint save`",
        clears="one is written",
    ),
    Condition(
        code="evaluation-failing",
        severity="degraded",
        text="the public and the held-out loss can't be measured for {age}: {why}",
        remedy="training goes on, and they are measured again at a window's end; the run can't "
        "finish without. Out of memory: stop what else runs there, or restart the node",
        clears="they are measured",
        hides=("evaluation-late",),
    ),
    Condition(
        code="evaluation-late",
        severity="note",
        text="no loss was measured for {late}: that is done at a window's end, and may take 2% of "
        "the training time",
        remedy="nothing is lost, the losses shown are old. A smaller training.validation_records "
        "takes less; in a new swarm a shorter public text, or a smaller round.window_steps",
        clears="they are measured",
    ),
    Condition(
        code="state-file-failing",
        severity="degraded",
        text="state.sqlite can't be written for {age} ({count} tried): {cause}",
        remedy=f"{_DISK}; history and the partners' highest ledger counters are lost if the node "
        "ends",
        clears="a write succeeds",
    ),
    Condition(
        code="log-failing",
        severity="degraded",
        text="daemon.log can't be written for {age} ({count} lines lost): {cause}",
        remedy=f"{_DISK}/daemon.log",
        clears="a line is written",
    ),
    Condition(
        code="losses-failing",
        severity="degraded",
        text="losses.csv can't be written for {age} ({count} rows lost): {cause}",
        remedy=f"{_DISK}/losses.csv",
        clears="a row is written",
    ),
    Condition(
        code="card-failing",
        severity="degraded",
        text="no node of the DHT has taken this node's card for {age}",
        remedy="members still hear of this node from one another, newcomers may not; check the "
        "network, and give seeds with --bootstrap",
        clears="a node stores the card",
        grace_s=60.0,
    ),
    Condition(
        code="roster-failing",
        severity="degraded",
        text="no member answers questions about who is there for {age}: {cause}",
        remedy="check the network and the firewall; `xpeer peers` may be out of date",
        clears="a member answers",
        grace_s=30.0,
    ),
    Condition(
        code="no-seed",
        severity="degraded",
        text="no seed answers for {age}: {why}",
        remedy=f"{_SEEDS}. Who joins now can't find this swarm there",
        clears="a seed or a member answers",
    ),
    Condition(
        code="not-called-back",
        severity="note",
        text="none of the {asked} peers that this node dialled last could call it back",
        remedy="open its port (network.listen) in the firewall, or forward one to it and set "
        "network.announce; until then others may not begin an exchange with it",
        clears="one of them can, at the next dial, a minute later at most",
    ),
    # The machine
    Condition(
        code="clock-off",
        severity="degraded",
        text="this node's clock is {how} the clocks of the {clocks} members that answered; beyond "
        "3 s they refuse it",
        remedy="run NTP here: `timedatectl set-ntp true`, or chrony",
        clears="the clocks agree within 2 s",
    ),
    Condition(
        code="loop-late",
        severity="note",
        text="the daemon has woken its tasks late for {age}, by up to {worst_ms:.0f} ms: {why}",
        remedy="give the daemon a core of its own (a smaller training.threads), and HOME a faster "
        "disk: exchanges take longer, and commands are answered late",
        clears="no task was woken more than 100 ms late for 10 s",
    ),
    Condition(
        code="disk-nearly-full",
        severity="degraded",
        text="{free} free where the home is; two checkpoints need {needed}",
        remedy="free space on the disk of HOME",
        clears="there is space for two checkpoints again",
    ),
)
"""By code. A code never changes its meaning; what a condition says may."""
