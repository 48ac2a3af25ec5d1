"""Homes founded by the command line and trained in this process: no daemon, no second process.

Only what the first release had, as `support`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from tests.cases.support import LOOPBACK, SMALL, sets
from xpeer import config, config_sources
from xpeer.cli import main
from xpeer.config import Home
from xpeer.founding import load_credential
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup


def call(*arguments: str | Path) -> Result:
    """Run `xpeer ARGUMENTS` in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def found_here(home: Path, shard: Path, *arguments: str | Path, fields: Sequence[str] = ()) -> None:
    """As `support.found`, in this process."""
    done = call(
        "init", "--swarm", "s", "--home", home, "--listen", LOOPBACK, "--shard", shard,
        *sets(*SMALL, "end.steps=20", *fields), *arguments,
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def assembled(home: Path, **more: Any) -> Assembled:
    """The trainer of a home, as its daemon would start it."""
    torch.set_num_threads(1)
    found = Home(home)
    return assemble(
        TrainerSetup(
            manifest_path=str(found.manifest), swarm_id=load_credential(found).claimed_swarm(),
            home=str(home), peer_id="peer",
            config=config_sources.load(found.config, settings()), **more,
        )
    )  # fmt: skip


def settings() -> dict[str, str]:
    """The test's own register; and, where the code has the setting, a precision that does not
    depend on how fast this processor is at the moment.
    """
    known = "precision" in config.Training.__struct_fields__
    return {
        "XPEER_PRIVACY_REGISTER": os.environ["XPEER_PRIVACY_REGISTER"],
        **({"XPEER_TRAINING_PRECISION": "float32"} if known else {}),
    }


def train(home: Path, steps: int) -> None:
    """Take steps and save a checkpoint."""
    node = assembled(home)
    node.trainer.run(steps)
    node.checkpoints.copy()()
    node.close()


def export(home: Path, folder: Path, *more: str) -> Path:
    """`xpeer checkpoint export`; asserts that it says so."""
    done = call("checkpoint", "export", "--home", home, "--hf", folder, *more)
    assert done.exit_code == 0, done.output
    assert "exported" in done.output
    return folder


@torch.no_grad()
def logits(model: Any, length: int = 24) -> torch.Tensor:
    """On random ids of a vocabulary of 300."""
    ids = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(3))
    found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return found
