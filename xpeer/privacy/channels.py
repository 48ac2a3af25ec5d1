"""Every value that leaves the trainer process or the daemon, and why it may while privacy is on.

A table, not a filter: `tests/unit/privacy/test_channels.py` walks the real structures and fails
for a field that is not listed, or that is listed and gone; `test_side_channels.py` trains on
different shards and compares what partners would see.

Treatments, from harmless to private:

    public    follows from the manifest, from public data, from randomness of its own, or is the
              operator's own word (an address, a declared speed)
    derived   computed from released parameters and public data alone: post-processing
    noised    computed from records, clipped, noised and charged before it leaves
    timing    tells how many steps were taken by when, and nothing else of the text. Not protected:
              a step takes as long as its random batch is large, and the clock is everybody's
    withheld  exists, and is not sent or made while privacy is on
    local     may depend on records. For this node's operator: the Unix socket, files of the home,
              the log. Whoever passes them on passes on private data
    parts     holds other structures of this table, or their bytes

What this module does not give: that the network hides sizes, numbers and moments of messages.
"""

from __future__ import annotations

from typing import Final

from xpeer.privacy.channel import SEEN_BY_OTHERS, Channel
from xpeer.privacy.channel import of as _of

_MESSAGES: Final = {
    "Message": _of("partners"),
    "Terms": _of(
        "partners",
        public="weight group_weight",
        derived="loss_public",
        timing="epoch ledger_counter loss_age unresolved",
        why="weights are of declared speeds, never of tokens or records counted here; charges "
        "follow the clock of steps and writes, and end where the budget does: that tells the "
        "shard's size in steps of 3 %, if the manifest fixes sigma and the run does not end first",
    ),
    "Propose": _of(
        "partners",
        public="exchange_id slot fragment codec num_values",
        timing="averaging",
        parts="terms",
    ),
    "Agree": _of("partners", public="exchange_id", parts="terms"),
    "Payload": _of(
        "partners",
        public="exchange_id num_bytes",
        why="its size follows from codec and fragment; its bytes are update.CompressedUpdate",
    ),
    "Accept": _of("partners", public="exchange_id", derived="digest"),
    "Refuse": _of(
        "partners",
        public="exchange_id",
        timing="reason",
        why="of errors.Reason: the pace of windows, or a judgement of the partner's own bytes",
    ),
    "MaskStep": _of("partners", public="exchange_id step", derived="value", why="keys, digests"),
    "StateRequest": _of("partners", derived="digest", timing="start", why="what its link carried"),
    "StateOffer": _of(
        "members",
        public="num_params",
        derived="loss_public digest signature",
        timing="step",
        why="what a joiner is given: released parameters, averaged with those partners showed",
    ),
    "StateReceived": _of("members", derived="digest"),
}

_SESSION: Final = {
    "Hello": _of(
        "members",
        public="version purpose swarm_id manifest_hash sender receiver serial ephemeral ciphers "
        "answers",
    ),
    "SignedHello": _of("members", public="body signature"),
}

_NETWORK: Final = {
    "cards.MemberRecord": _of(
        "members",
        public="peer_id addresses role zone speed",
        timing="phase slot",
        why="the speed is the declared one: none is measured under privacy; the phase says when "
        "steps or budget ended",
    ),
    "about.About": _of("members", public="name", timing="step", why="the operator's own word"),
    "cards.Card": _of("members", parts="record", public="version_ms since_s lifetime_s anchor"),
    "cards.SignedCard": _of("members", parts="body", public="signature"),
    "cards.Beat": _of("members", public="link value"),
    "dht.SignedValue": _of("anybody", public="payload credential signature", why="sealed"),
    "shards.Stored": _of("members", parts="signed", public="beat"),
    "spreading.News": _of("members", parts="signed", public="owner credential beat"),
    "spreading.Question": _of("members", parts="cards", public="salt digest beats"),
    "spreading.Answer": _of("members", parts="cards", public="beats more unknown"),
    "present.Introduction": _of("anybody", public="credential addresses"),
    "joining.Admission": _of("members", public="manifest swarm_key"),
    "membership.Certificate": _of(
        "anybody",
        public="genesis subject role serial not_before_unix_s join_before_unix_s not_after_unix_s",
    ),
    "membership.Credential": _of("anybody", public="body signature peer_id binding"),
    "invites.Token": _of("anybody", public="name seeds body signature bearer seal", parts="needs"),
    "direct.Offer": _of("partners", public="port ticket"),
}

_UPDATE: Final = {
    "Form": _of("partners", public="codec num_values", why="sent as fields of Propose"),
    "RawUpdate": _of("node", noised="values", timing="step", why="never leaves the trainer"),
    "PrivacyStamp": _of("node", public="mode", local="steps_charged", withheld="issuer"),
    "PrivateUpdate": _of("node", noised="values", timing="step", parts="stamp"),
    "CompressedUpdate": _of(
        "partners",
        noised="payload",
        parts="form",
        withheld="step stamp",
        why="step and stamp stay with the daemon; rounding has randomness of its own",
    ),
    "MaskedUpdate": _of("partners", noised="payload", parts="form"),
    "PeerUpdate": _of("node", derived="payload", public="peer_id parties", parts="form"),
    "ModelState": _of("members", noised="payload", timing="step", derived="loss_public"),
}

_IPC: Final = {
    "Ready": _of(
        "node",
        public="num_params num_fragments device",
        timing="step ledger_counter resumed",
        local="engine num_records text_problem notes warnings",
        parts="corpus shard",
    ),
    "Reply": _of("node", public="number", parts="result"),
    "Snapshotted": _of(
        "node",
        public="privacy_mode",
        timing="step",
        local="steps_charged",
        parts="form",
    ),
    "Verified": _of("node", derived="distance clipped"),
    "Done": _of("node"),
    "StateExported": _of("node", derived="digest loss_public", timing="step"),
    "StateImported": _of("node", derived="loss_before loss_after"),
    "Written": _of("node", public="path"),
    "Losses": _of("node", derived="public", local="validation"),
    "Failure": _of("node", local="kind problem remedy exit_code trace"),
    "Progressed": _of("node", timing="state ledger_counter", parts="progress privacy"),
    "Saved": _of("node", public="path", timing="step"),
    "LookedAtText": _of("node", local="problem"),
    "Ending": _of("node", timing="work written total"),
    "SaveFailed": _of("node", local="problem", timing="step"),
    "Crashed": _of("node", parts="failure", why="that a trainer died is seen: see measuring.py"),
}

_HEALTH: Final = {
    "HealthReason": _of(
        "node",
        public="remedy",
        timing="code severity text",
        why="on the Unix socket, in the log and in systemd's line",
    ),
}

_STATUS: Final = {
    "Progress": _of(
        "node",
        public="planned_steps",
        derived="loss_public consensus_distance merges_clipped",
        timing="step window loss_public_age loss_train_age_s loss_measured_step "
        "loss_measured_age_s learning_rate merges steps_late seconds_training "
        "seconds_here seconds_blocked seconds_boundary seconds_saving seconds_snapshot "
        "seconds_merge",
        local="tokens loss_train loss_validation loss_problem tokens_per_s rest_s",
    ),
    "PrivacySpent": _of(
        "node",
        public="mode epsilon_target unit",
        noised="clip_norm",
        local="epsilon_spent delta noise_multiplier steps_charged steps_left ends_unix_s engine "
        "engine_reason documents_elsewhere steps_forfeited noise_norm",
        why="sigma and delta follow from the shard's size",
    ),
    "CorpusShare": _of(
        "node",
        public="units units_total unit_tokens documents documents_total tokens weight",
        why="of a corpus that every member holds, by declared speeds",
    ),
    "ShardSummary": _of(
        "node", local="files documents characters repeated too_short skipped left_out outside"
    ),
    "Partner": _of(
        "node",
        public="peer_id name step step_age_s exchange_s state silent_s phase role addresses speed "
        "exchanges failures skipped last_reason avoided_s avoided_why privacy "
        "ledger_went_back ledger_caught_up last_exchange_age_s bytes_in bytes_out",
        why="what others say and do",
    ),
    "Status": _of(
        "node",
        public="schema_version peer_id name swarm_id swarm_name version pid addresses "
        "num_params device currency privacy_warning",
        timing="health state trainer_runs progress_age_s eta_unix_s uptime_s round "
        "exchanges_done exchanges_failed exchanges_skipped one_sided_merges bytes_in bytes_out "
        "egress_cost compression_ratio last_good_round_age_s last_checkpoint_age_s "
        "trainer_restarts sidecar_restarts strangers_refused",
        parts="progress corpus shard privacy partners reasons",
        why="answered on the Unix socket alone (xpeer_daemon.api); to systemd go health, state, "
        "step, the number of partners and the reasons' texts",
    ),
}

_CONTROL: Final = {
    "Versioned": _of("node", public="schema_version"),
    "Peers": _of("node", public="schema_version", parts="peers"),
    "Version": _of("node", public="schema_version version pid"),
    "Done": _of("node", public="schema_version pid path", timing="state"),
    "End": _of(
        "node", public="schema_version", timing="over written total problem remedy exit_code"
    ),
    "Problem": _of("node", public="schema_version", local="problem remedy exit_code"),
}

_HOME: Final = {
    "xpeer.cli.events.History": _of(
        "node", public="schema_version", parts="events exchanges", why="printed by xpeer events"
    ),
    "xpeer_daemon.store.RoundRow": _of(
        "home",
        public="slot partner fragment",
        derived="distance",
        timing="reason detail seconds unix_s",
    ),
    "xpeer_daemon.store.EventRow": _of("home", timing="kind detail unix_s"),
    "xpeer_daemon.store.Known": _of(
        "home", timing="unix_s", parts="progress privacy", why="for a status before a trainer runs"
    ),
    "xpeer_daemon.store.KnownPeer": _of(
        "home", public="peer_id addresses seen_unix_s ledger_counter"
    ),
    "xpeer.training.checkpoint.Bundle": _of(
        "home",
        noised="flat exp_avg exp_avg_sq",
        derived="consolidation rule",
        public="manifest_hash frozen",
        timing="optimiser_step",
        withheld="seen",
        parts="counters",
        local="ledger_id",
        why="export, rather than copy: counters hold tokens and seconds; moments follow from "
        "noised gradients, `seen` is empty under privacy",
    ),
    "xpeer.training.checkpoint._Words": _of(
        "home",
        public="schema_version manifest_hash",
        timing="optimiser_step",
        parts="counters",
        local="ledger_id",
    ),
    "xpeer.privacy.engine_memory._Choice": _of(
        "home", local="setting engine reason", why="as PrivacySpent's engine"
    ),
    "xpeer_daemon.belonging._Words": _of("home", public="manifest_hash", local="ledger_id"),
    "xpeer.training.schedule.Counters": _of(
        "home",
        noised="clip_norm",
        timing="step window seconds moments_step joined merges merges_clipped charges_used",
        local="tokens",
    ),
    "xpeer.founding.Issued": _of(
        "home",
        public="serial swarm_id subject role not_before_unix_s join_before_unix_s seeds",
    ),
    "xpeer.privacy.charges.About": _of(
        "home",
        public="swarm_id mode unit cut clip_norm epsilon_target",
        timing="unix_s found_again",
        local="delta",
    ),
    "xpeer.privacy.card.Card": _of(
        "export",
        public="swarm_id swarm_name xpeer mode unit epsilon_target",
        timing="step epsilon_spent delta",
        why="no sigma, no q, no size; epsilon and delta are rounded up to a coarse grid",
    ),
    "xpeer.privacy.report.Account": _of(
        "home",
        public="swarm_id mode unit clip_norm epsilon_target",
        local="ledger_id epsilon_spent epsilon_ever delta segments steps_charged charges "
        "steps_left ends_unix_s chain_head documents classes_left_out problems",
        why="`xpeer privacy status` and `report`: sigma, q and delta tell the shard's size by six "
        "bits to whoever is shown them",
    ),
    "xpeer.privacy.report.DocumentAccount": _of(
        "home", local="documents here homes swarms epsilon segments"
    ),
    "xpeer.privacy.report.FileAccount": _of("home", local="path documents epsilon"),
    "xpeer.privacy.report.Verdict": _of(
        "home", local="delta epsilon_spent checked charges steps_registered problems"
    ),
    "xpeer.privacy.report.Checked": _of(
        "home",
        local="what epsilon_accountant epsilon_replayed epsilon_lower epsilon_upper epsilon_rdp",
    ),
    "xpeer.privacy.histories.DocumentClass": _of(
        "home", local="documents here segments own ledgers swarms"
    ),
    "xpeer.privacy.histories.Joined": _of(
        "home", local="documents new elsewhere recovered unknown_steps behind counter"
    ),
    "xpeer.privacy.planning.Plan": _of(
        "home",
        public="epsilon delta records batch sampling_probability steps noise_multiplier "
        "noise_to_signal noise_norm passes tokens_per_step curve unit",
        why="of the operator's own numbers",
    ),
    "xpeer.cli.logs.Entry": _of("home", local="time level logger message trace"),
}


def _in(module: str, channels: dict[str, Channel]) -> dict[str, Channel]:
    return {f"{module}.{name}": channel for name, channel in channels.items()}


CHANNELS: Final[dict[str, Channel]] = {
    **_in("xpeer.wire.messages", _MESSAGES),
    **_in("xpeer.wire.session", _SESSION),
    **_in("xpeer.network", _NETWORK),
    "xpeer.needs.Needs": _of("anybody", public="tokenizer base_model source", why="the manifest's"),
    **_in("xpeer.update", _UPDATE),
    **_in("xpeer.training.answers", _IPC),
    **_in("xpeer.health", _HEALTH),
    **_in("xpeer.status", _STATUS),
    **_in("xpeer.control", _CONTROL),
    **_HOME,
}
"""By module and class."""

NEVER_LEAVE: Final = (
    "xpeer.config.",
    "xpeer.training.setup.",
    "xpeer.training.commands.",
)
"""This node's settings, and what the daemon tells its own trainer; names or prefixes."""

THE_MANIFEST: Final = "xpeer.manifest."
"""All of it is public to members by definition: the founder wrote it, before any training."""

PROTOCOLS: Final[dict[str, str]] = {
    "xpeer/exchange/1": "exchange: wire.messages in a sealed session, and payloads",
    "xpeer/state/1": "a joiner's parameters: wire.messages in a sealed session, and the state",
    "xpeer/roster/1": "spreading: cards and beats, sealed with the swarm key",
    "xpeer/present/1": "present: credentials and addresses",
    "xpeer/about/1": "about: name and step",
    "xpeer/admit/1": "joining: manifest and swarm key, sealed to the joiner",
    "xpeer/nudge/1": "nothing but that it came: timing",
}
"""Every libp2p protocol that a member serves, the DHT's aside (`dht.SignedValue`)."""

FRAMES: Final = ("MESSAGE", "BULK", "END", "ELSEWHERE")
"""Kinds of frames of a session; lengths and kinds are seen by whoever sees the network: public."""

ROUTES: Final[dict[str, str]] = {
    "GET /v1/status": "Status",
    "GET /v1/peers": "Peers",
    "GET /v1/version": "Version",
    "GET /v1/end": "End",
    "POST /v1/pause": "Done",
    "POST /v1/resume": "Done",
    "POST /v1/stop": "Done",
    "POST /v1/leave": "Done",
    "POST /v1/checkpoint": "Done",
}
"""Of the control API, with their answers. There is no other API, page or port for metrics."""

EVENTS: Final = (
    "trainer-restarted",
    "donor-refused",
    "caught-up",
    "began-anew",
    "finished",
    "ledger-went-back",
    "ledger-caught-up",
)
"""Kinds of events in state.sqlite."""

TRAINER_LOGS: Final[dict[str, tuple[str, ...]]] = {
    "xpeer.training.channel": ("%s", "%s"),
    "xpeer.training.child": ("%s", "%s", "%s", "%s"),
    "xpeer.privacy.register_file": ("%s",),
    "xpeer.training.client": ("parameters replaced at step %d: public loss %.4f -> %.4f",),
    "xpeer.training.loop": ("charged steps were not used up: %s",),
    "xpeer.training.measuring": ("the loss can't be measured: %s",),
    "xpeer.training.main": ("the trainer's receiver failed",),
    "xpeer.training.saving": ("no checkpoint was written: %s",),
    "xpeer.training.shard": ("tokenised records are not cached: %s",),
    "xpeer.training.threads": ("a helper of the trainer failed",),
    "xpeer.training.worker": (
        "saved step %d before the trainer ends",
        "the steps since the last checkpoint could not be saved",
    ),
    "xpeer.wire.kernels": ("codec kernels are not compiled, so the codec is slower: %s: %s",),
}
"""What the trainer process and its handle write to the log: local, and never a loss, a count or a
text of records."""

EXPORTED: Final = ("config.json", "generation_config.json", "model.safetensors")
"""Files of `xpeer checkpoint export`, those of tokenizer and source and `card.FILES` aside:
released parameters and the manifest's config."""

COMMANDS: Final[dict[str, str]] = {
    "init": "new home", "plan": "its arguments", "id": "PeerID", "invite": "Token, Issued",
    "bootstrap": "addresses", "start": "the log", "status": "Status", "peers": "Peers",
    "pause": "Done", "resume": "Done", "stop": "Done", "leave": "Done",
    "checkpoint": "Bundle, EXPORTED", "logs": "Entry", "events": "History",
    "demo": "Status, of text on this machine", "completion": "nothing", "version": "versions",
    "generate": "text of the model that is named", "eval": "a loss of the text that is named",
    "privacy": "Account, FileAccount, Verdict, Plan, Charge",
}  # fmt: skip
"""What commands print or write, by the structures above: for the operator."""


def seen_by_others() -> dict[str, Channel]:
    """The channels that reach other members, strangers, or whoever is given an export."""
    return {name: c for name, c in CHANNELS.items() if c.audience in SEEN_BY_OTHERS}
