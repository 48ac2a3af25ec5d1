"""The manifest: signed as it stands, bound to its fingerprint, every field checked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from xpeer.errors import ConfigError, ExitCode, NotAuthorisedError, XpeerError
from xpeer.identity import Domain, Identity, blake2b
from xpeer.manifest import Manifest, PublicText, SharedCorpus
from xpeer.manifest.model import Model
from xpeer.manifest.round import Round
from xpeer.manifest.signed import MAX_MANIFEST_BYTES, SignedManifest

TEXT = "The quick brown fox."


def tree(**changes: Any) -> dict[str, Any]:
    made = {
        "name": "demo",
        "created_unix_s": 1_700_000_000,
        "model": {"config": {"model_type": "llama"}, "num_params": 10, "initial_digest": "ab"},
        "public_text": {"digest": blake2b(TEXT.encode()).hex(), "text": TEXT},
        "end": {"steps": 100},
    }
    return made | changes


def manifest(**changes: Any) -> Manifest:
    return msgspec.convert(tree(**changes), Manifest)


ADMIN = Identity.generate()
SIGNED = SignedManifest.sign(manifest(), ADMIN)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(SIGNED.to_bytes())
    loaded = SignedManifest.load(path)
    assert loaded == SIGNED
    assert loaded.open(SIGNED.genesis.swarm_id) == manifest()
    assert loaded.genesis.swarm_id == SIGNED.genesis.swarm_id
    assert len(SIGNED.genesis.swarm_id) == 64


def test_defaults_are_the_documented_ones() -> None:
    made = manifest()
    assert made.privacy.mode == "record"
    assert made.privacy.epsilon == 8.0
    assert made.round.codec == "int8"
    assert made.round.fragments == 5
    assert made.round.window_steps == 5


def test_the_fingerprint_commits_to_admin_and_manifest() -> None:
    swarms = {
        SIGNED.genesis.swarm_id,
        SignedManifest.sign(manifest(), Identity.generate()).genesis.swarm_id,
        SignedManifest.sign(manifest(name="other"), ADMIN).genesis.swarm_id,
    }
    assert len(swarms) == 3


def test_every_flipped_bit_is_refused() -> None:
    good = SIGNED.to_bytes()
    swarm_id = SIGNED.genesis.swarm_id
    for position in range(len(good)):
        for bit in (0, 5):
            altered = bytearray(good)
            altered[position] ^= 1 << bit
            try:
                SignedManifest.from_bytes(bytes(altered)).open(swarm_id)
            except XpeerError:
                continue
            # Only what is no content may change: none of it decodes to something else.
            assert SignedManifest.from_bytes(bytes(altered)) == SIGNED


def test_every_cut_is_refused() -> None:
    good = SIGNED.to_bytes()
    for end in range(0, len(good), 3):
        with pytest.raises(XpeerError):
            SignedManifest.from_bytes(good[:end]).open()


def test_another_swarm_and_another_key_are_refused() -> None:
    with pytest.raises(NotAuthorisedError, match="of swarm"):
        SIGNED.open("ab" * 32)
    other = Identity.generate()
    replaced = msgspec.structs.replace(SIGNED, admin=other.verify_key)
    with pytest.raises(NotAuthorisedError, match="altered"):
        replaced.open()
    # A whole manifest signed anew by somebody else is genuine, but of another swarm.
    forged = SignedManifest.sign(manifest(), other)
    with pytest.raises(NotAuthorisedError, match="of swarm"):
        forged.open(SIGNED.genesis.swarm_id)


@pytest.mark.parametrize("field", ["admin", "signature"])
@pytest.mark.parametrize("value", [b"", b"x", bytes(31), bytes(32), bytes(64), bytes(65)])
def test_keys_and_signatures_of_any_length(field: str, value: bytes) -> None:
    with pytest.raises(NotAuthorisedError):
        msgspec.structs.replace(SIGNED, **{field: value}).open()


def test_signed_nonsense_is_a_clear_error() -> None:
    for body in ("", "{}", "[]", "null", SIGNED.body.replace('"version":1', '"version":2')):
        signature = ADMIN.sign(Domain.MANIFEST, body.encode())
        with pytest.raises(ConfigError, match="manifest"):
            SignedManifest(body, ADMIN.verify_key, signature).open()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_codec_that_was_removed_is_named_with_a_remedy(bits: int) -> None:
    body = json.dumps(tree(round={"codec": f"int{bits}-modulo"}))
    signature = ADMIN.sign(Domain.MANIFEST, body.encode())
    with pytest.raises(ConfigError) as error:
        SignedManifest(body, ADMIN.verify_key, signature).open()
    assert str(error.value) == (
        f"manifest: round.codec = int{bits}-modulo: modulo codecs were removed - run this swarm "
        "with xpeer 0.1.0 as of 2026-11-29 or earlier, or found another one with "
        "round.codec = int8"
    )
    assert error.value.exit_code == ExitCode.BAD_CONFIG


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"end": {}}, "sigma can't be calibrated"),
        ({"public_text": {"digest": "00", "text": TEXT}}, "digest does not match"),
        ({"version": 2}, "version"),
        ({"colour": "red"}, "colour"),
        ({"round": {"fragments": 0}}, "fragments"),
        ({"round": {"codec": "int3"}}, "codec"),
        ({"round": {"codec": "int8-modulo"}}, "codec"),
        ({"round": {"slot_s": 0}}, "slot_s"),
        ({"privacy": {"epsilon": -1}}, "epsilon"),
        ({"privacy": {"delta": 1}}, "delta"),
        ({"privacy": {"delta": 0.01}}, "privacy.delta = 0.01"),
        ({"privacy": {"delta": 1e-12}}, "privacy.delta = 1e-12"),
        ({"name": "a\x1b[2Kb"}, "name"),
        ({"privacy": {"mode": "trust me"}}, "mode"),
        ({"optimiser": {"learning_rate": "fast"}}, "learning_rate"),
        ({"optimiser": {"sequence_tokens": 4}}, "sequence_tokens"),
        ({"limits": {"max_members": 100_000}}, "max_members"),
        ({"model": {"config": {}, "num_params": 0, "initial_digest": ""}}, "num_params"),
    ],
)
def test_every_field_is_checked(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        manifest(**changes)


def test_privacy_off_needs_no_plan() -> None:
    assert manifest(end={}, privacy={"mode": "off"}).privacy.mode == "off"
    assert manifest(end={}, privacy={"noise_multiplier": 1.0}).end.steps is None


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        SignedManifest.load(tmp_path / "none")
    for n, data in enumerate([b"", b"\xff", b"{}", b"[1]", b" " * (MAX_MANIFEST_BYTES + 1)]):
        path = tmp_path / str(n)
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="manifest"):
            SignedManifest.load(path)


def test_optional_parts_travel() -> None:
    made = Manifest(
        name="n",
        created_unix_s=1,
        model=Model({"model_type": "gpt2"}, 5, "x"),
        public_text=PublicText(blake2b(b"").hex(), ""),
        shared_corpus=SharedCorpus("books", "ff"),
        end=manifest().end,
    )
    signed = SignedManifest.sign(made, ADMIN)
    assert SignedManifest.from_bytes(signed.to_bytes()).open() == made


@pytest.mark.parametrize(
    ("config", "measured", "start"),
    [
        ({"vocab_size": 100}, 2.5, 2.5),
        ({"vocab_size": 100}, 4.5, math.inf),  # no better than guessing: log 100 is 4.6
        ({"vocab_size": 100}, None, math.inf),  # of an older version
        ({}, 2.5, 2.5),
        ({}, 12.0, math.inf),  # some number of ids is a default of its class
        ({"text_config": {"vocab_size": 100}}, 2.5, 2.5),
        ({"text_config": {"vocab_size": 100}}, 4.5, math.inf),
        ({"text_config": {}}, 2.5, 2.5),
        ({"text_config": {}}, 12.0, math.inf),
        ({}, None, math.inf),
        ({"vocab_size": "many"}, None, math.inf),
    ],
)
def test_the_start_is_as_good_as_measured_if_it_is_better_than_a_guess(
    config: dict[str, Any], measured: float | None, start: float
) -> None:
    public = msgspec.structs.replace(manifest().public_text, initial_loss=measured)
    model = Model({"model_type": "gpt2", **config}, 5, "x")
    made = msgspec.structs.replace(manifest(), model=model, public_text=public)
    assert made.start_loss == start


@pytest.mark.parametrize(
    ("rules", "remedy"),
    [
        ({"group": 1}, "2 to 8, or 0"),
        ({"rule": "asynchronous", "group": 4}, "round.group = 2"),
        ({"rule": "diloco"}, "round.group = 0"),
        ({"rule": "gradient", "group": 0}, "round.fragments = 1"),
        ({"masks": True}, "round.group = 3 to 8"),
        ({"masks": True, "group": 0}, "round.group = 3 to 8"),
        *(
            ({"masks": True, "group": 3, "rule": rule}, "set round.rule = gossip")
            for rule in ("fedavg", "dynamic", "noloco", "gasloc")
        ),
        ({"outer_rate": 0.5}, "unset"),
        ({"trim": 2, "group": 5}, "round.combiner = trimmed-mean"),
        ({"combiner": "trimmed-mean"}, "round.group to 3 or more"),
        ({"combiner": "trimmed-mean", "group": 4, "trim": 2}, "round.group to 5 or more"),
        ({"combiner": "trimmed-mean", "group": 8, "trim": 4}, "or to 0 for all"),
        ({"combiner": "trimmed-mean", "group": 3, "masks": True}, "which round.masks = true hides"),
        *(
            ({"combiner": "trimmed-mean", "group": 5, "rule": rule}, "set round.rule = gossip")
            for rule in ("asynchronous", "fedavg", "dynamic")
        ),
    ],
)
def test_rounds_that_make_no_sense_name_field_and_remedy(rules: dict[str, object], remedy: str):
    with pytest.raises(ValueError, match=remedy):
        Round(**rules).check()  # type: ignore[arg-type] # of several types


def test_a_manifest_from_before_combiners_means_what_it_meant() -> None:
    fields = msgspec.to_builtins(manifest())
    for name in ("combiner", "trim"):
        del fields["round"][name]
    body = json.dumps(fields)
    signed = SignedManifest(body, ADMIN.verify_key, ADMIN.sign(Domain.MANIFEST, body.encode()))
    opened = signed.open(signed.genesis.swarm_id)
    assert (opened.round.combiner, opened.round.least_group) == ("mean", 2)
    assert signed.genesis.manifest_hash == blake2b(body.encode())


@pytest.mark.parametrize(
    ("rules", "least"),
    [
        ({}, 2),
        ({"group": 8}, 2),
        ({"group": 5, "masks": True}, 5),
        ({"group": 5, "combiner": "trimmed-mean"}, 3),
        ({"group": 0, "combiner": "trimmed-mean", "trim": 3}, 7),
    ],
)
def test_how_many_a_group_needs(rules: dict[str, object], least: int) -> None:
    made = Round(**rules)  # type: ignore[arg-type] # of several types
    made.check()
    assert made.least_group == least
