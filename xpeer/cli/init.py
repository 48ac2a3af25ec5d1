"""`xpeer init`: found a swarm, or prepare to join one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from xpeer import founding
from xpeer.cli.common import echo_json, home_option, json_option, load_config, say
from xpeer.cli.start import read_token
from xpeer.config import Home
from xpeer.errors import ConfigError
from xpeer.founding_model import PRESETS, draft_manifest, initial_model


@click.command()
@home_option
@json_option
@click.option("--swarm", "name", metavar="NAME", help="Found a swarm of this name.")
@click.option("--join", metavar="TOKEN", help="Or join one: token, file:PATH, or - for stdin.")
@click.option("--model", type=click.Path(path_type=Path), help="Hugging Face folder to start from.")
@click.option("--model-config", type=click.Path(path_type=Path), help="config.json to start from.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Or a small model for bytes.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder; default: bytes.")
@click.option("--public-text", type=click.Path(path_type=Path), help="Text that is no secret.")
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="A manifest field.")
@click.option("--privacy", type=click.Choice(["record", "off"]), default="record")
@click.option("--shard", multiple=True, metavar="PATH", help="Text this node trains on.")
@click.option("--listen", multiple=True, metavar="ADDR", help="Multiaddress to listen on.")
@click.option("--bootstrap", "seeds", multiple=True, metavar="ADDR", help="Entry points.")
def init(
    home: Home,
    as_json: bool,
    name: str | None,
    join: str | None,
    model: Path | None,
    model_config: Path | None,
    preset: str | None,
    tokenizer: Path | None,
    public_text: Path | None,
    changes: tuple[str, ...],
    privacy: str,
    shard: tuple[str, ...],
    listen: tuple[str, ...],
    seeds: tuple[str, ...],
) -> None:
    """Found a swarm (--swarm NAME), or prepare this home to join one (--join TOKEN)."""
    if (name is None) == (join is None):
        raise ConfigError("--swarm and --join: one of them is needed", "see `xpeer init --help`")
    settings = {
        "network": {"listen": list(listen), "bootstrap": list(seeds)},
        "data": {"shard": [str(Path(p).expanduser().absolute()) for p in shard]},
    }
    config_text = as_toml(settings)
    if join is not None:
        token = founding.prepare_join(home, read_token(join) or "", config_text)
        say(f"ready to join {token.name} ({token.swarm_id[:16]}); next: xpeer start --bootstrap")
        if as_json:
            echo_json({"swarm_id": token.swarm_id, "swarm_name": token.name})
        return
    founding.refuse_second_swarm(home)
    load_config(home)
    source = initial_model(model, model_config, preset)
    manifest = draft_manifest(
        str(name), source, tokenizer=tokenizer, public_text=public_text,
        changes=[*changes, f"privacy.mode={privacy}"],
    )  # fmt: skip
    founded = founding.found(home, manifest, source.write, config_text)
    if privacy == "off":
        say("PRIVACY IS OFF in this swarm: nothing that its members share protects any record")
    say(f"founded {name}: {manifest.model.num_params:,} parameters")
    say("next, on this machine:  xpeer start --bootstrap")
    say("for every other cloud:  xpeer invite create --for PEERID   (its `xpeer id`)")
    if as_json:
        echo_json({"swarm_id": founded.swarm_id, "peer_id": founded.peer_id})
    else:
        click.echo(founded.swarm_id)


def as_toml(settings: dict[str, dict[str, list[str]]]) -> str:
    """The sections that were given, as config.toml."""
    lines = ["# Settings of this node; all keys: docs/operating.md"]
    for section, body in settings.items():
        given: dict[str, Any] = {key: value for key, value in body.items() if value}
        if given:
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {msgspec.json.encode(v).decode()}" for key, v in given.items()]
    return "\n".join(lines) + "\n"
