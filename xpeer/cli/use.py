"""`xpeer generate` and `xpeer eval`: use the trained model on this machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xpeer.cli.common import (
    F,
    GivenPath,
    GivenText,
    Number,
    Whole,
    echo_json,
    echo_text,
    home_option,
    json_option,
    load_config,
    say,
)
from xpeer.cli.naming import naming
from xpeer.config import Home
from xpeer.errors import ConfigError
from xpeer.paths import checked
from xpeer.status import by_reason

if TYPE_CHECKING:
    from xpeer.training.trained import Evaluation, Trained

MAX_TOKENS = 100_000


def _model_options(command: F) -> F:
    """Give a command the options that choose a model: the newest checkpoint, or a folder."""
    for option in (
        click.option(
            "--tokenizer",
            type=GivenPath("folder", "tokenizer"),
            help="Folder of a tokenizer. Default: MODEL's own, or data.tokenizer.",
        ),
        click.option(
            "--base-model",
            type=GivenPath("folder", "model"),
            help="Folder of the model that adapters are for.",
        ),
        click.option(
            "--model",
            type=GivenPath("folder", "model"),
            help="An export or Hugging Face folder. Default: the home's newest checkpoint.",
        ),
        click.option("--own", is_flag=True, help="The model that `xpeer finetune` made."),
        home_option,
    ):
        command = option(command)
    return command


@click.command()
@_model_options
@json_option
@click.option("--prompt", required=True, help="Text to continue.")
@click.option(
    "--chat",
    is_flag=True,
    help="Write the prompt as a user's message, with the chat template, and print the answer.",
)
@click.option(
    "--tokens", type=Whole(1, MAX_TOKENS), default=100, show_default=True,
    help="Most tokens to add; an end-of-text token ends it sooner.",
)  # fmt: skip
@click.option(
    "--temperature", type=Number(0.0, 10.0), default=0.0, show_default=True,
    help="Randomness of the choice of tokens. 0: always the most likely one.",
)  # fmt: skip
@click.option(
    "--seed",
    type=Whole(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Random seed of these choices.",
)
def generate(
    home: Home,
    model: Path | None,
    base_model: Path | None,
    tokenizer: Path | None,
    own: bool,
    as_json: bool,
    prompt: str,
    chat: bool,
    tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Continue a prompt with the last saved model, or with an export."""
    trained = _load(home, model, base_model, tokenizer, own=own)
    from xpeer.training.model import generate as continued  # noqa: PLC0415 - torch takes seconds

    text = continued(
        trained.model,
        trained.tokenizer,
        prompt,
        tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )
    if as_json:
        echo_json({"schema_version": 1, "model": trained.source, "prompt": prompt, "text": text})
    else:
        echo_text(text)


@click.command("eval")
@_model_options
@json_option
@click.option(
    "--text",
    type=GivenPath("file"),
    required=True,
    help="Text file in UTF-8, or a table (.jsonl, .parquet, .csv), whose rows are measured.",
)
@click.option(
    "--text-field",
    type=GivenText(checked),
    metavar="FIELD",
    help="Field of a table's rows that holds the text. Default: data.text_field.",
)
def eval_command(
    home: Home,
    model: Path | None,
    base_model: Path | None,
    tokenizer: Path | None,
    own: bool,
    as_json: bool,
    text: Path,
    text_field: str | None,
) -> None:
    """Measure the loss of a text under the last saved model, or under an export.

    Rows of a table are read as those of a shard: of chats only the answers are predicted. The loss
    says something of the text: for a private text it is private, too.
    """
    from xpeer.training.kinds import is_table  # noqa: PLC0415 - imports what reads tables

    table = is_table(text)
    if text_field is not None and not table:
        raise ConfigError(
            f"--text-field: {text} is no table, and is measured as a whole",
            "leave it out, or name a file of rows, such as .jsonl",
        )
    content = "" if table else _read(text)
    field = text_field or (load_config(home).data.text_field if table else "")
    trained = _load(home, model, base_model, tokenizer, own=own)
    loss, rows = _measured(trained, text, content, field)
    perplexity = math.exp(min(loss.loss_per_token, 700.0))
    if as_json:
        echo_json(
            {
                "schema_version": 1,
                "model": trained.source,
                "text": str(text),
                "tokens": loss.tokens,
                "bytes": loss.bytes,
                "loss_per_token": loss.loss_per_token,
                "loss_per_byte": loss.loss_per_byte,
                "perplexity": perplexity,
                "rows": rows,
            }
        )
        return
    counted = "" if rows is None else f" in {rows:,} rows"
    click.echo(
        f"{loss.loss_per_token:.4f} nats per token, {loss.loss_per_byte:.4f} per byte, "
        f"perplexity {perplexity:.2f}, {loss.tokens:,} tokens{counted}"
    )


def _measured(
    trained: Trained, text: Path, content: str, field: str
) -> tuple[Evaluation, int | None]:
    """The loss of a text, or of a table's rows and their number if a field of them is named."""
    if not field:
        from xpeer.training.trained import evaluate_text  # noqa: PLC0415 - torch takes seconds

        return evaluate_text(trained, content), None
    from xpeer.training.evaluating import evaluate_rows  # noqa: PLC0415

    found = evaluate_rows(trained, text, field)
    if found.left_out:
        say(f"{found.left_out.total():,} rows are left out: {by_reason(found.left_out)}")
    return found.loss, found.rows


def _load(
    home: Home,
    model: Path | None,
    base_model: Path | None,
    tokenizer: Path | None,
    *,
    own: bool,
) -> Trained:
    if own and model is not None:
        raise ConfigError("--own and --model both name a model", "leave one out")
    from xpeer.training import trained  # noqa: PLC0415 - torch takes seconds

    in_model = "" if model is None else "--model"
    given = {
        "data.tokenizer": in_model if tokenizer is None else "--tokenizer",
        "data.base_model": "" if base_model is None else "--base-model",
    }
    with naming(given):
        if model is not None:
            return trained.from_export(model.expanduser(), base_model, tokenizer)
        data = load_config(home).data
        newest = trained.from_home(
            home, str(base_model or data.base_model), str(tokenizer or data.tokenizer), own=own
        )
    for warning in newest.warnings:
        say(f"warning: {warning}")
    say(f"model: {newest.source}")
    return newest


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"--text {text} is not UTF-8: {e.reason}", "convert the file") from e
    except OSError as e:
        raise ConfigError(f"--text {text} can't be read: {e.strerror}", "name a text file") from e
