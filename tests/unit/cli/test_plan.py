"""`xpeer plan`: options that `xpeer init` takes, reasons, and errors."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from xpeer.cli import main

ARGS = ["plan", "--params", "135e6", "--link-mbit", "200", "--step-seconds", "1"]


def test_it_prints_what_init_takes_and_says_why():
    result = CliRunner().invoke(main, ARGS)
    assert result.exit_code == 0, result.output
    assert "--set round.codec=int8" in result.stdout
    assert "--set round.fragments=" in result.stdout
    assert "200 Mbit/s" in result.stderr


def test_as_json():
    found = json.loads(CliRunner().invoke(main, [*ARGS, "--json"]).stdout)
    assert found["window_steps"] % found["fragments"] == 0
    assert found["link_share"] <= 0.5


@pytest.mark.parametrize(
    ("option", "value"),
    [("--link-mbit", "0"), ("--step-seconds", "-1"), ("--params", "inf"), ("--params", "nan")],
)
def test_numbers_that_make_no_sense_are_named(option: str, value: str):
    result = CliRunner().invoke(main, [*ARGS, option, value])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.stderr.strip()
