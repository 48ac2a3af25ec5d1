"""`xpeer init`: found a swarm, or prepare to join one."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from xpeer import founding
from xpeer.accounts import signal
from xpeer.cli.adapter_options import AdapterOptions, adapter_options
from xpeer.cli.commands import command
from xpeer.cli.common import (
    GivenName,
    GivenPath,
    GivenText,
    echo_json,
    home_option,
    json_option,
    load_config,
    say,
    say_foreign,
    secure_home,
)
from xpeer.cli.needed import require_room, say_needs
from xpeer.cli.new_config import as_toml, check_new
from xpeer.cli.start import read_token
from xpeer.config import Home, NodeConfig
from xpeer.drafting import draft_manifest, foresee_manifest
from xpeer.errors import ConfigError
from xpeer.files import clear_staged
from xpeer.folders import folder_named
from xpeer.founding_model import PRESETS, foreseen, initial_model
from xpeer.manifest import Manifest
from xpeer.needs import Needs
from xpeer.network.membership.invites import Token
from xpeer.network.multiaddress import check_peer
from xpeer.paths import checked
from xpeer.policies import PrivacyMode
from xpeer.source import BYTES, check_folder, config_in, tokenizer_of

_COMMAND_LINE = click.core.ParameterSource.COMMANDLINE
_FOUNDING = (
    *("model", "model_config", "preset", "lora_rank", "lora_alpha", "lora_target", "lora_train"),
    *("lora_rank_stabilised", "lora_from", "base_dtype"),
    *("public_text", "changes", "privacy"),
)
"""Options that decide something for all members. They don't go with --join."""


@click.command()
@home_option
@json_option
@click.option("--swarm", "name", metavar="NAME", help="Found a swarm of this name.")
@click.option(
    "--join", metavar="TOKEN", help="Join a swarm: the token, file:PATH, or - for standard input."
)
@click.option(
    "--model",
    type=GivenPath("folder", "model"),
    help="Hugging Face folder of a model to start from.",
)
@click.option(
    "--model-config",
    type=GivenPath("file", "config"),
    help="config.json, for random initial weights.",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Small model for bytes, with random initial weights (default: small).",
)
@adapter_options
@click.option(
    "--base-model",
    type=GivenPath("folder", "model"),
    help="This node's copy of the model whose adapters the swarm trains, with --join.",
)
@click.option(
    "--tokenizer",
    type=GivenText(checked),
    metavar="FOLDER|bytes",
    help="Folder of a tokenizer, or bytes. Default: the one in the model's folder, else bytes.",
)
@click.option(
    "--public-text",
    type=GivenPath("file"),
    help="Text that is no secret, of which the first 200 KB are used. Default: the Python manual's "
    "topics.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Field of the manifest, e.g. end.steps=2000 (repeatable).",
)
@click.option(
    "--privacy",
    type=click.Choice(get_args(PrivacyMode)),
    default="record",
    show_default=True,
    help="Privacy mode of all members, which never changes. record: differential privacy protects "
    "every record. off: nothing protects the text.",
)
@click.option("--shard", multiple=True, type=GivenText(), metavar="PATH", help="Text to train on.")
@click.option(
    "--corpus",
    multiple=True,
    type=GivenText(),
    metavar="PATH",
    help="Copy of a corpus, instead of --shard: every member trains on a part of it.",
)
@click.option(
    "--text-field",
    type=GivenName(),
    metavar="FIELD",
    help="Field of its rows that holds the text (default: text); messages: chats; "
    "prompt+completion: two fields, of which the second is predicted.",
)
@click.option("--listen", multiple=True, metavar="ADDR", help="Multiaddress to listen on.")
@click.option("--announce", multiple=True, metavar="ADDR", help="Address to give to others.")
@click.option("--bootstrap", "seeds", multiple=True, metavar="ADDR", help="Entry point to use.")
@click.option(
    "--name", "node_name", metavar="NAME", help="Name of this node for the other members."
)
@click.option(
    "--skip-trial",
    is_flag=True,
    help="Don't try a step, an exchange and an export before signing: for a huge model.",
)
@click.option(
    "--skip-estimate",
    is_flag=True,
    help="Don't estimate what a node needs: that takes a minute for a huge model.",
)
@click.pass_context
def init(
    ctx: click.Context,
    home: Home,
    as_json: bool,
    name: str | None,
    join: str | None,
    model: Path | None,
    model_config: Path | None,
    preset: str | None,
    adapters: AdapterOptions,
    base_model: Path | None,
    tokenizer: str | None,
    public_text: Path | None,
    changes: tuple[str, ...],
    privacy: PrivacyMode,
    shard: tuple[str, ...],
    corpus: tuple[str, ...],
    text_field: str | None,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    seeds: tuple[str, ...],
    node_name: str | None,
    skip_trial: bool,
    skip_estimate: bool,
) -> None:
    """Found a swarm (--swarm NAME), or prepare this home to join one (--join TOKEN).

    Before a manifest is signed, a trial on public text tries all that it fixes. After an error the
    disk is as before.
    """
    if (name is None) == (join is None):
        raise ConfigError("--swarm and --join: one of them is needed", "see `xpeer init --help`")
    found_in = _tokenizer_folder(model, model_config, tokenizer, joins=join is not None)
    settings = {
        "network.listen": list(listen),
        "network.announce": list(announce),
        "network.bootstrap": [check_peer("--bootstrap", seed) for seed in seeds],
        "network.name": node_name or "",
        "data.shard": [str(Path(p).expanduser().absolute()) for p in shard],
        "data.corpus": [str(Path(p).expanduser().absolute()) for p in corpus],
        "data.text_field": text_field or "",
        "data.tokenizer": str(found_in.expanduser().absolute()) if found_in else "",
        "data.base_model": str(base_model.expanduser().absolute()) if base_model else "",
    }
    check_new(home, settings)
    config = load_config(home, {key: value for key, value in settings.items() if value})
    settings["data.text_field"] = config.data.text_field  # a variable's, too: nobody reads it later
    say_foreign()
    secure_home(home)
    if join is not None:
        given = [k for k in _FOUNDING if ctx.get_parameter_source(k) is _COMMAND_LINE]
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')} does not go with --join",
                "the swarm's founder has decided that",
            )
        _join(home, join, settings, as_json=as_json)
        return
    founding.refuse_second_swarm(home)
    lora = adapters.combined()
    clear_staged(home)
    require_room(
        foresee_manifest(
            str(name),
            foreseen(model, model_config, preset, lora),
            changes=changes,
            privacy=privacy,
            corpus=bool(corpus),
        ),
        *(config, home, model),
        trial=not skip_trial,
    )
    with founding.scratch(home) if lora and model else nullcontext() as near:
        source = initial_model(model, model_config, preset, lora, near)
    manifest = draft_manifest(
        str(name),
        source,
        tokenizer=found_in,
        public_text=public_text,
        corpus=settings["data.corpus"],
        text_field=config.data.text_field,
        changes=changes,
        privacy=privacy,
        device=config.training.device,
    )
    manifest.require_privacy(config.data.privacy, config.privacy.max_epsilon)
    fits = skip_estimate or say_needs(manifest, config, home)
    waiting, of_model = [source], source.warnings
    del source
    founded = founding.found(
        home,
        manifest,
        # the model goes once it is written: the trial loads one of its own
        lambda folder: waiting.pop().write(folder),
        as_toml(settings),
        trial=None if skip_trial else partial(_try, manifest, config, fits=fits),
    )
    for warning in filter(None, (manifest.privacy.policy.warning, *of_model)):
        say(f"warning: {warning}")
    what = "parameters" if manifest.model.lora is None else "parameters of adapters"
    say(f"founded {name}: {manifest.model.num_params:,} {what}, in {home.path}")
    if warning := _noise(manifest):
        say(warning)
    if manifest.model.base_dtype != "float32":
        held = f"every node holds the frozen weights in {manifest.model.base_dtype}"
        say(f"{held} (float32: --base-dtype float32)")
    if (model or model_config) and tokenizer is None:
        say(f"tokenizer: {found_in or 'none in the model folder, so bytes are its tokens'}")
    say(f"keep a copy of {home.admin_key} in a safe place: only it can invite")
    say(f"next, on this machine:  {command(home, 'start', '--bootstrap')}")
    invite = command(home, "invite", "create", "--for", "PEERID")
    say(f"for every other cloud:  {invite}   (PEERID: from its `xpeer id`)")
    for item in needs.in_words() if (needs := Needs.of(manifest)) is not None else ():
        say(f"  it will need {item}")
    if as_json:
        echo_json({"swarm_id": founded.swarm_id, "swarm_name": name, "peer_id": founded.peer_id})
    else:
        click.echo(founded.swarm_id)


def _tokenizer_folder(
    model: Path | None, model_config: Path | None, given: str | None, *, joins: bool
) -> Path | None:
    """Refuse a folder that holds no model, and find its tokenizer. This imports nothing slow."""
    if joins:
        return None if given in (None, BYTES) else tokenizer_of(given, None, None)
    if model is not None:
        check_folder(model, "--model")
    source = model or (model_config.parent if model_config else None)
    return tokenizer_of(given, source, config_in(model, model_config))


def _try(manifest: Manifest, config: NodeConfig, new: Home, *, fits: bool) -> None:
    """Rehearse the founder's run in small, in the home that is being made."""
    from xpeer.trial import rehearse, require_reachable  # noqa: PLC0415 - torch takes seconds

    require_reachable(manifest)
    if not fits:
        say("warning: no step is tried before the manifest is signed: a step does not fit here")
        return
    rehearse(manifest, new, config, new.path, say)


def _join(home: Home, join: str, settings: dict[str, Any], *, as_json: bool) -> None:
    text = read_token(join) or ""
    needs, config_text = Token.parse(text).needs, as_toml(settings)
    data = load_config(home, {key: value for key, value in settings.items() if value}).data
    if data.base_model:
        option = "--base-model" if settings["data.base_model"] else "data.base_model"
        check_folder(folder_named(option, data.base_model, "model"), option)
    unmet = needs.unmet(data, home) if needs is not None else []
    token = founding.prepare_join(home, text, config_text)
    say(f"ready to join {token.name}; compare its fingerprint with the admin's")
    if unmet:
        say(f"before it starts, {home.config} and this machine need what all members need:")
    for item in unmet:
        say(f"  {item}")
    say(f"next:  {command(home, 'start', '--bootstrap')}")
    if as_json:
        lacks = {"lacks": unmet} if unmet else {}
        echo_json({"swarm_id": token.swarm_id, "swarm_name": token.name, **lacks})
    else:
        click.echo(token.swarm_id)


def _noise(manifest: Manifest) -> str:
    """The warning if a private run can't learn, however large the shards are; else empty."""
    from xpeer.training.schedule import planned_steps  # noqa: PLC0415 - as the model's modules

    rules, batch = manifest.privacy, manifest.optimiser.batch_records
    if not rules.policy.clips_records:
        return ""
    sigma = rules.noise_multiplier or signal.SIGMA_LEAST
    norm = signal.noise_norm(sigma, batch, manifest.model.num_params)
    if not signal.drowns(norm, planned_steps(manifest)):
        return ""
    return (
        f"warning: with {batch} {rules.unit}s a step and {manifest.model.num_params:,} parameters "
        f"the noise is at least {norm:.0f} times the signal: next to nothing is learnt - "
        f"{signal.REMEDY}"
    )
