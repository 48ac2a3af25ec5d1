"""`xpeer start --dry-run`: says what a start would do. It charges nothing, and changes nothing.

The shard is read and counted as the trainer does it. The timed step is one on public text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from xpeer.accounts import accountant
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import (
    SIGMA_SETTING,
    STEPS_MAX,
    Bound,
    coarse_size,
    delta_of,
    steps_within,
)
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.spending import SwarmSpending
from xpeer.accounts.trained import has_trained
from xpeer.amounts import duration, size
from xpeer.config import Home, NodeConfig
from xpeer.errors import ShardError
from xpeer.estimate import fit as fitting
from xpeer.estimate.remembered import Rehearsals
from xpeer.manifest import Manifest
from xpeer.shortage import keep_nothing
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.text import Text, goes_on_without_text, text_of
from xpeer.training.checkpoint_files import newest_step
from xpeer.training.losses import choose_device
from xpeer.training.schedule import planned_steps
from xpeer.training.token_cache import lent
from xpeer.training.tokenising import told
from xpeer.training.tokenizer import load_tokenizer
from xpeer.trial import Report, Trial, rehearse, require_reachable


def examine(
    home: Home, config: NodeConfig, manifest: Manifest, report: Report, *, trial: bool = True
) -> None:
    """Count the text, time a step, and report what a run would need.

    Args:
        home: has the swarm's manifest.
        config: of the node.
        manifest: of the swarm.
        report: called with each line of the answer.
        trial: True = also make a trial and time its step.

    Raises:
        LocalError: a start would stop with this error.
    """
    _examine_room(home, config, manifest, report)  # first: text may take hours to count
    with lent(home.cache) as cache:
        try:
            text = _counted(home, config, manifest, cache, report)
        except ShardError as e:
            if not goes_on_without_text(config, trained=has_trained(home)):
                raise
            report(f"warning: {e}")
            report("warning: so a start would take no steps, and only give its model to others")
            trial = False
        else:
            _report_text(config, manifest, text, report)
            _report_privacy(home, config, manifest, text, report)
    if not trial:
        return
    require_reachable(manifest)
    with tempfile.TemporaryDirectory(prefix="xpeer-dry-run-") as folder:
        measured = rehearse(manifest, home, config, Path(folder), report, steps=2, export=False)
    _report_speed(home, manifest, measured, report)


def _examine_room(home: Home, config: NodeConfig, manifest: Manifest, report: Report) -> None:
    """Compare what this node needs with what the machine has.

    Raises:
        ConfigError: a start would be refused, as it can't fit.
    """
    wanted = config.training.check_fit
    if wanted == "skip":
        return
    rehearsals = Rehearsals(home.cache, writes=False)
    private = manifest.privacy.policy.clips_records
    device, _ = choose_device(config.training.device, private=private)
    fit = fitting.examine(manifest, config, home, device, rehearsals, asked=True)
    if wanted == "refuse" and not has_trained(home):
        fit.require()
    if fit.short:
        keep_nothing()  # as a start would, whose speed is wanted
    for line in (*fit.notes, *(f"warning: {said}" for said in (*fit.warnings, *fit.problems))):
        report(f"room: {line}")


def _counted(
    home: Home, config: NodeConfig, manifest: Manifest, cache: Path, report: Report
) -> Text:
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
    return text_of(setup, manifest, tokenizer, cache, told(report))


def _report_text(config: NodeConfig, manifest: Manifest, text: Text, report: Report) -> None:
    setting = "data.corpus" if manifest.shared_corpus else "data.shard"
    for line in text.shard.lines():
        report(f"{setting}: {line}")
    report(
        f"{setting}: {text.documents.distinct():,} documents to train on, "
        f"{len(text.records):,} records of at most {manifest.optimiser.sequence_tokens} tokens, "
        f"{text.tokens:,} tokens; {len(text.held_out):,} records held out"
    )
    for warning in text.warnings:
        report(f"warning: {warning}")
    if manifest.shared_corpus:
        report("(all of the corpus: its division among the members is known once they are there)")


def _report_privacy(
    home: Home, config: NodeConfig, manifest: Manifest, text: Text, report: Report
) -> None:
    """Report the noise, and epsilon at the end of the swarm's run."""
    rules, steps = manifest.privacy, planned_steps(manifest)
    if not rules.policy.clips_records:
        report(f"privacy: {rules.in_short()}")
        return
    units = len(text.records) if rules.unit == "record" else text.num_owners
    count = coarse_size(units)
    q, delta = min(manifest.optimiser.batch_records, count) / count, delta_of(manifest, units)
    spending = SwarmSpending(config.privacy.keep_back)
    epsilon = spending.part_of(rules.epsilon)
    sigma, spent, bounds = rules.noise_multiplier, list[Segment](), [Bound(epsilon, [])]
    if home.ledger_db.exists():
        with Ledger.look(home.ledger_db) as ledger:
            spent, stored = ledger.segments(), ledger.settings(SIGMA_SETTING)
            bounds = spending.bounds(rules.epsilon, ledger)(spent)
        sigma = sigma or (float(stored) if stored else None)
        charged = sum(segment.steps for segment in spent)
        before = accountant.epsilon(spent, delta)
        report(f"privacy: {charged:,} steps were charged before, epsilon {before:.3g}")
    if sigma is None:
        sigma = accountant.calibrate(epsilon, delta, q, steps or 1)
    done = newest_step(home.checkpoints) or 0
    left = STEPS_MAX if steps is None else max(0, steps - done)
    fits = steps_within(bounds, delta, sigma, q, left)
    at_end = accountant.epsilon([*spent, Segment(sigma, q, fits)], delta)
    more = "more " if spent else ""
    ends = f"after {fits:,} {more}steps" if steps is None or fits < left else "at the end"
    report(
        f"privacy: {rules.in_short()}: {q:.3g} of the {rules.unit}s a step, noise {sigma:.3g}; "
        f"epsilon {at_end:.3g} (delta {delta:.1e}) {ends}"
    )
    if spending.keep_back:
        kept = rules.epsilon - epsilon
        report(f"privacy: epsilon {kept:g} is kept back for `xpeer finetune` (privacy.keep_back)")


def _report_speed(home: Home, manifest: Manifest, trial: Trial, report: Report) -> None:
    speed = trial.tokens_per_step / max(trial.step_s, 1e-9)
    device = f", {size(trial.device_bytes)} of the GPU's" if trial.device_bytes else ""
    report(
        f"speed: {speed:,.0f} tokens/s on {trial.device} ({trial.engine}); memory: "
        f"{size(trial.host_bytes)}{device} at most"
    )
    planned, done = planned_steps(manifest), newest_step(home.checkpoints) or 0
    if planned is None:
        report(f"planned steps: it depends on the clock (end.seconds = {manifest.end.seconds})")
        return
    left_s = max(0, planned - done) * trial.step_s
    report(
        f"planned steps: {planned:,}, of which {done:,} are done; the rest takes about "
        f"{duration(left_s)}, and a step {trial.step_s:.2g} s, without waiting for partners"
    )
