"""Two nodes that differ in nothing but their text: what others see of them is the same.

Treatments are those of `xpeer.leaves`: what is public must be equal; timing, too, since here
both take the same steps; what is noised or derived from it can't be compared, and must be all else.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch

from tests import leaving
from tests.unit.daemon.fakes import FakeNode
from tests.unit.daemon.worlds import ME, World, saying
from tests.unit.privacy.models import llama, record_losses, some_records
from tests.unit.training.homes import make_homes
from xpeer.accounts.budget import coarse_size
from xpeer.accounts.ledger import Ledger
from xpeer.identity import Identity
from xpeer.manifest import Manifest
from xpeer.manifest.round import Round
from xpeer.manifest.signed import SignedManifest
from xpeer.privacy.mechanism import build_mechanism
from xpeer.status import PrivacySpent, Progress
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.update import CompressedUpdate
from xpeer.weights import of_pair
from xpeer.wire.messages import Terms
from xpeer_daemon.joiner import Joiner
from xpeer_daemon.life import Life

RULES = {
    "gossip": Round(),
    "fedavg": Round(rule="fedavg"),
    "dynamic": Round(rule="dynamic"),
    "asynchronous": Round(rule="asynchronous"),
    "gradient": Round(rule="gradient", fragments=1, group=0),
    "diloco": Round(rule="diloco", group=0),
    "noloco": Round(rule="noloco"),
    "gasloc": Round(rule="gasloc"),
}


def manifest_of(folder: Path) -> Manifest:
    setup = make_homes(folder, 1, privacy="record", changes=("privacy.noise_multiplier=2",))[0]
    return SignedManifest.load(Path(setup.manifest_path)).open()


def fields_by(kind: type, *treatments: str) -> list[str]:
    return [
        field for field, treatment in leaving.treatments(kind).items() if treatment in treatments
    ]


def progress_of(salt: int) -> Progress:
    """Every field that may depend on the text, made of the salt."""
    private: dict[str, Any] = {
        name: float(17 * salt + i) for i, name in enumerate(fields_by(Progress, "local"))
    }
    public = {"step": 40, "window": 8, "loss_public": 2.5, "loss_public_age": 1.5}
    return Progress(**(private | public))


def privacy_of(salt: int) -> PrivacySpent:
    private: dict[str, Any] = {
        name: salt + i
        for i, name in enumerate(fields_by(PrivacySpent, "local"))
        if name != "engine"
    }
    return PrivacySpent(**private)


@pytest.mark.parametrize("rule", RULES)
async def test_nothing_that_the_daemon_tells_depends_on_what_is_local(
    tmp_path: Path, rule: str
) -> None:
    manifest = msgspec.structs.replace(manifest_of(tmp_path), round=RULES[rule])
    worlds = [World(manifest, saying(progress_of(salt), privacy_of(salt))) for salt in (1, 2)]
    statuses = [world.node.status() for world in worlds]
    assert statuses[0].progress != statuses[1].progress  # the operators see the difference
    shown = [await world.shown() for world in worlds]
    assert shown[0] == shown[1]
    assert shown[0]["record"].speed == 0.0
    weighting = manifest.round.policy.weighting
    weight = of_pair(weighting, shown[0]["terms"], Terms(1.0, 2.0, 1, 0, loss_public=2.5))
    assert 0 < weight <= 0.5


async def test_what_is_timing_shows_as_timing_only(tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(manifest_of(tmp_path), round=RULES["dynamic"])
    one, other = (World(manifest, saying(progress_of(1), privacy_of(1))) for _ in range(2))
    trainer = other.view.trainer
    assert trainer is not None
    trainer.epoch, trainer.ledger_counter = 6, 9
    trainer.progress = msgspec.structs.replace(trainer.progress, step=77, loss_public_age=9.0)
    a = msgspec.to_builtins((await one.shown())["terms"])
    b = msgspec.to_builtins((await other.shown())["terms"])
    changed = {name for name in a if a[name] != b[name]}
    assert changed == {"epoch", "ledger_counter", "loss_age"}
    assert changed <= set(fields_by(Terms, "timing"))


def test_no_speed_is_measured_under_privacy(tmp_path: Path) -> None:
    """fedavg weights by what is declared; who declares nothing counts as the median."""
    world = World(manifest_of(tmp_path), saying(progress_of(1), privacy_of(1)))
    for step in range(500):
        world.node.follow_trainer("training", Progress(step=step, seconds_blocked=0.0))
    assert world.view.speed == 0.0
    assert world.view.declared_rate(ME) == 1.0


# Real trainers


def shards(folder: Path, *changes: str) -> list[TrainerSetup]:
    """Two nodes of one swarm; the second has other words, and 20 times as many of them."""
    fixed = ("privacy.noise_multiplier=0.8", "round.codec=int8")
    setups = make_homes(folder, 2, privacy="record", changes=(*fixed, *changes))
    shard = Path(setups[1].config.data.shard[0])
    for day in range(12):
        (shard / f"{day}.txt").write_text(f"{day}: zebras! " * 500 + "\n")
    return setups


def steps_of(node: Assembled, count: int) -> list[dict[str, Any]]:
    """After each step, what the daemon gets to tell others: by treatment, comparable."""
    trainer, seen = node.trainer, []
    for number in range(count):
        trainer.run(steps=1)
        fragment = number % trainer.exchanges.fragments.num_fragments
        entry: dict[str, Any] = {"state": trainer.state}
        update = trainer.exchanges.compress(
            number, trainer.snapshot(number, fragment, averaging=False)
        )
        trainer.exchanges.drop(number)
        for field in fields_by(CompressedUpdate, "public"):
            entry[field] = getattr(update, field)
        entry["size"] = memoryview(update.payload).nbytes
        progress = msgspec.to_builtins(trainer.progress())
        for field in fields_by(Progress, "public", "timing"):
            # losses are measured where that takes no more than a share of the time
            if not field.startswith(("seconds_", "loss_measured")) and "_age" not in field:
                entry[field] = progress[field]
        seen.append(entry)
    node.mechanism.close()  # a charge that is being written counts when it is
    # how many charges there were follows how long steps and writes take: timing
    assert node.ledger_counter() > 0
    return seen


@pytest.mark.parametrize("rule", ["gossip", "fedavg", "dynamic", "noloco"])
def test_trainers_on_different_text_look_alike(tmp_path: Path, rule: str) -> None:
    nodes = [assemble(setup) for setup in shards(tmp_path, f"round.rule={rule}")]
    try:
        seen = [steps_of(node, 10) for node in nodes]
        sizes = [node.beginning.text.num_records for node in nodes]
    finally:
        for node in nodes:
            node.close()
    assert sizes[0] * 2 < sizes[1]
    assert seen[0] == seen[1]


def test_a_run_in_tokens_ends_at_the_same_step(tmp_path: Path) -> None:
    """In planned tokens: when a node ends is seen by all."""
    nodes = [assemble(setup) for setup in shards(tmp_path, "end.tokens=1200", "end.steps=90")]
    try:
        for node in nodes:
            node.trainer.run(steps=100)
        assert [node.trainer.state for node in nodes] == ["closing", "closing"]
        ends = [node.trainer.counters.step for node in nodes]
        tokens = [node.trainer.counters.tokens for node in nodes]
    finally:
        for node in nodes:
            node.close()
    assert ends == [10, 10]  # 4 records of 32 tokens a step
    assert tokens != [1280, 1280]  # which neither had: batches are random


@pytest.mark.parametrize("size", [64, 100, 203, 1000, 123_456, 2**40 + 12_345])
def test_a_record_more_or_less_changes_neither_rate_nor_noise(size: int) -> None:
    told = coarse_size(size)
    assert told <= size < told * (1 + 1 / 32)
    assert coarse_size(told) == told
    alike = sum(coarse_size(n) == coarse_size(n + 1) for n in range(1000, 2000))
    assert alike >= 1000 - 1000 // 16
    assert [coarse_size(n) for n in range(64)] == list(range(64))


def test_neighbouring_shards_spend_alike(tmp_path: Path) -> None:
    """sigma is seen in the noise, and the budget's end in the phase."""
    manifest = manifest_of(tmp_path)
    rules = msgspec.structs.replace(
        manifest,
        privacy=msgspec.structs.replace(manifest.privacy, noise_multiplier=None),
        end=msgspec.structs.replace(manifest.end, steps=20),
    )
    spent = []
    for size in (200, 201):
        with Ledger.open(tmp_path / f"{size}.sqlite") as ledger:
            model, records = llama(tied=True), some_records(size)
            mechanism = build_mechanism(rules, model, records, record_losses, ledger)
            told = mechanism.spent()
            spent.append(msgspec.structs.replace(told, engine="", engine_reason=""))
            mechanism.close()
    assert spent[0] == spent[1]
    assert spent[0].noise_multiplier > 0


# What an operator is told


@pytest.mark.parametrize(("mode", "shouted"), [("off", True), ("record", False)])
async def test_a_start_without_privacy_is_shouted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: Any, shouted: bool
) -> None:
    setup = make_homes(tmp_path, 1, privacy=mode, changes=("privacy.noise_multiplier=2",))[0]
    home = Path(setup.home)
    (home / "swarm.key").write_bytes(bytes(32))
    (home / "swarm.key").chmod(0o400)
    joiner = Joiner(
        cast(Any, SimpleNamespace(manifest=home / "manifest.json", swarm_key=home / "swarm.key")),
        setup.config,
        Identity.generate(),
        cast(Any, SimpleNamespace(membership=SimpleNamespace(swarm_id=setup.swarm_id))),
        Life(lambda: 0.0),
    )
    with caplog.at_level("WARNING"):
        admitted = await joiner.admission()
    assert ("PRIVACY OFF" in caplog.text) == shouted
    node = FakeNode(manifest=admitted.manifest).node
    assert node.status().privacy_warning.startswith("PRIVACY OFF") == shouted


def test_the_tensors_of_two_nodes_are_their_own(tmp_path: Path) -> None:
    """What the comparison above leaves out does differ: it compares nodes that really train."""
    nodes = [assemble(setup) for setup in shards(tmp_path)]
    try:
        for node in nodes:
            node.trainer.run(steps=2)
        flats = [node.trainer.parameters.read() for node in nodes]
    finally:
        for node in nodes:
            node.close()
    for a, b in itertools.combinations(flats, 2):
        assert not torch.equal(a, b)
