"""`xpeer estimate`: what a run will need, before anything is founded or started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import click

from xpeer.amounts import duration, size
from xpeer.cli.adapter_options import AdapterOptions, adapter_options
from xpeer.cli.common import GivenPath, Whole, echo, echo_json, json_option, say
from xpeer.config import NodeConfig
from xpeer.errors import ConfigError, ExitCode
from xpeer.forms import Codec
from xpeer.founding_model import (
    PRESETS,
    LoraOptions,
    base_dtype,
    declared_dtype,
    expected_adapters,
    read_json,
)
from xpeer.manifest import Optimiser
from xpeer.manifest.model import BaseDtype
from xpeer.manifest.round import Round
from xpeer.policies import RULES, PrivacyMode, RuleName, privacy_policy
from xpeer.source import check_folder, has_weights

if TYPE_CHECKING:
    from xpeer.estimate.phases import Estimate
    from xpeer.estimate.remembered import Rehearsals
    from xpeer.estimate.step import Step, StepMemory

_DEFAULT: Final = Round()
_Again = Literal["auto", "on", "off"]


@click.command()
@click.option(
    "--model",
    type=GivenPath("folder", "model"),
    help="Hugging Face folder. Its config is read, and the type of its weights, if they are there.",
)
@click.option(
    "--model-config",
    type=GivenPath("file", "config"),
    help="config.json of a model that is not downloaded yet.",
)
@click.option("--preset", type=click.Choice(sorted(PRESETS)), help="Small model for bytes.")
@adapter_options
@click.option(
    "--privacy", type=click.Choice(get_args(PrivacyMode)), default="record", show_default=True
)
@click.option(
    "--sequence-tokens",
    type=Whole(8, 1 << 20),
    default=Optimiser().sequence_tokens,
    show_default=True,
)
@click.option(
    "--micro-batch", type=Whole(1, 1 << 20), default=1, show_default=True, help="Records a pass."
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default="auto",
    show_default=True,
    help="What a step is taken on: a GPU computes more at once. auto: what this machine would use.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "auto"]),
    default="auto",
    show_default=True,
    help="Precision of a step. auto: what this machine would choose on --device; of a GPU that it "
    "doesn't have, bfloat16.",
)
@click.option(
    "--checkpoint-activations",
    type=click.Choice(get_args(_Again)),
    is_flag=False,
    flag_value="on",
    default="auto",
    show_default=True,
    help="Compute activations twice to save memory, as training.checkpoint_activations. auto: if a "
    "step does not fit into --memory-gb otherwise.",
)
@click.option("--fragments", type=Whole(1, 1024), default=_DEFAULT.fragments, show_default=True)
@click.option(
    "--codec", type=click.Choice(get_args(Codec)), default=_DEFAULT.codec, show_default=True
)
@click.option(
    "--rule", type=click.Choice(get_args(RuleName)), default=_DEFAULT.rule, show_default=True
)
@click.option("--memory-gb", type=float, help="Memory of the device that a step has to fit into.")
@click.option(
    "--link-mbit", type=float, help="Bandwidth in the slower direction, Mbit/s, to print times."
)
@json_option
def estimate(
    model: Path | None,
    model_config: Path | None,
    preset: str | None,
    adapters: AdapterOptions,
    privacy: PrivacyMode,
    sequence_tokens: int,
    micro_batch: int,
    device: str,
    precision: Any,
    checkpoint_activations: _Again,
    fragments: int,
    codec: str,
    rule: RuleName,
    memory_gb: float | None,
    link_mbit: float | None,
    as_json: bool,
) -> None:
    """Say what memory, disk and bytes on the wire a run needs, in each of its phases.

    It loads no weights: the code of a step runs without values. Exit 1 if a step doesn't fit
    into --memory-gb.
    """
    for option, given in (("--memory-gb", memory_gb), ("--link-mbit", link_mbit)):
        if given is not None and not 0 < given < 1e9:
            raise ConfigError(f"{option}: {given:g} makes no sense", "give a positive number")
    options = adapters.combined()
    from xpeer.estimate import fit, phases, planned, remedies  # noqa: PLC0415 - torch takes seconds
    from xpeer.estimate.remembered import Rehearsals  # noqa: PLC0415
    from xpeer.estimate.step import Step  # noqa: PLC0415

    config = _config(model, model_config, preset)
    private = privacy_policy(privacy).charges
    kind, computing, why = planned.device_and_precision(device, precision, private=private)
    if why:
        say(why)
    step = Step(
        config=config,
        lora=None if options is None else expected_adapters(config, options),
        base_dtype=_frozen_dtype(model, config, options),
        sequence_tokens=sequence_tokens,
        micro_batch=micro_batch,
        private=private,
        precision=computing,
        recompute=checkpoint_activations == "on",
        device=kind,
    )
    most = None if memory_gb is None else memory_gb * 1e9
    rehearsals = Rehearsals()
    step, memory = _chosen(step, rehearsals, most, checkpoint_activations)
    rate = None if link_mbit is None else link_mbit * 1e6
    policy = RULES[rule]
    wire = phases.Wire(
        fragments=policy.fragments or fragments, codec=codec, rule=policy, bits_per_s=rate
    )
    fits = None if most is None else memory.peak <= most
    remedy = None
    if most is not None and not fits:
        remedy = remedies.find(step, memory, most, rehearsals.of, again=_has_layers(config))
    answer = phases.Estimate(
        num_params=memory.num_trained,
        frozen_params=memory.num_frozen,
        phases=phases.phases_of(
            *(memory, wire, NodeConfig().checkpoint.keep),
            private=private,
            on_cpu=kind == "cpu",
            converted=fit.converted_bytes(model, step.base_dtype) if model and step.lora else 0,
        ),
        fits=fits,
        remedy="" if remedy is None else remedy.words,
    )
    if as_json:
        echo_json(answer)
    else:
        _print(answer, step, memory_gb)
    if fits is False:
        raise click.exceptions.Exit(ExitCode.ERROR)


def _config(model: Path | None, file: Path | None, preset: str | None) -> dict[str, Any]:
    """The model's config, from exactly one of three sources."""
    given = [source for source in (model, file, preset) if source is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{len(given)} of --model, --model-config and --preset are given", "give one of them"
        )
    if preset is not None:
        return PRESETS[preset]
    if model is not None:
        check_folder(model, "--model", may_lack_weights=True)
        file = model / "config.json"
    return read_json(file or Path())


def _frozen_dtype(
    model: Path | None, config: dict[str, Any], options: LoraOptions | None
) -> BaseDtype:
    """The type of the frozen weights: as founding will have it, once the weights are there."""
    if model is not None and has_weights(model, "--model"):
        return base_dtype(model, options)
    return base_dtype(None, options, declared_dtype(config))


def _chosen(
    step: Step, rehearsals: Rehearsals, most: float | None, again: _Again
) -> tuple[Step, StepMemory]:
    """The step that a node would settle on in so much memory, and what it needs."""
    memory = rehearsals.of(step)
    if most is None or memory.peak <= most or again != "auto" or not _has_layers(step.config):
        return step, memory
    smaller = replace(step, recompute=True)
    needed = rehearsals.of(smaller)
    if needed.peak > most:
        return step, memory
    say("layers are computed again, as training.checkpoint_activations = auto does where it has to")
    return smaller, needed


def _has_layers(config: dict[str, Any]) -> bool:
    """Whether the model has layers that can be computed again."""
    from xpeer.training.model import skeleton  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.recompute import layers_of  # noqa: PLC0415

    return bool(layers_of(skeleton(config)))


def _print(answer: Estimate, step: Step, memory_gb: float | None) -> None:
    from xpeer.estimate.remedies import of_founding  # noqa: PLC0415 - torch takes seconds

    records = f"{step.micro_batch} record{'s' if step.micro_batch > 1 else ''}"
    echo(f"a step on {step.device} in {step.precision}, {records} a pass")
    echo(f"{answer.num_params:,} trained parameters, {answer.frozen_params:,} frozen ones")
    echo(f"{'phase':<11} {'device':>9} {'host':>9} {'disk':>9} {'wire':>9} {'time':>8}")
    for each in answer.phases:
        sizes = (each.device, each.host, each.disk, each.wire)
        time = "" if each.wire_s is None or not each.wire else duration(each.wire_s)
        row = " ".join(f"{size(num) if num else '':>9}" for num in sizes)
        echo(f"{each.name:<11} {row} {time:>8}".rstrip())
    if most := max(each.slack for each in answer.phases):
        echo(f"up to {size(most)} more where there is room: the C library keeps freed memory")
    if answer.fits is None:
        return
    if answer.fits:
        echo(f"a step fits into {memory_gb:g} GB")
    else:
        echo(f"a step does not fit into {memory_gb:g} GB")
        echo(
            f"it would with: {answer.remedy}"
            if answer.remedy
            else f"no setting helps: choose fewer --sequence-tokens, or {of_founding(step)}"
        )
