"""Which files a shard is: files, folders and globs, and what of them is left out, by reason.

Opens none of them, so the daemon may use it. Links are followed, but never to where a folder of
text can't mean to lead; a file that is reached twice is one.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xpeer.errors import ShardError
from xpeer.paths import refuse_homes
from xpeer.status import by_reason
from xpeer.training.kinds import FOUND, refusal

HIDDEN: Final = "hidden"
BROKEN_LINK: Final = "broken link"
ABOVE: Final = "link to a folder above"
HOME: Final = "link to the home folder"
_KINDS: Final = {
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_SUFFIX: Final = re.compile(r"\.[A-Za-z0-9_+-]{1,12}")


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read."""

    path: Path
    named: bool
    """A person named this very file; it was not found in a folder or by a glob."""


@dataclass(frozen=True, slots=True)
class Found:
    """What patterns come to."""

    sources: list[Source]
    left_out: Counter[str]
    """Files by reason: a kind that is not looked for (its suffix), or `hidden`, `pipe`, ..."""
    outside: Counter[str]
    """Files that only links lead to, by the folder that holds such links."""


def find(patterns: Sequence[str], setting: str) -> Found:
    """The files of a shard, in the order of the patterns, then by path.

    Args:
        patterns: ~ is expanded; folders are searched recursively for `FOUND`. Hidden entries are
            left out of folders and globs.
        setting: named in errors.

    Raises:
        ShardError: a pattern matches nothing that can be read, or names a file that is no text,
            or a folder can't be searched.
    """
    if not patterns:
        raise ShardError(f"{setting} is empty", "name files, folders or globs that hold text")
    search = _Search(setting)
    for pattern in patterns:
        search.take(pattern)
    found = search.found()
    real: dict[Path, Path] = {}  # by folder: there may be many files, and links among them
    for source in found.sources:
        place = source.path.resolve().parent if source.path.is_symlink() else source.path.parent
        if place not in real:
            real[place] = place.resolve() / source.path.name
    refuse_homes(real.values(), setting)
    return found


class _Root:
    """What a pattern names, up to the first part that stands for several; links lead out of it."""

    def __init__(self, named: Path) -> None:
        self.named, self.real = named, named.resolve()
        try:
            self._home = Path.home().resolve()
        except RuntimeError:
            self._home = self.real

    def refusal(self, target: Path, folder: Path) -> str:
        """Why a link is not followed; empty = it is.

        Args:
            target: it leads to.
            folder: it really lies in.
        """
        if target.is_dir():
            if self.real.is_relative_to(target) or folder.is_relative_to(target):
                return ABOVE
            if self._home.is_relative_to(target):
                return HOME
        if target.is_relative_to(self.real):
            return ""
        # What both have above them may be hidden: it was named.
        shared = os.path.commonpath([self.real, target])
        parts = target.relative_to(shared).parts
        return HIDDEN if any(part.startswith(".") for part in parts) else ""


class _Search:
    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._sources: dict[Hashable, Source] = {}
        self._left_out: dict[Hashable, str] = {}
        self._reached = 0
        self._root = _Root(Path())
        self._outside: dict[Hashable, str] = {}
        self._inside: set[Hashable] = set()
        self._real: dict[Path, Path] = {}

    def found(self) -> Found:
        """All of it. What one pattern leaves out, another may have read."""
        left = [why for key, why in self._left_out.items() if key not in self._sources]
        outside = [f for key, f in self._outside.items() if key not in self._inside]
        return Found(list(self._sources.values()), Counter(left), Counter(outside))

    def take(self, pattern: str) -> None:
        """Add what a pattern names."""
        before, self._reached = len(self._left_out), 0
        try:
            matched = self._take(Path(pattern).expanduser())
        except OSError as e:
            raise ShardError(
                f"{self._setting}: {e.filename or pattern} can't be searched: {e.strerror or e}",
                "check its owner and mode",
            ) from e
        except ValueError as e:
            raise ShardError(f"{self._setting}: {pattern!r} is no path: {e}", "correct it") from e
        if not matched and len(self._left_out) == before:
            raise ShardError(
                f"{self._setting}: {pattern} matches no file (looked from {Path.cwd()})",
                "correct it; relative paths start at the folder the node was started in",
            )
        if not self._reached:
            left = Counter(list(self._left_out.values())[before:])
            raise ShardError(
                f"{self._setting}: {pattern} holds no file of {', '.join(FOUND)}"
                + (f" (left out: {by_reason(left)})" if left else ""),
                "other text files are read when they are named or matched by a glob",
            )

    def _take(self, named: Path) -> bool:
        """Whether there is anything."""
        if _there(named):
            self._root = _Root(named)
            if named.is_dir():
                self._folder(named)
            else:
                self._file(named, FOUND, named=True)
            return True
        magic = next((n for n, part in enumerate(named.parts) if glob.has_magic(part)), None)
        base = Path(*named.parts[:magic])
        if magic is None or not _there(base):
            return False
        self._root = _Root(base)
        matched = sorted(set(self._expanded(base, named.parts[magic:])))
        for path in matched:
            if path.is_dir():
                self._folder(path)
            else:
                self._file(path, (), named=False)
        return bool(matched)

    def _expanded(self, base: Path, parts: Sequence[str]) -> Iterator[Path]:
        """As `glob.glob` does it, but an unreadable folder is an error, loops of links end, and
        what is hidden is counted.
        """
        if not parts:
            yield base
            return
        first, rest = parts[0], parts[1:]
        if first == "**":
            for folder, names in self._walked(base):
                inside = self._expanded(folder, rest) if rest else map(folder.joinpath, names)
                yield from inside
        elif not glob.has_magic(first):
            if _there(base / first) and not self._leads_away(base / first):
                yield from self._expanded(base / first, rest)
        elif base.is_dir():
            for path in self._matching(base, first):
                yield from self._expanded(path, rest)

    def _matching(self, folder: Path, pattern: str) -> Iterator[Path]:
        for path in folder.iterdir():
            if not fnmatch.fnmatchcase(path.name, pattern):
                continue
            if path.name.startswith(".") and not pattern.startswith("."):
                self._leave_out(path, HIDDEN)
            elif not self._leads_away(path):
                yield path

    def _folder(self, folder: Path) -> None:
        inside = [where / name for where, names in self._walked(folder) for name in names]
        for path in sorted(inside):
            self._file(path, FOUND, named=False)

    def _walked(self, top: Path) -> Iterator[tuple[Path, list[str]]]:
        """Folders and the names of what they hold, each once, whatever links lead to it."""
        been = set()
        for where, folders, names in os.walk(top, onerror=_raise, followlinks=True):
            status = os.stat(where)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in been:
                folders.clear()
                continue
            been.add((status.st_dev, status.st_ino))
            for name in (*folders, *names):
                if name.startswith("."):
                    self._leave_out(Path(where, name), HIDDEN)
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and not self._leads_away(Path(where, name))
            )
            yield Path(where), [name for name in names if not name.startswith(".")]

    def _file(self, path: Path, kinds: Sequence[str], *, named: bool) -> None:
        """Add it, or leave it out.

        Args:
            path: no folder.
            kinds: that are added; empty = all that may be text.
            named: this very file was asked for: then its kind does not matter, and what can't be
                read is an error.
        """
        try:
            status = path.stat()
        except OSError as e:
            if not path.is_symlink():
                raise
            if named:
                raise ShardError(
                    f"{self._setting}: {path} is a link to {path.readlink()}, which is not there",
                    "correct the link, or name the file itself",
                ) from e
            self._leave_out(path, BROKEN_LINK)
            return
        key = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
            if named:
                raise ShardError(
                    f"{self._setting}: {path} is a {kind} and holds no file to read",
                    "write the text to a file",
                )
            self._leave_out(path, kind)
        elif named and (remedy := refusal(path)):
            raise ShardError(f"{self._setting}: {path} is not read as text", remedy)
        elif not named and self._leads_away(path):
            return
        elif named or (path.suffix.lower() in kinds if kinds else not refusal(path)):
            self._reached += 1
            self._place(path, key, named=named)
            if named or key not in self._sources:
                self._sources[key] = Source(path, named)
        else:
            suffix = path.suffix.lower()
            readable = _SUFFIX.fullmatch(suffix)
            self._leave_out(key, suffix if readable else "other" if suffix else "no suffix")

    def _place(self, path: Path, key: Hashable, *, named: bool) -> None:
        """Note whether it lies in the folder."""
        if named or self._really(path).is_relative_to(self._root.real):
            self._inside.add(key)
        else:
            self._outside.setdefault(key, str(self._root.named))

    def _leads_away(self, path: Path) -> bool:
        """Whether it is a link that is not followed; then it is counted."""
        if not path.is_symlink():
            return False
        try:
            why = self._root.refusal(self._really(path), self._really(path.parent))
        except (OSError, RuntimeError):  # broken, or in a circle
            return False
        if why:
            self._leave_out(path, why)
        return bool(why)

    def _really(self, path: Path) -> Path:
        """`resolve`, remembered by folder: there may be many files."""
        if path.is_symlink():
            return path.resolve()
        if path.parent not in self._real:
            self._real[path.parent] = path.parent.resolve()
        return self._real[path.parent] / path.name

    def _leave_out(self, key: Hashable, why: str) -> None:
        self._left_out.setdefault(key, why)


def _there(path: Path) -> bool:
    """Whether something has this name, even a link to nothing."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _raise(error: OSError) -> None:
    raise error
