"""Parts of a home that are whole and another home's: each is refused before anything is spent."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch

from tests.unit.accounts.ledgers import open_declared
from xpeer import founding
from xpeer.accounts import register_file
from xpeer.accounts.accountant import Segment
from xpeer.config import Data, Home, NodeConfig, Privacy
from xpeer.drafting import draft_manifest
from xpeer.errors import ConfigError, LocalError, NotAuthorisedError
from xpeer.founding_model import initial_model
from xpeer.manifest.signed import SignedManifest
from xpeer.training import checkpoint
from xpeer.training.checkpoint import Bundle
from xpeer_daemon import belonging, start


@dataclass
class Made:
    """A home that has trained."""

    home: Home
    config: NodeConfig
    ledger_id: str

    def check(self) -> None:
        start.check(self.home, self.config, join_token=None)


def save(home: Home, ledger_id: str, num_params: int, step: int = 5) -> None:
    signed = SignedManifest.load(home.manifest)
    zeros = torch.zeros(num_params)
    bundle = Bundle(
        flat=zeros,
        exp_avg=zeros.clone(),
        exp_avg_sq=zeros.clone(),
        optimiser_step=0,
        counters={"step": step},
        ledger_id=ledger_id,
        manifest_hash=signed.genesis.manifest_hash.hex(),
    )
    checkpoint.save(home.checkpoints, bundle)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """Two founders, each with its swarm, checkpoint, ledger and register."""
    folder = tmp_path_factory.mktemp("homes")
    (folder / "public.txt").write_text("a public text, which everybody may read. " * 20)
    (folder / "shard").mkdir()
    (folder / "shard" / "a.txt").write_text("a text of this node's, of some length")
    source = initial_model(None, None, "tiny", None)
    made = []
    for name in ("a", "b"):
        manifest = draft_manifest(
            name, source, tokenizer=None, public_text=folder / "public.txt",
            changes=["end.steps=20"], privacy="record",
        )  # fmt: skip
        home = Home(folder / name)
        founding.found(home, manifest, source.write, "")
        config = NodeConfig(
            data=Data(shard=[str(folder / "shard")]), privacy=Privacy(register=str(folder / "r")),
        )  # fmt: skip
        with open_declared(home.ledger_db, register=folder / "r") as ledger:
            ledger.charge(Segment(1.0, 0.1, 5))
            save(home, ledger.id, manifest.model.num_params)
            made.append(Made(home, config, ledger.id))
    return made[0], made[1]


@pytest.fixture
def pair(homes: tuple[Made, Made], tmp_path: Path) -> tuple[Made, Home]:
    """The first as a copy to be spoilt, and the other's home."""
    ours, theirs = homes
    home = Home(tmp_path / "home")
    shutil.copytree(ours.home.path, home.path)
    register = tmp_path / "register"
    shutil.copytree(str(ours.config.privacy.register), register)
    config = msgspec.structs.replace(ours.config, privacy=Privacy(register=str(register)))
    return Made(home, config, ours.ledger_id), theirs.home


def test_a_home_as_it_was_made_is_well(pair: tuple[Made, Home]) -> None:
    pair[0].check()


PARTS: dict[str, tuple[tuple[str, ...], type[LocalError], str]] = {
    "key": (("identity.key",), NotAuthorisedError, "the credential is for .*, this key is 12D3"),
    "credential": (("credential",), NotAuthorisedError, "the credential is for"),
    "key and credential": (("identity.key", "credential"), NotAuthorisedError, "manifest.* is of"),
    "manifest": (("manifest",), NotAuthorisedError, r"manifest\.json is of swarm .* credential"),
    "swarm key": (("swarm_key",), NotAuthorisedError, "the key of another swarm than"),
    "admin key": (("admin_key",), NotAuthorisedError, "nobody could join|key of another swarm"),
    "checkpoints": (("checkpoints",), ConfigError, "is of manifest .*, this swarm's is"),
    "ledger": (("ledger_db",), ConfigError, "privacy ledger .* is .* was charged to"),
    "all but the checkpoints": (
        ("identity.key", "credential", "manifest", "swarm_key", "admin_key", "ledger_db"),
        ConfigError, "is of manifest",
    ),
    "all but the ledger": (
        ("identity.key", "credential", "manifest", "swarm_key", "admin_key", "checkpoints"),
        ConfigError, "privacy ledger",
    ),
}  # fmt: skip


def part(home: Home, name: str) -> Path:
    path = home.identity_key if name == "identity.key" else getattr(home, name)
    assert isinstance(path, Path)
    return path


@pytest.mark.parametrize(("parts", "kind", "text"), PARTS.values(), ids=list(PARTS))
def test_a_part_of_another_home_is_refused(
    pair: tuple[Made, Home], parts: tuple[str, ...], kind: type[LocalError], text: str
) -> None:
    made, theirs = pair
    for name in parts:
        ours, other = part(made.home, name), part(theirs, name)
        if other.is_dir():
            shutil.rmtree(ours)
            shutil.copytree(other, ours)
        else:
            shutil.copy2(other, ours)
    before = made.home.ledger_db.read_bytes()
    with pytest.raises(kind, match=text) as caught:
        made.check()
    assert type(caught.value) is kind
    assert caught.value.remedy
    assert made.home.ledger_db.read_bytes() == before


def test_a_part_that_is_gone_and_that_others_remember(pair: tuple[Made, Home]) -> None:
    made, _ = pair
    made.home.ledger_db.unlink()
    with pytest.raises(LocalError, match=r"ledger .* is missing, but .*ckpt-000000005"):
        made.check()


def test_a_register_whose_key_is_anothers_is_refused(pair: tuple[Made, Home]) -> None:
    made, _ = pair
    Path(str(made.config.privacy.register), register_file.KEY).write_bytes(b"x" * 32)
    with pytest.raises(LocalError, match=r"register .* was made with another register\.key"):
        made.check()


def test_a_register_that_the_home_was_not_charged_in_is_refused(
    pair: tuple[Made, Home], tmp_path: Path
) -> None:
    made, other = pair[0], tmp_path / "other"
    config = msgspec.structs.replace(made.config, privacy=Privacy(register=str(other)))
    with pytest.raises(ConfigError, match="other is not this home's register"):
        Made(made.home, config, made.ledger_id).check()
    assert not other.exists()


def test_a_checkpoint_of_another_size_is_refused(pair: tuple[Made, Home]) -> None:
    made, _ = pair
    save(made.home, made.ledger_id, 12, step=6)
    with pytest.raises(ConfigError, match="12 parameters, the manifest"):
        made.check()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(pair: tuple[Made, Home]) -> None:
    """As the trainer does; it says so."""
    made, _ = pair
    for step, content in ((7, b""), (8, b"\xff" * 20), (9, (3).to_bytes(8, "little") + b"[1]")):
        made.home.checkpoints.joinpath(f"ckpt-{step:09}.safetensors").write_bytes(content)
    made.check()
    newest = belonging._newest(made.home.checkpoints)
    assert newest is not None
    assert newest[0].name == "ckpt-000000005.safetensors"


def test_a_credential_is_looked_at_with_its_time(pair: tuple[Made, Home]) -> None:
    made, _ = pair
    credential = founding.load_credential(made.home)
    certificate = credential.verify(credential.claimed_swarm(), time.time())
    belonging.check_parts(made.home, made.config, certificate)
