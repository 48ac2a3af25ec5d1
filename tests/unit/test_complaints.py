"""Complaints of other systems' users that no other test holds."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from xpeer.cli import main
from xpeer.cli.new_config import as_toml
from xpeer.errors import ConfigError
from xpeer.manifest import Manifest
from xpeer.privacy.passes import Passes
from xpeer.training import checkpoint
from xpeer_daemon import logs


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_without_privacy_a_pass_goes_on_over_two_resumes() -> None:
    """A loader that starts anew at the first resume, or only at the second."""
    records = torch.arange(60).repeat_interleave(3).view(60, 3)
    first = Passes(records)
    taken = first.take(20).tolist()
    for count in (15, 25):
        first = Passes(records, first.seen.clone())
        taken += first.take(count).tolist()
        assert len(first.seen) == len(taken)
    assert sorted(taken) == list(range(60))


def test_a_parameter_that_never_gets_a_gradient_is_saved_and_resumed() -> None:
    """An expert that no token chose has no state; a strict resume died of it."""
    chosen, unused = (torch.nn.Parameter(torch.ones(n)) for n in (3, 2))
    optimiser = torch.optim.AdamW([chosen, unused], lr=0.1)
    for _ in range(2):
        chosen.grad = torch.ones(3)
        optimiser.step()
    room = torch.empty(5), torch.empty(5)
    first, second, step = checkpoint.read_moments(optimiser, [chosen, unused], room)
    assert (step, first[3:].tolist()) == (2, [0.0, 0.0])
    again = torch.optim.AdamW([chosen, unused], lr=0.1)
    checkpoint.write_moments(again, [chosen, unused], first, second, step)
    chosen.grad = torch.ones(3)
    again.step()


def test_a_loss_is_weighted_by_tokens_not_by_batches() -> None:
    from tests.unit.privacy.models import LENGTH, VOCABULARY, llama
    from xpeer.training.losses import evaluate
    from xpeer.training.records import FILL

    generator, model = torch.Generator().manual_seed(0), llama(tied=True)
    records = torch.randint(0, VOCABULARY, (5, LENGTH), generator=generator)
    records[1, 3:], records[4, 5:] = FILL, FILL
    whole = evaluate(model, records, micro_batch=5)
    for micro_batch in (1, 2, 3):
        assert evaluate(model, records, micro_batch) == pytest.approx(whole, rel=1e-5)


SETTINGS = {
    "network.listen": ["/ip4/127.0.0.1/tcp/0"], "network.announce": [], "network.bootstrap": [],
    "data.shard": ['/a "quoted" folder', "/b\\c"], "data.corpus": [], "data.tokenizer": "/t",
    "data.base_model": "",
}  # fmt: skip


def test_what_init_writes_is_what_is_read() -> None:
    """None and "off" that were lost when a config was written and read again."""
    found = tomllib.loads(as_toml(SETTINGS))
    read = {f"{section}.{key}": value for section, body in found.items()
            for key, value in body.items()}  # fmt: skip
    assert read == {key: value for key, value in SETTINGS.items() if value}


def test_unset_and_off_stay_apart_in_a_manifest() -> None:
    from tests.unit.cli.test_bad_input import manifest

    for change in ({"closing_windows": None}, {"closing_windows": 0}, {"window_s": None}):
        made = msgspec.structs.replace(
            manifest("s"), round=msgspec.structs.replace(manifest("s").round, **change)
        )
        assert msgspec.json.decode(msgspec.json.encode(made), type=Manifest) == made


SECRET = "xpeer1.c2VjcmV0LXRoYXQtbm9ib2R5LXNlZXM_-=="


@given(before=st.text(max_size=9), after=st.sampled_from(["", '"', "'", "}", "\n", " x", ",", ")"]))
def test_no_token_leaves_in_a_log_line(before: str, after: str) -> None:
    """Redaction that ended at the first blank, or missed quoted, nested and multi-line ones."""
    import logging

    message = json.dumps({"token": SECRET}) + f"{before}\n{SECRET}{after}{SECRET}"
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (message,), None)
    for formatter in (logs._Formatter(), logs._JsonFormatter()):
        assert "c2VjcmV0" not in formatter.format(record)


def test_no_token_leaves_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConfigError(f"what was given is {SECRET}", f"not '{SECRET}'")

    monkeypatch.setattr("xpeer.cli.start.read_token", fail)
    done = run("start", "--home", tmp_path / "h", "--join", SECRET)
    assert done.exit_code == 8
    assert "c2VjcmV0" not in done.output


def test_stdout_is_one_json_document_or_nothing(tmp_path: Path) -> None:
    """Update notices and warnings in what a program was to read."""
    from tests.cases.test_d01_empty_path import commands
    from tests.unit.cli.test_bad_input import founded

    home = founded(tmp_path / "h").path
    needed: dict[tuple[str, ...], list[str]] = {
        ("plan",): ["--params", "1e6", "--link-mbit", "100", "--step-seconds", "1"],
        ("privacy", "plan"): ["--records", "100", "--steps", "9"],
        ("invite", "create"): ["--no-seed"],
    }
    answered: list[Any] = []
    for name, command in commands(main):
        options = {option for p in command.params for option in p.opts}
        if "--json" not in options or name in (("demo",), ("bootstrap",)):
            continue
        where = ["--home", str(home)] if "--home" in options else []
        done = run(*name, "--json", *needed.get(name, []), *where)
        if done.exit_code == 0 and name != ("logs",):
            answered.append(json.loads(done.stdout))
        else:
            assert done.stdout == "", name
    assert len(answered) >= 6
