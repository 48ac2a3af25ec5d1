"""`python -m benchmarks.joining`: a joiner of 135 M parameters, one of whose donors is killed."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

from benchmarks.common import emit, say, write_result
from benchmarks.daemons import ending
from benchmarks.exchange.hosts import can_shape, hosts
from benchmarks.joining.figures import (
    around,
    distances,
    in_step,
    spent,
    summary_of,
    transfer,
    usual_distance,
)
from benchmarks.joining.peers import END_TIMEOUT_S, Peer, take_steps
from benchmarks.overlap.__main__ import SMALL, SMOLLM2_135M
from xpeer.policies import PrivacyMode, privacy_policy
from xpeer.status import Status

COMMAND = "python -m benchmarks.joining"
DONORS_MBIT_S = 1000.0
PUBLIC_CHARACTERS = 8_000
LEARNING_RATE = 1e-5
"""Nothing is to be learnt. Donors whose public losses fall fast have measured them at different
steps, and so are not put together."""
WARM_UP_MERGES = 5
"""Of each donor, before anything is counted."""
NEAR = 1.25
"""A joiner is in step once an exchange finds it at most so many times as far from its partner as
donors usually are from one another."""
IN_STEP_S = 1800.0
"""It is waited for so long."""


@dataclass(frozen=True)
class Plan:
    """What a run measures."""

    model: dict[str, Any]
    donors: int
    modes: tuple[PrivacyMode, ...]
    steps: int
    """Of each donor: to warm up, and again before the joiner comes."""
    window_steps: int
    """Donors more than four windows apart are not put together."""
    slot_s: float
    """A window has to have room for an exchange of each fragment."""
    sequence_tokens: int
    batch_records: int
    mbit_per_s: float
    """Of the joiner's link, each way."""
    compile_codec: bool
    """Compiling takes a minute of a core at the first exchange."""


FULL = Plan(SMOLLM2_135M, 3, ("off", "record"), 24, 60, 4.0, 32, 2, 100.0, True)
QUICK = Plan(SMALL, 2, ("off",), 10, 20, 1.0, 32, 2, 20.0, False)


def options_of(plan: Plan, mode: PrivacyMode, model: Path | None, folder: Path) -> list[str]:
    """Of `xpeer init`, for the founder."""
    public = folder / "public.txt"
    public.write_text(_manual()[:PUBLIC_CHARACTERS], encoding="utf-8")
    config = folder / "config.json"
    config.write_text(json.dumps(plan.model))
    drawn = ["--model-config", str(config), "--tokenizer", "bytes"]
    start = ["--model", str(model)] if model else drawn
    fields = {
        "optimiser.sequence_tokens": plan.sequence_tokens,
        "optimiser.batch_records": plan.batch_records,
        "optimiser.learning_rate": LEARNING_RATE,
        "round.window_steps": plan.window_steps,
        "round.slot_s": plan.slot_s,
        "round.deadline_s": 120,
        "end.steps": 1_000_000,
    }
    if privacy_policy(mode).charges:
        fields |= {"privacy.noise_multiplier": 1.0, "privacy.epsilon": 1000}
    return [
        *start, "--privacy", mode, "--public-text", str(public), "--skip-trial",
        *(f"--set={name}={value}" for name, value in fields.items()),
    ]  # fmt: skip


def measure(plan: Plan, mode: PrivacyMode, model: Path | None, folder: Path) -> dict[str, Any]:
    """One swarm: its donors before the joiner comes, the transfer, and the joiner after it."""
    names = [f"donor{n}" for n in range(plan.donors)]
    text, part = _manual()[PUBLIC_CHARACTERS:], len(_manual()) // (plan.donors + 1)
    shards = [text[n * part : (n + 1) * part] for n in range(plan.donors + 1)]
    with hosts(plan.donors + 1, DONORS_MBIT_S) as machines:
        *donors, joiner = peers = [
            Peer(folder, name, host, shard, model)
            for name, host, shard in zip([*names, "joiner"], machines, shards, strict=True)
        ]
        machines[-1].limit(plan.mbit_per_s)
        founder, *others = donors
        founder.found(options_of(plan, mode, model, folder))
        with ending(peers, END_TIMEOUT_S):
            founder.run(len(others), compile_codec=plan.compile_codec)
            for peer in others:
                peer.prepare(founder)
                peer.run(len(others), compile_codec=plan.compile_codec)
            take_steps(donors, plan.steps)
            for peer in donors:
                peer.wait(lambda s: s.progress.merges >= WARM_UP_MERGES)
            say(f"privacy {mode}: {len(donors)} donors train")
            warm = {peer.name: len(peer.rows()) for peer in donors}
            take_steps(donors, plan.steps)
            rows = {peer.name: peer.rows()[warm[peer.name] :] for peer in donors}
            before = {name: spent(each) for name, each in rows.items()}
            joiner.prepare(founder)
            found = _join(plan, donors, joiner, max(map(usual_distance, rows.values())))
    for name, each in found["donors"].items():
        each["before"] = before[name]
    return found


def _join(plan: Plan, donors: list[Peer], joiner: Peer, usual: float) -> dict[str, Any]:
    """From the joiner's start until it is in step.

    Its count of steps stays behind the donors' by those that they took during the transfer.

    Args:
        plan: what is measured.
        donors: train already.
        joiner: is not started yet.
        usual: distance between donors.
    """
    ids = {_status(peer).peer_id: peer for peer in donors}
    wire = joiner.host.received_bytes()
    joiner.run(0, compile_codec=plan.compile_codec)
    half = joiner.wait(_has_half)
    if half.fetching is None:
        raise RuntimeError("all was here before a donor could be killed")
    doomed = max((ids[donor] for donor in half.fetching.donors), key=donors.index)
    doomed.kill()
    staying = [peer for peer in donors if peer is not doomed]
    killed_at = half.fetching.bytes_done / half.fetching.bytes_total
    say(f"{doomed.name} is killed when {killed_at:.0%} is here")
    joiner.wait(lambda s: s.state == "training")
    wire = joiner.host.received_bytes() - wire
    came = transfer(joiner.came())
    say(f"all is here after {came.seconds:.1f} s: {came.mbit_per_s:.1f} Mbit/s")
    for peer in staying:
        peer.wait_for_rows(lambda rows: rows[-1].at >= came.ended)
    joiner.wait_for_rows(bool)
    began_at = joiner.rows()[0].step
    joiner.wait(lambda _: in_step(joiner.rows(), NEAR * usual) is not None, IN_STEP_S)
    stepped = in_step(joiner.rows(), NEAR * usual)
    assert stepped is not None
    behind = statistics.median(peer.rows()[-1].step for peer in staying) - joiner.rows()[-1].step
    windows = (stepped.step - began_at) / plan.window_steps
    say(f"in step after {windows:.1f} windows")
    during = {
        peer.name: {"during": spent(around(peer.rows(), came.began, came.ended))}
        for peer in staying
    }
    return {
        "transfer_s": round(came.seconds, 2),
        "bytes": came.num_bytes,
        "mbit_per_s": round(came.mbit_per_s, 2),
        "pieces": came.pieces,
        "pieces_twice": came.pieces_twice,
        "pieces_by_donor": {ids[donor].name: n for donor, n in came.by_donor.items()},
        "wire_ratio": round(wire / came.num_bytes, 3),
        "killed": doomed.name,
        "killed_at": round(killed_at, 3),
        "windows_to_step": round(windows, 2),
        "steps_behind": behind,
        "distance": stepped.distance,
        "distances": distances(joiner.rows(), plan.window_steps),
        "usual_distance": usual,
        "donors": {doomed.name: {}, **during},
    }


def _has_half(status: Status) -> bool:
    if (fetching := status.fetching) is None:
        return status.state == "training"
    return bool(fetching.donors) and 2 * fetching.bytes_done >= fetching.bytes_total


def _status(peer: Peer) -> Status:
    return peer.wait(lambda _: True)


def _manual() -> str:
    return "\n".join(text for _, text in sorted(topics.topics.items()))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, two donors, no result")
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder, in place of random weights"
    )
    parser.add_argument("--privacy", choices=FULL.modes, help="only so; no result")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # daemons and hosts go, too
    if not can_shape():
        raise SystemExit(f"{COMMAND} needs root and iproute2")
    plan = QUICK if options.quick else FULL
    modes = (options.privacy,) if options.privacy else plan.modes
    runs: dict[str, Any] = {}
    for mode in modes:
        with tempfile.TemporaryDirectory(prefix="xj-") as folder:
            runs[mode] = measure(plan, mode, options.model, Path(folder))
    summary = {mode: summary_of(run) for mode, run in runs.items()}
    if not (options.quick or options.privacy):
        command = f"{COMMAND} --model FOLDER" if options.model else COMMAND
        write_result("joining", summary, {"plan": asdict(plan), "runs": runs}, command)
    emit("joining", summary)


if __name__ == "__main__":
    main()
