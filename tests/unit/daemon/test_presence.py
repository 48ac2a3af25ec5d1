"""What a node says of itself and remembers of members: cards, the roster, the state file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.unit.daemon.fakes import ALPHA, BETA, FakeNode, member
from xpeer.identity import PeerId
from xpeer_daemon.missed import Missed
from xpeer_daemon.presence import Presence
from xpeer_daemon.store import Store


async def test_a_card_that_no_node_of_the_dht_takes(fake: FakeNode) -> None:
    async def announce(_record: object) -> bool:
        return False

    roster: Any = SimpleNamespace(announce=announce, unstored=True)
    nothing: Any = None
    presence = Presence(fake.node, fake.view, roster, fake.partners, nothing, 1.0)
    await presence.announce("training")
    fake.passes(59)
    assert fake.codes == []
    fake.passes(2)
    assert fake.codes == ["card-failing"]
    fake.members.clear()  # alone there is nobody to take it
    await presence.announce("training")
    assert "card-failing" not in fake.codes


async def test_nobody_answers_the_roster(fake: FakeNode, tmp_path: Path) -> None:
    store, asked = Store.open(tmp_path / "state.sqlite"), asyncio.Event()
    roster: Any = SimpleNamespace(silence="AlphaAAA: timeout")

    async def refresh() -> None:
        asked.set()

    roster.refresh = refresh
    presence = Presence(fake.node, fake.view, roster, fake.partners, store, 1.0)
    refreshing = asyncio.create_task(presence.keep_refreshing())
    await asked.wait()
    refreshing.cancel()
    assert fake.codes == []
    fake.passes(31)
    assert fake.codes == ["roster-failing"]
    assert "for 31s: AlphaAAA: timeout" in fake.text("roster-failing")
    store.close()


async def test_members_are_written_to_disk_in_one_go_and_only_when_there_is_news(
    tmp_path: Path,
) -> None:
    """Each write waits for the disk, and holds up all that the daemon does."""
    fake = FakeNode(*(f"12D3KooW{number:08}" for number in range(64)))
    store = Store.open(tmp_path / "state.sqlite", fake.clock)
    commits: list[str] = []
    store._database.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)

    async def refresh() -> None:
        return

    roster: Any = SimpleNamespace(silence="", refresh=refresh)
    presence = Presence(fake.node, fake.view, roster, fake.partners, store, 1.0)

    async def look() -> int:
        """One more refresh, three seconds later; how many writes it made."""
        commits.clear()
        fake.clock.now += 3
        refreshing = asyncio.create_task(presence.keep_refreshing())
        await asyncio.sleep(0)
        refreshing.cancel()
        return len(commits)

    assert [await look() for _ in range(20)] == [1] + [0] * 19
    assert len(store.known_peers()) == 64
    assert await look() == 1  # a minute later: they are still here
    newest = PeerId("12D3KooWNewcomer")
    fake.members[newest] = member(newest)
    assert await look() == 1
    assert {p.peer_id for p in store.known_peers() if p.seen_unix_s == fake.clock.now} == {newest}
    fake.partners[newest].ledger.highest = 7
    assert await look() == 1
    store.close()


async def test_an_observer_that_went_while_we_were_down_is_not_missed(tmp_path: Path) -> None:
    fake = FakeNode(ALPHA)
    fake.members[PeerId(BETA)] = member(BETA, "observing", role="observer")
    store = Store.open(tmp_path / "state.sqlite", fake.clock)
    roster: Any = SimpleNamespace(silence="")
    Presence(fake.node, fake.view, roster, fake.partners, store, 1.0)._remember()
    missed = Missed()
    known = [(PeerId(p.peer_id), p.seen_unix_s) for p in store.known_peers()]
    assert len(known) == 2  # its address is kept
    missed.restore(known, fake.clock())
    assert missed.known == 1
    store.close()
