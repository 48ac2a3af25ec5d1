"""`python -m benchmarks.shard`: a shard's first start, its second, and the peak of memory.

Text of several sizes, as rows of .jsonl, and a folder of small files. `tokenise_ratio_to_datasets`:
bytes a second of the first start to those of `datasets.map(batched=True)` with as many processes
as there are cores and the same tokenizer (or of processes that do the same by hand, where it is
not installed); the worst of all sizes. `second_start_s`: the longest that reading of rows took when
all tokens were there; `second_start_of_files_s`: that of small files. `peak_gb`: the most anonymous
memory that the reader and its workers had together in a first start, imports included, without the
pages of files; `peak_ratio`: the largest of these over the smallest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks import anonymous, common
from benchmarks.shard import text, ways

SIZES_MB: Final = 500, 2000, 5000
QUICK_MB: Final = 20
FILES: Final = 1_000_000
QUICK_FILES: Final = 2000


def measure(folder: Path, sizes_mb: list[int], files: int, rounds: int) -> dict[str, Any]:
    """All figures; `summary` has those that are claimed."""
    parts = text.paragraphs()
    text.write_tokenizer(folder / "tokenizer", parts)
    found: dict[str, Any] = {"by_hand": importlib.util.find_spec("datasets") is None}
    for size in sizes_mb:
        large = folder / f"{size} MB"
        large.mkdir()
        text.write_rows(large, parts, size * 10**6, seed=size)
        found[large.name] = _compared(folder, large, rounds)
        common.say(f"{large.name}: {json.dumps(found[large.name])}")
    small = folder / f"{files} files"
    small.mkdir()
    text.write_small_files(small, parts, files, seed=files)
    first, second = (_run("ours", small, folder, folder / "cache") for _ in range(2))
    found[small.name] = {"first": first, "second": second}
    common.say(f"{small.name}: {json.dumps(found[small.name])}")
    starts = [each for each in found.values() if isinstance(each, dict)]
    rows = [each for each in starts if "ratio" in each]
    peaks = [each["first"]["peak_gb"] for each in starts]
    found["summary"] = {
        "tokenise_ratio_to_datasets": round(min(each["ratio"] for each in rows), 3),
        "second_start_s": round(max(each["second"]["seconds"] for each in rows), 3),
        "second_start_of_files_s": round(second["seconds"], 3),
        "peak_gb": round(max(peaks), 3),
        "peak_ratio": round(max(peaks) / min(peaks), 3),
    }
    return found


def _compared(folder: Path, rows: Path, rounds: int) -> dict[str, Any]:
    """Both ways in turn, some times; the best of each counts, since other load only slows."""
    num_bytes = sum(file.stat().st_size for file in rows.iterdir())
    speeds: dict[str, float] = {"ours": 0.0, "theirs": 0.0}
    first: dict[str, float] = {}
    second: dict[str, float] = {}
    processor_s: dict[str, float] = {}
    for turn in range(rounds):
        # the first one reads text that may not be in memory any more
        for who in ("theirs", "ours") if turn % 2 else ("ours", "theirs"):
            out = folder / f"{rows.name} {who} {turn}"
            ran = _run(who, rows, folder, out)
            processor_s[who] = ran["processor_s"]
            speeds[who] = max(speeds[who], num_bytes / 1e6 / ran["seconds"])
            if who == "ours":
                first, second = ran, _run(who, rows, folder, out)
            shutil.rmtree(out)
    ratio = speeds["ours"] / speeds["theirs"]
    return {
        "ratio": ratio,
        "mb_per_s": speeds,
        "processor_s": processor_s,
        "first": first,
        "second": second,
    }


def _run(who: str, where: Path, folder: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.shard", "--one", who]
    command += [str(where), str(folder / "tokenizer"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ran:
        peak = anonymous.most_of(ran)
        said, _ = ran.communicate()
    if ran.returncode:
        raise SystemExit(f"{who}: it ended with {ran.returncode}")
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return {**found, "peak_gb": peak / 1e9}


def main() -> None:
    """Measure and print; or run one way, for `measure`."""
    parser = argparse.ArgumentParser("benchmarks.shard", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 MB; keeps nothing")
    parser.add_argument("--files", type=int, default=FILES, help="small files in a folder")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of both ways, of which the best counts"
    )
    parser.add_argument("--folder", type=Path, help="for the text, on a disk with room for it")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, *paths = options.one
        ran = getattr(ways, who)(*map(Path, paths))
        print(json.dumps(ran))
        return
    sizes, files = (
        ([QUICK_MB], min(options.files, QUICK_FILES))
        if options.quick
        else (list(SIZES_MB), options.files)
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(Path(folder), sizes, files, options.rounds)
    summary = measured.pop("summary")
    if not options.quick:
        common.write_result("shard", summary, measured, "python -m benchmarks.shard")
    common.emit("shard", summary)


if __name__ == "__main__":
    main()
