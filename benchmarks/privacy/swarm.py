"""A few peers in one process, made of what a node is made of, and everything they show.

Each peer is the trainer's own loop with the trainer's own mechanism (Poisson samples, per-record
clipping, secret noise, a ledger on the disk) and its own exchanges (fragments, codec, norm limits,
rules). What is simulated is the network between them: payloads are handed over, one slot at every
step, pairs as `xpeer.gossip.matching` draws them. Noise and samples have no seed, so no two runs
are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from benchmarks.privacy.ledgers import open_ledger
from xpeer.accounts.spending import WHOLE, SwarmSpending
from xpeer.gossip import matching
from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.privacy.clipping import Engine, RecordLosses
from xpeer.privacy.engines import choose_engine, sample_of
from xpeer.privacy.mechanism import Mechanism, OffMechanism, RecordMechanism
from xpeer.privacy.options import Options
from xpeer.training.flat import FlatParameters
from xpeer.training.loop import TrainingLoop
from xpeer.training.loop_parts import make_loop
from xpeer.training.losses import record_losses
from xpeer.training.measuring import Evaluation
from xpeer.update import PeerUpdate
from xpeer.wire import codec

SWARM_ID = "5eed" * 16


@dataclass(frozen=True)
class ReceivedFragment:
    """What one peer gave another, as the other decodes it."""

    sender: int
    slot: int
    fragment: int
    values: torch.Tensor  # (n,) float32


Watch = Callable[[ReceivedFragment], None]


class Swarm:
    """Peers that train and meet. A swarm of one is a peer alone.

    Args:
        manifest: of all.
        make_model: the model with its initial parameters; called once for each peer.
        shards: records of each peer, (n, T) int64.
        folder: for the ledgers.
        losses: of the model.
        watch: is shown everything that is sent while they train, averaging at the end excepted.
        spending: what everybody's steps may spend.
    """

    def __init__(
        self,
        manifest: Manifest,
        make_model: Callable[[], torch.nn.Module],
        shards: Sequence[torch.Tensor],
        folder: Path,
        *,
        losses: RecordLosses = record_losses,
        watch: Watch | None = None,
        spending: SwarmSpending = WHOLE,
    ) -> None:
        self.manifest, self._watch = manifest, watch
        self.models = [make_model() for _ in shards]
        self.ledgers = [open_ledger(folder / str(i), manifest) for i in range(len(shards))]
        self.mechanisms: list[Mechanism] = []
        self.trainers: list[TrainingLoop] = []
        engine: Engine | None = None
        for model, records, ledger in zip(self.models, shards, self.ledgers, strict=True):
            parameters = FlatParameters(model, manifest.round.fragments)
            mechanism: Mechanism
            if not manifest.privacy.policy.charges:
                mechanism = OffMechanism(manifest, model, records, losses)
            else:
                engine = _engine(model, losses, records, like=engine)
                options = Options(engine=engine)
                mechanism = RecordMechanism(
                    manifest, model, records, losses, ledger, options, spending=spending
                )
            evaluation = Evaluation(public=lambda: 0.0)  # nobody looks at it
            self.mechanisms.append(mechanism)
            self.trainers.append(make_loop(manifest, parameters, mechanism, evaluation))
        self._names = [PeerId(f"peer{number}") for number in range(len(shards))]
        self._slot = 0

    def __enter__(self) -> Self:
        """For `with`: closes the ledgers at the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for charges that are being written."""
        for mechanism, ledger in zip(self.mechanisms, self.ledgers, strict=True):
            mechanism.close()
            ledger.close()

    def train(self, each_step: Callable[[int], None] | None = None) -> None:
        """To the manifest's end: a step of everybody, then a slot.

        Args:
            each_step: called with the number of steps done.
        """
        for step in range(self.manifest.end.steps or 0):
            for trainer in self.trainers:
                trainer.run(steps=1)
            self._slot += 1
            fragments = self.manifest.round.fragments
            fragment = matching.fragment_of(SWARM_ID, self._slot, fragments)
            for pair in self._pairs():
                self._meet(pair, fragment, averaging=False)
            if each_step is not None:
                each_step(step + 1)

    def close_down(self) -> torch.Tensor:
        """The closing windows: everybody's parameters averaged.

        Returns:
            What is released: the first peer's parameters, (P,) float32.
        """
        for _ in range(2 * math.ceil(math.log2(len(self.trainers)))):
            self._slot += 1
            for pair in self._pairs():
                for fragment in range(self.manifest.round.fragments):
                    self._meet(pair, fragment, averaging=True)
        return self.trainers[0].parameters.read()

    def epsilon_spent(self) -> float | None:
        """The largest of any peer; None without privacy."""
        spent = [mechanism.spent().epsilon_spent for mechanism in self.mechanisms]
        return max(spent) if self.manifest.privacy.policy.charges else None

    def _pairs(self) -> list[tuple[int, int]]:
        if len(self._names) == 1:
            return []
        pairs = matching.matching(SWARM_ID, self._slot, self._names)
        return [(self._names.index(a), self._names.index(b)) for a, b in pairs]

    def _meet(self, pair: tuple[int, int], fragment: int, *, averaging: bool) -> None:
        """As `xpeer.round.Meeting` does it, without a network."""
        number = self._slot * self.manifest.round.fragments + fragment
        sent = []
        for peer in pair:
            trainer = self.trainers[peer]
            private = trainer.snapshot(number, fragment, averaging=averaging)
            update = trainer.exchanges.compress(number, private)
            sent.append(PeerUpdate(bytes(update.payload), update.form, peer_id=""))
            if self._watch is not None and not averaging:
                values = codec.decode(update.form, sent[-1].payload)
                self._watch(ReceivedFragment(peer, self._slot, fragment, values))
        for peer, received in zip(pair, reversed(sent), strict=True):
            exchanges = self.trainers[peer].exchanges
            exchanges.verify(number, number, received)
            exchanges.resolve(number, {number: 0.5})
            self.trainers[peer].merge(number)


def _engine(
    model: torch.nn.Module, losses: RecordLosses, records: torch.Tensor, like: Engine | None
) -> Engine:
    """Chosen as a node does at its start; peers of one model need not all try."""
    if like is None:
        return choose_engine(model, losses, sample_of(records)).engine
    make: Callable[[torch.nn.Module, RecordLosses], Engine] = type(like)
    return make(model, losses)
