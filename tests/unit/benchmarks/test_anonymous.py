"""Anonymous memory of a process and of its children."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import anonymous

CHILD = """
import os, sys
def grow(size):
    return bytearray(os.urandom(1)) * size
held = grow(40 << 20)
if os.fork() == 0:
    more = grow(30 << 20)
    print("there", flush=True)
    sys.stdin.read()
    os._exit(0)
os.wait()
"""


def test_what_children_share_counts_once_and_pages_of_files_do_not(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(bytes(50 << 20))
    mapping = f"import mmap; f = open({str(file)!r}, 'rb')\n"
    mapping += "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096])\n"
    with subprocess.Popen(
        [sys.executable, "-c", mapping + CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout
        assert running.stdin
        assert running.stdout.readline() == "there\n"
        found = anonymous.together(anonymous._family(running.pid))
        running.stdin.close()
        running.wait()
    assert 70 << 20 <= found < 105 << 20
    assert anonymous.together([running.pid]) == 0


def test_the_largest_is_kept_until_the_end() -> None:
    command = [sys.executable, "-c", "x = bytearray(64 << 20); import time; time.sleep(1); del x"]
    with subprocess.Popen(command, text=True) as running:
        assert anonymous.most_of(running) > 64 << 20
    assert running.returncode == 0
