"""Nothing that is public or derived depends on the text, once the released gradients are given.

Two nodes differ in their shards alone: other words, other sizes. Both take the same steps, since
their trainers are given the same gradients (`fixed_gradients`), and their randomness is the same.
Real trainer processes, sessions, messages, files and reports; then every field with a marker that
says public, derived or noised has to be equal, byte for byte. Timing is left out: the clock is
real. Local fields have to differ, or the shards did not.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from nacl.public import PrivateKey
from nacl.signing import SigningKey

from tests import leaving
from tests.factories import privacy_stamp
from tests.leaving import destination, name_of, treatments, visible
from tests.meetings import meet
from tests.unit.daemon.worlds import World
from tests.unit.network.test_agreement import Dialler, FakeDesk, FakeTrainer, party, streams
from tests.unit.trainer.processes import Watch
from tests.unit.training.homes import make_homes
from xpeer.accounts import model_card, report
from xpeer.accounts.ledger import Ledger
from xpeer.config import Home
from xpeer.forms import Form
from xpeer.identity import Identity, blake2b
from xpeer.leaves import Treatment
from xpeer.manifest import Manifest
from xpeer.manifest.signed import SignedManifest
from xpeer.network import giving
from xpeer.network.agreement import Proposer, answering
from xpeer.network.link import Link
from xpeer.network.pieces import Shape
from xpeer.network.rates import Rates
from xpeer.network.shelf import Shelf
from xpeer.network.stream import Stream
from xpeer.network.turns import Turns
from xpeer.network.uplink import Uplink
from xpeer.trainer.channel import DaemonChannel
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint
from xpeer.training.schedule import Counters
from xpeer.update import CompressedUpdate, ModelState, PeerUpdate, StateCopy
from xpeer.wire import codec, messages, session
from xpeer.wire.messages import Refuse
from xpeer_daemon import belonging
from xpeer_daemon.closing import Closing
from xpeer_daemon.outcomes import Outcomes
from xpeer_daemon.store import Known, Store

STEPS = 6
LOW, HIGH, THIRD = sorted(
    (Identity(SigningKey(bytes([number]) * 32)) for number in range(3)), key=lambda i: i.peer_id
)
SAME = (Treatment.PUBLIC, Treatment.DERIVED, Treatment.NOISED)

NOT_OF_THE_TRAINER = {
    "xpeer.manifest.": "the founder wrote it before any training",
    "xpeer.needs.": "of the manifest",
    "xpeer.founding.": "of certificates",
    "xpeer.roster.cards.": "keys and clocks around a MemberRecord, which is compared",
    "xpeer.network.dht.": "sealed cards",
    "xpeer.network.direct.": "a port and a random ticket",
    "xpeer.network.membership.invites.": "keys",
    "xpeer.network.admission.": "manifest and swarm key",
    "xpeer.network.membership.certificates.": "keys",
    "xpeer.network.introductions.": "credentials and addresses",
    "xpeer.roster.dht_cards.": "sealed cards",
    "xpeer.roster.spreading.": "others' cards",
    "xpeer.wire.messages.MaskStep": "fresh keys, and digests of what they mask",
    "xpeer.wire.link_plan.": "numbers that a person typed",
    "xpeer.estimate.": "of a model's config and numbers that a person typed",
    "xpeer.accounts.own_model.": "of `xpeer finetune`: it stays at home, or is in an own export",
    "xpeer.training.adapters.": "of the manifest",
    "xpeer.accounts.planning.": "numbers that a person typed",
    "xpeer.status.Fetching": "of a joiner, whose trainer has nothing yet",
    "xpeer.status.CorpusShare": "of a corpus that all members have: there is no shard",
    "xpeer.control.": "Status, and what is printed of it; see its fields",
    "xpeer.cli.": "the demo's own text; what the daemon's history holds, which is compared",
    "xpeer_daemon.store.KnownPeer": "what others say",
    "xpeer.update.": "stages inside of the processes; what leaves is compared",
}
"""Structures that get no value from a trainer, or not in these runs; names or prefixes."""


class Partner(FakeTrainer):
    """Shows values that are always the same."""

    def __init__(self, form: Form) -> None:
        values = torch.randn(form.num_values, generator=torch.Generator().manual_seed(7))
        super().__init__(codec.encode(form.codec, 0.05 * values))
        self.form = form

    async def snapshot(self, *_args: object, averaging: bool) -> CompressedUpdate:
        return CompressedUpdate(self.payload, self.form, 1, privacy_stamp())


class Recorded:
    """Our trainer, with a note of what it handed out."""

    def __init__(self, trainer: TrainerProcess) -> None:
        self._trainer = trainer
        self.handed: list[CompressedUpdate | ModelState] = []

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        self.handed.append(await self._trainer.snapshot(meeting_id, fragment, averaging=averaging))
        return cast(CompressedUpdate, self.handed[-1])

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Any:
        return await self._trainer.verify(meeting_id, exchange_id, update)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        await self._trainer.merge(meeting_id, weights)

    def drop(self, meeting_id: int) -> None:
        self._trainer.drop(meeting_id)

    @property
    def step(self) -> int:
        return self._trainer.step

    async def export_state(self) -> StateCopy:
        copy = await self._trainer.export_state()
        self.handed.append(copy.state)
        return copy


class Life:
    """A node from its start to its end, and everything that left it.

    Args:
        setup: of its trainer.
        manifest: of the swarm.
    """

    def __init__(self, setup: TrainerSetup, manifest: Manifest) -> None:
        self.setup, self.manifest = setup, manifest
        self.home = Home(Path(setup.home))
        self.left: list[object] = []

    async def live(self) -> list[object]:
        watch = Watch()
        trainer = await TrainerProcess.start(
            self.setup, watch, program="tests.unit.daemon.fixed_gradients"
        )
        try:
            await watch.state("closing")
            trainer.epoch = 5  # randomness of its own
            await trainer.evaluate()
            await self._meets(trainer)
            path = Path(await trainer.checkpoint())
            await self._speaks(trainer)
            state = (await trainer.export_state()).state
            await trainer.import_state(state.payload, state.step)
        finally:
            await trainer.stop(60)
        self._leaves_files(path)
        return self.left

    async def _meets(self, trainer: TrainerProcess) -> None:
        """A partner, and a joiner."""
        recorded = Recorded(trainer)
        others = HIGH.peer_id, THIRD.peer_id
        self.world = world = World(self.manifest, trainer, others)
        store = Store.open(self.home.path / "state.sqlite")
        closing = Closing(trainer.facts.num_fragments, None)
        world.partners._events = Outcomes("ab" * 32, world.view, world.node.health, store, closing)
        form = Form(self.manifest.round.codec, trainer.fragment_values(1, averaging=True))
        near, far = streams(LOW, HIGH)
        desk = FakeDesk(Partner(form))
        answers = asyncio.ensure_future(answering(party(HIGH), desk)(far))
        agreement = await Proposer(party(LOW), Dialler(near)).propose(
            HIGH.peer_id, world.gossip, slot=1000, fragment=1, averaging=True, form=form,
            timeout_s=20,
        )  # fmt: skip
        world.partners.done(agreement, await meet(recorded, agreement, 20), 0.5)
        await desk.outcome
        near.abort()
        await asyncio.gather(answers, return_exceptions=True)
        await self._gives(recorded)
        store.keep_known(Known(trainer.progress, trainer.privacy, 1.0))
        self.left += [*recorded.handed, *store.rounds(), store.last_known()]
        store.close()

    async def _gives(self, recorded: Recorded) -> None:
        ours, theirs = socket.socketpair()
        shape, shelf = Shape(self.manifest.state_form), Shelf(1)
        handle = giving.serving(
            party(LOW), lambda: recorded, shape, Turns(2, Rates()), shelf, Uplink(0)
        )
        serving = asyncio.ensure_future(handle(Link(THIRD.peer_id, Stream(theirs), 20.0)))
        joiner = Dialler(Link(LOW.peer_id, Stream(ours), 20.0))
        giver = await giving.ask(party(THIRD), joiner, LOW.peer_id, shape, Rates())
        assert [n async for n, _ in giver.pieces(0, shape.num_pieces)] == [*range(shape.num_pieces)]
        await giver.close()
        await asyncio.gather(serving, return_exceptions=True)

    async def _speaks(self, trainer: TrainerProcess) -> None:
        """To members and to its operator."""
        self.world.fake.record.remember(trainer.state, trainer.progress, trainer.privacy, trainer)
        said = await self.world.shown()
        refuse = Refuse(1, said["refusal"])
        status = self.world.node.status()
        assert status.partners
        self.left += [said["record"], said["terms"], refuse, status, self.world.node.about()]

    def _leaves_files(self, path: Path) -> None:
        bundle = checkpoint.load(path)
        newest = belonging._newest(self.home.checkpoints)
        assert newest is not None
        with Ledger.look(self.home.ledger_db) as ledger:
            self.left += [
                bundle,
                Counters.from_dict(bundle.counters),
                checkpoint._Words(1, bundle.optimiser_step, {}, "", bundle.manifest_hash),
                newest[1],
                ledger.charges()[-1],
                report.account(ledger),
                model_card.card_of(self.manifest, self.setup.swarm_id, bundle.step, ledger),
            ]


@pytest.fixture
def last_words(monkeypatch: pytest.MonkeyPatch) -> dict[type, object]:
    """The last message of each kind from the trainer: how many there are is a matter of time."""
    last: dict[type, object] = {}
    real = DaemonChannel.receive

    async def receive(self: DaemonChannel) -> Any:
        message = await real(self)
        last[type(getattr(message, "result", message))] = message
        return message

    monkeypatch.setattr(DaemonChannel, "receive", receive)
    return last


@pytest.fixture
def same_randomness(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Session keys and numbers of exchanges are no secrets here; and what is sent is noted."""
    sent: list[object] = []
    real_init, real_encode = session.Handshake.__init__, messages.encode

    def init(self: session.Handshake, *args: Any, **kwargs: Any) -> None:
        real_init(self, *args, **kwargs)
        self._secret = PrivateKey(blake2b(str((self._partner, self._purpose)).encode()))

    def encode(message: Any) -> bytes:
        sent.append(message)
        return real_encode(message)

    def hello(self: session.Handshake) -> bytes:
        said = real_hello(self)
        signed = msgspec.msgpack.decode(said, type=session.SignedHello)
        sent.extend((signed, msgspec.msgpack.decode(signed.body, type=session.Hello)))
        return said

    real_hello = session.Handshake.hello
    monkeypatch.setattr(session.Handshake, "__init__", init)
    monkeypatch.setattr(session.Handshake, "hello", hello)
    monkeypatch.setattr(messages, "encode", encode)
    monkeypatch.setattr(secrets, "randbits", lambda _bits: 4711)
    return sent


def comparable(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return blake2b(value.numpy().tobytes()).hex()
    if isinstance(value, bytes | bytearray | memoryview):
        return blake2b(bytes(value)).hex()
    if isinstance(value, dict):
        return str({key: comparable(each) for key, each in value.items()})
    return repr(value)


def fields_of(left: Iterable[object], *wanted: Treatment) -> list[tuple[str, str]]:
    """Paths and values, in an order of their own: messages of two sides cross on their way."""
    return sorted(
        (path, comparable(value)) for each in left for path, value in visible(each, *wanted)
    )


def write_other_text(shard: Path) -> None:
    """Other words, more documents, longer ones."""
    for day in range(17):
        (shard / f"{day}.txt").write_text(f"{day}: zebras! " * 500 + "\n")


@pytest.mark.timeout(300)
async def test_only_what_is_local_or_timing_depends_on_the_text(
    tmp_path: Path, same_randomness: list[object], last_words: dict[type, object]
) -> None:
    (setup,) = make_homes(
        tmp_path, 1, privacy="record",
        changes=(
            "privacy.noise_multiplier=0.8", "round.codec=int8", "round.rule=dynamic",
            f"end.steps={STEPS}",
        ),
    )  # fmt: skip
    manifest = SignedManifest.load(Path(setup.manifest_path)).open(setup.swarm_id)
    home, fresh = Path(setup.home), tmp_path / "fresh"
    shutil.copytree(home, fresh)
    lives = []
    for number in range(2):
        if number:
            shutil.rmtree(home)
            shutil.rmtree(tmp_path / "register")
            shutil.copytree(fresh, home)
            write_other_text(home / "shard")
        same_randomness.clear()
        last_words.clear()
        left = await Life(setup, manifest).live()
        lives.append([*left, *same_randomness, *last_words.values()])

    one, other = (fields_of(left, *SAME) for left in lives)
    assert [path for path, _ in one] == [path for path, _ in other]
    assert [each for each in zip(one, other, strict=True) if each[0] != each[1]] == []
    local = [dict(fields_of(left, Treatment.LOCAL)) for left in lives]
    differing = {path for path in local[0] if local[0][path] != local[1].get(path)}
    assert {f"Status.shard.{what}" for what in ("files", "documents", "characters")} <= differing
    assert "Account.segments" in differing  # q follows from the number of records
    assert uncompared(lives[0]) == []


def uncompared(left: Iterable[object]) -> list[str]:
    """Structures with a field to compare that were not among what left."""
    compared = {name_of(type(inner)) for each in left for inner in structures_in(each)}
    return [
        name_of(kind)
        for kind in leaving.all_structures()
        if (goes := destination(kind)) is not None
        and goes.audience is not None
        and not set(SAME).isdisjoint(treatments(kind).values())
        and name_of(kind) not in compared
        and not name_of(kind).startswith(tuple(NOT_OF_THE_TRAINER))
    ]


def structures_in(value: object) -> Iterable[object]:
    """It, and those in its fields."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from structures_in(each)
    elif leaving.is_structure(type(value)):
        yield value
        for field in leaving.fields(type(value)):
            yield from structures_in(getattr(value, field))


def test_what_is_not_compared_exists() -> None:
    names = [name_of(kind) for kind in leaving.all_structures()]
    for left_out in NOT_OF_THE_TRAINER:
        assert any(name.startswith(left_out) for name in names), left_out
