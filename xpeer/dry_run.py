"""What a start would come to: `xpeer start --dry-run`. Charges nothing, and changes nothing.

The shard is read and counted as the trainer does it; the step that is timed is one on public text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from xpeer.accounts import accountant
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import SIGMA_SETTING, coarse_size, delta_of
from xpeer.accounts.ledger import Ledger
from xpeer.config import Home, NodeConfig
from xpeer.manifest import Manifest
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.text import Text, text_of
from xpeer.training.checkpoint import newest_step
from xpeer.training.schedule import planned_steps
from xpeer.training.tokenizer import load_tokenizer
from xpeer.trial import Tell, Trial, rehearse, require_reachable


def look(
    home: Home, config: NodeConfig, manifest: Manifest, tell: Tell, *, trial: bool = True
) -> None:
    """Count the text, take a step in small, and tell what a run would take.

    Args:
        home: has the swarm's manifest.
        config: of the node.
        manifest: of the swarm.
        tell: is told, line by line.
        trial: try and time a step, too.

    Raises:
        LocalError: what a start would be stopped by.
    """
    with tempfile.TemporaryDirectory(prefix="xpeer-dry-run-") as folder:
        text = _counted(home, config, manifest, Path(folder))
        _tell_text(config, manifest, text, tell)
        _tell_privacy(home, manifest, text, tell)
        if not trial:
            return
        require_reachable(manifest)
        found = rehearse(manifest, home, config, Path(folder), tell, steps=2, export=False)
    _tell_speed(home, manifest, found, tell)


def _counted(home: Home, config: NodeConfig, manifest: Manifest, folder: Path) -> Text:
    tokenizer = load_tokenizer(
        manifest.tokenizer, config.data.tokenizer, base_model=config.data.base_model
    )
    setup = TrainerSetup(
        manifest_path=str(home.manifest),
        swarm_id="",
        home=str(home.path),
        config=config,
        peer_id="self",
        members={"self": 1.0},
    )
    return text_of(setup, manifest, tokenizer, Home(folder))


def _tell_text(config: NodeConfig, manifest: Manifest, text: Text, tell: Tell) -> None:
    setting = "data.corpus" if manifest.shared_corpus else "data.shard"
    for line in text.shard.lines():
        tell(f"{setting}: {line}")
    tokens = int((text.records >= 0).sum())
    tell(
        f"{setting}: {len(set(text.documents)):,} documents to train on, "
        f"{len(text.records):,} records of at most {manifest.optimiser.sequence_tokens} tokens, "
        f"{tokens:,} tokens; {len(text.held_out):,} records held out"
    )
    if manifest.shared_corpus:
        tell("(all of the corpus: its division among the members is known once they are there)")


def _tell_privacy(home: Home, manifest: Manifest, text: Text, tell: Tell) -> None:
    """Noise, and epsilon at the end."""
    rules, steps = manifest.privacy, planned_steps(manifest)
    if not rules.policy.clips_records:
        tell(f"privacy: {rules.in_short()}")
        return
    units = len(text.records) if rules.unit == "record" else len(set(text.owners.tolist()))
    size = coarse_size(units)
    q, delta = min(manifest.optimiser.batch_records, size) / size, delta_of(manifest, units)
    sigma, charged = rules.noise_multiplier, 0
    if home.ledger_db.exists():
        with Ledger.look(home.ledger_db) as ledger:
            charged = ledger.steps_charged
            stored = ledger.settings(SIGMA_SETTING)
            sigma = sigma or (float(stored) if stored else None)
            spent = accountant.epsilon(ledger.segments(), delta)
        tell(f"privacy: {charged:,} steps were charged before, epsilon {spent:.3g}")
    if sigma is None:
        sigma = accountant.calibrate(rules.epsilon, delta, q, steps or 1)
    fits = accountant.steps_within(rules.epsilon, delta, [], sigma, q, steps or 10_000_000)
    at_end = accountant.epsilon([Segment(sigma, q, fits)], delta)
    ends = f"after {fits:,} steps" if steps is None or fits < steps else "at the end"
    tell(
        f"privacy: {rules.in_short()}: {q:.3g} of the {rules.unit}s a step, noise {sigma:.3g}; "
        f"epsilon {at_end:.3g} (delta {delta:.1e}) {ends}"
    )


def _tell_speed(home: Home, manifest: Manifest, found: Trial, tell: Tell) -> None:
    speed = found.tokens_per_step / max(found.step_s, 1e-9)
    device = f", {_size(found.device_bytes)} of the GPU's" if found.device_bytes else ""
    tell(
        f"speed: {speed:,.0f} tokens/s on {found.device} ({found.engine}); memory: "
        f"{_size(found.host_bytes)}{device} at most"
    )
    planned, done = planned_steps(manifest), newest_step(home.checkpoints) or 0
    if planned is None:
        tell(f"planned steps: it depends on the clock (end.seconds = {manifest.end.seconds})")
        return
    left_s = max(0, planned - done) * found.step_s
    tell(
        f"planned steps: {planned:,}, of which {done:,} are done; the rest takes about "
        f"{_duration(left_s)}, and a step {found.step_s:.2g} s, without waiting for partners"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
