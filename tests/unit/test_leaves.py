"""The markers at the fields of everything that leaves: complete, harmless, and as documented."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta, Struct

from tests import leaving
from tests.leaving import SEEN_BY_OTHERS, destination, name_of, treatments, types_of
from xpeer.leaves import Local, Parts, Public, Treatment, seen_by, stays
from xpeer.trainer import answers, commands

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "messages.json").read_text())
"""By class: bytes of a message as xpeer encoded it before there were markers."""


def that_leave(kinds: Iterable[type]) -> Iterator[type]:
    """Those whose fields have to be marked."""
    for kind in kinds:
        goes = destination(kind)
        if goes is None or goes.audience is not None:
            yield kind


def unmarked(kinds: Iterable[type]) -> list[str]:
    """Structures without a destination, and fields without a marker or with several."""
    found = []
    for kind in that_leave(kinds):
        if destination(kind) is None:
            found.append(name_of(kind))
        found += [f"{name_of(kind)}.{field}" for field, t in treatments(kind).items() if t is None]
    return found


@pytest.fixture(scope="module")
def kinds() -> list[type]:
    return leaving.all_structures()


def test_every_structure_says_who_reads_it_and_every_field_what_makes_it_harmless(
    kinds: list[type],
) -> None:
    assert unmarked(kinds) == []
    names = {name_of(kind) for kind in kinds}
    for known in (
        "wire.messages.Terms",
        "forms.Form",
        "status.Progress",
        "accounts.chain.Charge",
    ):
        assert f"xpeer.{known}" in names


@dataclass
class Inner:
    text: str


@seen_by("members")
class Gossip(Struct):
    name: Public[str]
    secret: int
    inner: Parts[list[Inner]] = []


class Rumour(Gossip):
    more: Public[str] = ""


@dataclass
class Half:
    one: Local[int]


def test_what_has_no_marker_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "modules", lambda: iter([sys.modules[__name__]]))
    named = [name.removeprefix(f"{__name__}.") for name in unmarked(leaving.all_structures())]
    assert named == [
        "Gossip.secret", "Rumour", "Rumour.secret", "Half", "Inner", "Inner.text",
    ]  # fmt: skip


def test_what_others_see_holds_nothing_local(kinds: list[type]) -> None:
    for kind in that_leave(kinds):
        goes = destination(kind)
        assert goes is not None
        if goes.audience in SEEN_BY_OTHERS:
            assert Treatment.LOCAL not in treatments(kind).values(), kind
            parts = {f for f, t in treatments(kind).items() if t is Treatment.PARTS}
            for inner in leaving.inside(kind, parts):
                theirs = destination(inner)
                assert theirs is not None, kind
                assert theirs.audience in SEEN_BY_OTHERS, kind


def test_a_trainer_speaks_to_its_daemon_alone() -> None:
    """What it is told, in turn, does not leave the node."""
    said = {destination(kind) for kind in answers.FromTrainer.__args__ + answers.Result.__args__}
    assert {goes.audience if goes else "" for goes in said} == {"node"}
    ordered = {
        destination(kind) for kind in commands.ToTrainer.__args__ + commands.Command.__args__
    }
    assert {goes.audience if goes else "" for goes in ordered} == {None}


def test_parts_are_what_holds_structures_and_nothing_else_is_called_so(kinds: list[type]) -> None:
    """Else a public field could hold a structure with a field that is local."""
    opaque = bytes, dict[str, Any]
    for kind in that_leave(kinds):
        for field, annotation in types_of(kind).items():
            treatment = treatments(kind)[field]
            if treatment is Treatment.PARTS:
                held = list(leaving.inside(kind, {field}))
                assert held or leaving.plain(annotation) in opaque, (kind, field)
            elif leaving.holds_structures(annotation):
                goes = destination(kind)
                assert treatment in (Treatment.LOCAL, Treatment.WITHHELD) or (
                    goes is not None and goes.all_public
                ), (kind, field)


def test_every_treatment_has_a_use_and_a_meaning(kinds: list[type]) -> None:
    used = {treatment for kind in that_leave(kinds) for treatment in treatments(kind).values()}
    assert used == set(Treatment)
    for treatment in Treatment:
        assert f"    {treatment:10}" in leaving.legend()


def test_the_table_of_the_docs_is_what_the_markers_say() -> None:
    text = leaving.DOCUMENT.read_text(encoding="utf-8")
    assert leaving.written(text) == text, "run `python -m tests.leaving`"


@pytest.mark.parametrize("name", VECTORS)
def test_messages_are_what_they_were_byte_for_byte(name: str, kinds: list[type]) -> None:
    (kind,) = [kind for kind in kinds if name_of(kind) == name]
    before = bytes.fromhex(VECTORS[name])
    message: object = msgspec.msgpack.decode(before, type=kind)
    assert msgspec.msgpack.encode(message) == before


def test_there_are_bytes_of_every_message(kinds: list[type]) -> None:
    sent = {
        name_of(kind)
        for kind in kinds
        if name_of(kind).startswith(
            ("xpeer.wire.messages.", "xpeer.wire.session.", "xpeer.network.")
        )
    }
    assert sent - {"xpeer.wire.messages.Message"} <= set(VECTORS)


def test_a_marker_leaves_bounds_alone() -> None:
    @seen_by("members")
    class Bounded(Struct, array_like=True):
        number: Public[Annotated[int, Meta(ge=0, lt=10)]]
        names: Public[Annotated[list[Annotated[str, Meta(max_length=3)]], Meta(max_length=1)]]

    decode = msgspec.msgpack.Decoder(Bounded).decode
    assert decode(msgspec.msgpack.encode([9, ["abc"]])) == Bounded(9, ["abc"])
    for wrong in ([10, []], [-1, []], [1, ["abcd"]], [1, ["a", "b"]], ["1", []]):
        with pytest.raises(msgspec.ValidationError):
            decode(msgspec.msgpack.encode(wrong))


def test_what_stays_needs_no_markers() -> None:
    @stays("a setting")
    class Setting(Struct):
        path: str

    assert unmarked([Setting]) == []
