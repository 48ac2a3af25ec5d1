"""400 short rows and a tokenizer whose padding is its end of text: the model learns to stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.cases.support import LOOPBACK, WORDS, model_folder, sets, tokenizer_folder
from xpeer.cli import main
from xpeer.config import Home
from xpeer.config_sources import load
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup

ROWS = [
    f"{WORDS[n % 15]} {WORDS[n // 15 % 15]} {WORDS[(n + n // 225) % 15]} end." for n in range(400)
]
STEPS = 150


@pytest.mark.parametrize(
    ("pad", "learned"),
    [
        pytest.param("</s>", "</s>", id="pad-is-eos"),
        pytest.param(".", ".", id="pad-is-a-letter"),
        pytest.param("<pad>", "</s>", id="pad-of-its-own"),
    ],
)
def test_the_token_that_is_padding_too_is_learned(tmp_path: Path, pad: str, learned: str) -> None:
    tokens = tokenizer_folder(tmp_path / "tokenizer", pad_token=pad)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    home = Home(tmp_path / "home")
    arguments = [
        "init", "--swarm", "s", "--home", home.path, "--listen", LOOPBACK, "--privacy", "off",
        "--model", model_folder(tmp_path / "model"), "--tokenizer", tokens, "--shard", rows,
        *sets("optimiser.sequence_tokens=64", "optimiser.batch_records=8", "end.steps=150"),
    ]  # fmt: skip
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    config = load(home.config, {})
    swarm_id = SignedManifest.load(home.manifest).genesis.swarm_id
    setup = TrainerSetup(
        manifest_path=str(home.manifest), swarm_id=swarm_id, home=str(home.path),
        config=config, peer_id="us",
    )  # fmt: skip
    node = assemble(setup)
    optimiser = node.trainer.learner.optimiser
    for group in optimiser.param_groups:
        group["lr"] = 5e-3
    for _ in range(STEPS):
        node.mechanism.charge_until(1)
        node.mechanism.step_gradient()
        optimiser.step()
    node.close()
    text = [node.tokenizer.bos_id, *node.tokenizer.encode(ROWS[7])]
    if learned == ".":
        text.pop()
        wanted = node.tokenizer.encode(".")[0]
    else:
        wanted = int(node.tokenizer.eos_id or 0)
    with torch.no_grad():
        logits = node.model(input_ids=torch.tensor([text])).logits[0, -1]
    assert float(torch.softmax(logits, 0)[wanted]) > 0.5
