"""D21: a daemon whose key was made anew trained alone and spent its budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.support import found, xpeer


@pytest.mark.timeout(240)
def test_a_credential_for_another_key_is_refused_at_once(tmp_path: Path, shard: Path) -> None:
    home = tmp_path / "h"
    found(home, shard)
    before = xpeer("id", "--home", home).stdout.strip()
    (home / "identity.key").unlink()
    now = xpeer("id", "--home", home).stdout.strip()
    assert before != now
    done = xpeer("start", "--home", home, "--dry-run")
    assert done.returncode == 5, (done.returncode, done.stdout, done.stderr[-500:])
    assert f"the credential is for {before}, this key is {now}" in done.stderr
    assert "restore" in done.stderr
    assert not (home / "ledger.sqlite").exists()
