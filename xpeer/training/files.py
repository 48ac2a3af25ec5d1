"""Lists the files of a shard, from files, folders and globs, and counts those that are left out.

It opens no file, so the daemon may use it. Links are followed, except to places that are surely a
mistake (`_Root.refusal`). A file that is reached twice counts once.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xpeer.errors import ShardError
from xpeer.paths import refuse_homes
from xpeer.status import by_reason
from xpeer.training.kinds import READ_IN_FOLDERS, is_read_in_folders, refusal
from xpeer.training.room import IN_MEMORY, Room
from xpeer.training.sources import Key, Reached, Sources

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
class Matched:
    """The files that some patterns match."""

    sources: Sources
    left_out: Counter[str]
    """Number of files left out, by reason: a suffix that is not read, or `hidden`, `pipe`, ..."""
    outside: Counter[str]
    """Number of files that are only reached through links out of a folder, by that folder."""


def find(patterns: Sequence[str], setting: str, room: Room = IN_MEMORY) -> Matched:
    """List the files of a shard, in the order of the patterns, then by path.

    Args:
        patterns: files, folders or globs; ~ is expanded. Folders are searched recursively for files
            of `READ_IN_FOLDERS`. Hidden entries are left out of folders and globs.
        setting: name of the setting, for errors.
        room: for what is noted of each file.

    Raises:
        ShardError: a pattern matches nothing that can be read, or names a file that is no text; or
            a folder can't be searched.
    """
    if not patterns:
        raise ShardError(f"{setting} is empty", "name files, folders or globs that hold text")
    search = _Search(setting, room)
    for pattern in patterns:
        search.take(pattern)
    matched = search.result()
    real: dict[Path, Path] = {}
    for path in matched.sources.of_each_folder():
        place = path.resolve().parent if path.is_symlink() else path.parent
        if place not in real:
            real[place] = place.resolve() / path.name
    refuse_homes(real.values(), setting)
    return matched


class _Root:
    """The part of a pattern before its first wildcard. Links may lead out of this folder."""

    def __init__(self, named: Path) -> None:
        self.named, self.real = named, named.resolve()
        self.inside: dict[str, bool] = {}
        """Folders that were looked at, and whether they really lie in here."""
        try:
            self._home = Path.home().resolve()
        except RuntimeError:
            self._home = self.real

    def refusal(self, target: Path, folder: Path) -> str:
        """Why a link is not followed; empty = it is followed.

        Args:
            target: where it leads to.
            folder: where it lies, with all links resolved.
        """
        if target.is_dir():
            if self.real.is_relative_to(target) or folder.is_relative_to(target):
                return ABOVE
            if self._home.is_relative_to(target):
                return HOME
        if target.is_relative_to(self.real):
            return ""
        # Hidden folders above both do not matter: the operator named one below them.
        common = os.path.commonpath([self.real, target])
        parts = target.relative_to(common).parts
        return HIDDEN if any(part.startswith(".") for part in parts) else ""


class _Search:
    def __init__(self, setting: str, room: Room) -> None:
        self._setting = setting
        self._files = Reached(room)
        self._left_out: dict[Path, str] = {}
        """What is left out by its path, since nothing is there, or nobody looks what."""
        self._left_now: Counter[str] = Counter()
        """Of the present pattern."""
        self._reached = 0
        self._root = _Root(Path())
        self._real: dict[Path, Path] = {}

    def result(self) -> Matched:
        """Sum up all patterns. A file that one leaves out may have been added by another."""
        left = self._files.left_out() + Counter(self._left_out.values())
        return Matched(self._files.sources(), left, self._files.outside())

    def take(self, pattern: str) -> None:
        """Add the files that a pattern matches."""
        self._left_now, self._reached = Counter(), 0
        try:
            matched = self._take(Path(pattern).expanduser())
        except OSError as e:
            raise ShardError(
                f"{self._setting}: {e.filename or pattern} can't be searched: {e.strerror or e}",
                "check its owner and mode",
            ) from e
        except ValueError as e:
            raise ShardError(f"{self._setting}: {pattern!r} is no path: {e}", "correct it") from e
        except RuntimeError as e:  # links in a circle, or the home folder of nobody
            raise ShardError(
                f"{self._setting}: {pattern} can't be followed: {e}", "correct it"
            ) from e
        if not matched and not self._left_now:
            raise ShardError(
                f"{self._setting}: {pattern} matches no file (looked from {Path.cwd()})",
                "correct it; relative paths start at the folder the node was started in",
            )
        if not self._reached:
            left = self._left_now
            raise ShardError(
                f"{self._setting}: {pattern} holds no file of {', '.join(READ_IN_FOLDERS)}"
                + (f" (left out: {by_reason(left)})" if left else ""),
                "other text files are read when they are named or matched by a glob",
            )

    def _take(self, named: Path) -> bool:
        """Add the files of a path or glob; returns whether anything has this name."""
        if _there(named):
            self._root = _Root(named)
            if named.is_dir():
                self._folder(named)
            else:
                self._file(str(named), named=True)
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
                self._file(str(path), named=False)
        return bool(matched)

    def _expanded(self, base: Path, parts: Sequence[str]) -> Iterator[Path]:
        """Expand a glob as `glob.glob` does.

        But an unreadable folder is an error, loops of links end, and hidden files are counted.
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
        for path in self._in_order(str(folder), set()):
            self._file(path, named=False, searched=True)

    def _in_order(self, folder: str, been: set[Key]) -> Iterator[str]:
        """Paths of all files in a folder, and in those in it, ordered by their parts."""
        ways = [self._entries(folder, been)]
        while ways:
            for path, is_folder in ways[-1]:
                if is_folder:
                    ways.append(self._entries(path, been))
                    break
                yield path
            else:
                ways.pop()

    def _entries(self, folder: str, been: set[Key]) -> Iterator[tuple[str, bool]]:
        """Paths in a folder in their order, and whether each is a folder to go into."""
        folders, names = self._listed(folder, been) or ([], [])
        inside = set(folders)
        for name in sorted([*folders, *names]):
            yield os.path.join(folder, name), name in inside  # noqa: PTH118 - there are many

    def _walked(self, top: Path) -> Iterator[tuple[Path, list[str]]]:
        """Walk through folders and their entries, each once, even if several links lead to it."""
        been: set[Key] = set()
        waiting = [str(top)]
        while waiting:
            where = waiting.pop()
            if (listed := self._listed(where, been)) is None:
                continue
            folders, names = listed
            yield Path(where), names
            waiting += [os.path.join(where, name) for name in reversed(folders)]  # noqa: PTH118

    def _listed(self, where: str, been: set[Key]) -> tuple[list[str], list[str]] | None:
        """Names of the folders in a folder, in their order, and of its other entries.

        Without hidden ones, and links that are not followed. None = one has been there.
        """
        status = os.stat(where)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in been:
            return None
        been.add((status.st_dev, status.st_ino))
        folders, names = list[str](), list[str]()
        with os.scandir(where) as entries:
            for entry in entries:
                is_folder = _is_folder(entry)
                if entry.name.startswith("."):
                    self._leave_out(Path(where, entry.name), HIDDEN)
                elif not is_folder:
                    names.append(entry.name)
                elif not (entry.is_symlink() and self._leads_away(Path(where, entry.name))):
                    folders.append(entry.name)
        return sorted(folders), names

    def _file(self, path: str, *, named: bool, searched: bool = False) -> None:
        """Add a file, or leave it out.

        Args:
            path: of the file; not a folder.
            searched: whether it was come upon in a folder. Then not all that may be text is added.
            named: whether the operator named this very file. Then its kind does not matter, and it
                is an error if it can't be read.
        """
        status = os.lstat(path)
        if link := stat.S_ISLNK(status.st_mode):
            try:
                status = os.stat(path)  # noqa: PTH116
            except OSError as e:
                if named:
                    raise ShardError(
                        f"{self._setting}: {path} is a link to {Path(path).readlink()}, which is "
                        "not there",
                        "correct the link, or name the file itself",
                    ) from e
                self._leave_out(Path(path), BROKEN_LINK)
                return
        key = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
            if named:
                raise ShardError(
                    f"{self._setting}: {path} is a {kind} and holds no file to read",
                    "write the text to a file",
                )
            self._leave_out(Path(path), kind)
        elif named and (remedy := refusal(Path(path))):
            raise ShardError(f"{self._setting}: {path} is not read as text", remedy)
        elif not named and link and self._leads_away(Path(path)):
            return
        elif named or (_is_read_in_folders(path) if searched else not refusal(Path(path))):
            self._reached += 1
            folder, name = os.path.split(path)
            outside = "" if named else self._outside(path, folder, link=link)
            self._files.take(key, folder or ".", name, named=named, link=link, outside=outside)
        else:
            suffix = Path(path).suffix.lower()
            why = suffix if _SUFFIX.fullmatch(suffix) else "other" if suffix else "no suffix"
            self._left_now[why] += 1
            self._files.leave_out(key, why)

    def _outside(self, path: str, folder: str, *, link: bool) -> str:
        """The pattern's folder if the file really does not lie in it; else empty."""
        real = self._root.real
        inside = self._really(Path(path)).is_relative_to(real) if link else self._lies_in(folder)
        return "" if inside else str(self._root.named)

    def _lies_in(self, folder: str) -> bool:
        """Whether a folder really lies in the pattern's; remembered, as many files are in one."""
        if folder not in self._root.inside:
            real = self._really(Path(folder) / "file")
            self._root.inside[folder] = real.is_relative_to(self._root.real)
        return self._root.inside[folder]

    def _leads_away(self, path: Path) -> bool:
        """Whether the path is a link that is not followed; if so, it is counted."""
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
        """Resolve a path; folders are remembered, since there may be many files."""
        if path.is_symlink():
            return path.resolve()
        if path.parent not in self._real:
            self._real[path.parent] = path.parent.resolve()
        return self._real[path.parent] / path.name

    def _leave_out(self, path: Path, why: str) -> None:
        self._left_now[why] += 1
        self._left_out.setdefault(path, why)


def _is_read_in_folders(path: str) -> bool:
    """Do as `is_read_in_folders`, and faster with most names; hidden files do not come here."""
    return path.lower().endswith(READ_IN_FOLDERS) or is_read_in_folders(Path(path))


def _there(path: Path) -> bool:
    """Whether this path exists, even as a broken link."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False
