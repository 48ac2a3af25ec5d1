"""A peer of hivemind's: DHT and DecentralizedAverager, as its documentation starts them."""

from __future__ import annotations

import time
from typing import Any

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import Float16Compression, NoCompression

from benchmarks.exchange.child import Requests
from benchmarks.exchange.model import SHOWN, values_of

CODECS = {"float16": Float16Compression, "float32": NoCompression}
TIMEOUT_S = 300.0


class Averager:
    """One peer.

    Args:
        config: of the parent: address, seeds, rank, group size, codec, num_params, settings.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._rank = config["rank"]
        self._num_params = config["num_params"]
        self._dht = hivemind.DHT(
            host_maddrs=[f"/ip4/{config['address']}/tcp/0"],
            initial_peers=config["seeds"],
            start=True,
            use_relay=False,
            use_auto_relay=False,
            auto_nat=False,
            nat_port_map=False,
        )
        self._averager = DecentralizedAverager(
            [values_of(self._rank, self._num_params)],
            self._dht,
            start=True,
            prefix="benchmark",
            target_group_size=config["group"],
            min_group_size=config["group"],
            compression=CODECS[config["codec"]](),
            allreduce_timeout=TIMEOUT_S,
            allow_state_sharing=False,
            **config["settings"],
        )
        self.addresses = [str(a) for a in self._dht.get_visible_maddrs()]

    def prepare(self) -> dict[str, Any]:
        """Set the values anew."""
        with self._averager.get_tensors() as (values,):
            values.copy_(values_of(self._rank, self._num_params))
            return {"shown": values[:SHOWN].tolist()}

    def average(self, at: float) -> dict[str, Any]:
        """From `at` on; when it ended."""
        time.sleep(max(at - time.time(), 0))
        group = self._averager.step(timeout=TIMEOUT_S, allow_retries=True)
        finished = time.time()
        with self._averager.get_tensors() as (values,):
            shown = values[:SHOWN].tolist()
        return {"finished": finished, "shown": shown, "group": len(group or ())}

    def close(self) -> None:
        """End its processes."""
        self._averager.shutdown()
        self._dht.shutdown()


def main() -> None:
    """Start, and do what the parent says; its processes fork, so no event loop runs here."""
    requests = Requests()
    incoming = iter(requests)
    averager = Averager(next(incoming))
    requests.answer(addresses=averager.addresses)
    try:
        for request in incoming:
            try:
                at = request.get("at")
                requests.answer(**(averager.average(at) if at else averager.prepare()))
            except Exception as e:  # noqa: BLE001 - told to the parent
                requests.answer(error=repr(e))
    finally:
        averager.close()


if __name__ == "__main__":
    main()
