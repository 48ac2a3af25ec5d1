"""Checks that `xpeer init`, `xpeer start` and `xpeer start --dry-run` make before anything else.

They have to be quick, so they need neither torch nor libp2p.
"""

from __future__ import annotations

from xpeer.config import Home, NodeConfig, privacy_register
from xpeer.control import socket_is_there
from xpeer.network.multiaddress import check_announced, check_listen, check_peer
from xpeer.paths import folder_of


def check_settings(home: Home, config: NodeConfig) -> None:
    """Refuse settings with which no node of any swarm could run.

    Raises:
        ConfigError: names the setting, its value and a remedy.
    """
    network = config.network
    for address in network.listen:
        check_listen("network.listen", address)
    check_announced("network.announce", network.announce)
    for address in network.bootstrap:
        check_peer("network.bootstrap", address)
    if network.direct_listen:
        check_listen("network.direct_listen", network.direct_listen)
    socket_is_there(home.socket(config))
    privacy_register(config)
    data = config.data
    for setting, folder in (("tokenizer", data.tokenizer), ("base_model", data.base_model)):
        if folder:
            folder_of(f"data.{setting}", folder)
