"""The manifest alone decides how a node trains; its operator may insist on a mode, or not start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest

from tests.unit.training.homes import make_homes
from xpeer.errors import ConfigError, ExitCode, NotAuthorisedError
from xpeer.manifest.signed import SignedManifest
from xpeer.privacy.mechanism import OffMechanism, RecordMechanism
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup

Mode = Literal["record", "off"]
SIGMA = ("privacy.noise_multiplier=2",)


def setup_of(folder: Path, manifest: Mode, asked: str) -> TrainerSetup:
    made = make_homes(folder, 1, privacy=manifest, changes=SIGMA)[0]
    data = msgspec.structs.replace(made.config.data, privacy=asked)
    config = msgspec.structs.replace(made.config, data=data)
    return msgspec.structs.replace(made, config=config)


@pytest.mark.parametrize(
    ("manifest", "asked", "kind"),
    [
        ("record", "record", RecordMechanism),
        ("off", "off", OffMechanism),
        ("off", "", OffMechanism),
    ],
)
def test_the_manifest_decides(tmp_path: Path, manifest: Mode, asked: str, kind: type) -> None:
    node = assemble(setup_of(tmp_path, manifest, asked))
    assert isinstance(node.mechanism, kind)
    node.close()


@pytest.mark.parametrize(("manifest", "asked"), [("record", "off"), ("off", "record")])
def test_nobody_trains_with_less_or_more_than_it_says(
    tmp_path: Path, manifest: Mode, asked: str
) -> None:
    with pytest.raises(ConfigError, match=f"data.privacy = {asked}") as error:
        assemble(setup_of(tmp_path, manifest, asked))
    assert error.value.exit_code == ExitCode.BAD_CONFIG
    assert f"privacy.mode = {manifest}" in error.value.problem


@pytest.mark.parametrize(
    ("manifest", "most", "starts"),
    [("record", 8.0, True), ("record", 7.9, False), ("off", 100.0, False), ("off", 0.0, True)],
)
def test_a_node_may_insist_on_an_epsilon(
    tmp_path: Path, manifest: Mode, most: float, starts: bool
) -> None:
    signed = SignedManifest.load(Path(setup_of(tmp_path, manifest, "").manifest_path)).open()
    if starts:
        signed.require_privacy("", most)
        return
    with pytest.raises(ConfigError, match=r"privacy\.max_epsilon") as error:
        signed.require_privacy("", most)
    assert signed.privacy.in_short() in error.value.problem


def test_a_manifest_that_was_altered_at_home_is_refused(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, "record", "")
    path = Path(setup.manifest_path)
    signed = SignedManifest.load(path)
    body = signed.body.replace('"mode":"record"', '"mode":"off"')
    assert body != signed.body
    path.write_bytes(msgspec.structs.replace(signed, body=body).to_bytes())
    with pytest.raises(NotAuthorisedError, match="altered"):
        assemble(setup)
