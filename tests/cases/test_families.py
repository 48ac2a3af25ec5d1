"""Each family of models: founded, trained privately, resumed, handed to a joiner, exported, loaded.

In this process; `python -m benchmarks.families` does the same with real daemons.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families.models import FAMILIES, VOCABULARY, save
from tests.cases.homes import assembled, export, found_here
from xpeer.training.losses import record_losses

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


LEFT_TO_THE_BENCHMARK = ("llama, rope linear", "llama, rope dynamic", "llama, rope yarn")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in LEFT_TO_THE_BENCHMARK])
def test_a_whole_run(family: str, tmp_path: Path, shard: Path) -> None:
    model, home, joiner = (tmp_path / name for name in ("model", "home", "joiner"))
    save(model, family)
    found_here(home, shard, "--model", model)
    donor = assembled(home)
    donor.trainer.run(2)
    donor.checkpoints.copy()()
    donor.close()
    resumed = assembled(home)
    assert resumed.trainer.counters.step == 2
    assert torch.equal(resumed.trainer.parameters.read(), donor.trainer.parameters.read())
    public = resumed.trainer.public_loss()
    resumed.close()

    joiner.mkdir()
    for name in ("manifest.json", "credential", "swarm.key", "config.toml"):
        (joiner / name).write_bytes((home / name).read_bytes())
    second = assembled(joiner, initial="awaited")
    second.frozen.replace(resumed.frozen.read())
    _, measured = second.trainer.replace(resumed.trainer.parameters.read(), 2)
    assert measured == pytest.approx(public)
    second.checkpoints.copy()()
    second.close()

    loaded = AutoModelForCausalLM.from_pretrained(export(joiner, tmp_path / "out")).eval()
    with torch.no_grad():
        expected = record_losses(resumed.model.eval(), IDS)[0]
        torch.testing.assert_close(record_losses(loaded, IDS)[0], expected, rtol=1e-4, atol=1e-4)
        whole = loaded(input_ids=IDS).logits[:, -1]
        begun = loaded(input_ids=IDS[:, :-1], use_cache=True)
        last = loaded(input_ids=IDS[:, -1:], past_key_values=begun.past_key_values).logits[:, 0]
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-4)
