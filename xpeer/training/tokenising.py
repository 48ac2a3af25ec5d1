"""Tokenises text files into the cache: in a stream, on all cores, in files that survive a kill.

One thread reads and writes; two more have the tokenizers library encode a batch each, so that its
own threads never wait for Python. Memory is bounded by a few batches, and by what `reading` holds.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from xpeer.status import TextProgress
from xpeer.training.formats.rows import REASONS
from xpeer.training.piece_table import Array
from xpeer.training.reading import Begin, End, Event, Head, Part, Recipe, events_of
from xpeer.training.sources import Source, Sources
from xpeer.training.token_cache import Known, TokenCache, keys_of, unusable
from xpeer.training.token_file import (
    BEGINS,
    CONTINUES,
    ENDS,
    OPEN,
    PASSAGE,
    READ,
    SOURCE,
    TokenFileWriter,
)
from xpeer.training.tokenizer import Tokenizer

BATCH_CHARACTERS: Final = 1 << 20
BATCH_EVENTS: Final = 4096
IN_FLIGHT: Final = 3
"""Batches that are encoded or wait for it: two threads work, and one batch is ready."""
FILE_TOKENS: Final = 4 << 20
"""Tokens in a file of the cache: what a kill may cost."""
_ROWS: Final = 1024
_REPORT_EVERY_S: Final = 0.5
TOLD_EVERY_S: Final = 10.0
"""Time between two lines for a person who waits."""

OnProgress = Callable[[TextProgress], None]
Batch = list[Event]
Encoded = list[Array]


def ignore(_progress: TextProgress) -> None:
    """Report nothing."""


def told(tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> OnProgress:
    """A callback that tells a person how far it is, every TOLD_EVERY_S seconds."""
    told_at = clock()

    def tell_sometimes(progress: TextProgress) -> None:
        nonlocal told_at
        if clock() - told_at >= TOLD_EVERY_S:
            told_at = clock()
            tell(progress.in_words())

    return tell_sometimes


def tokenise(
    sources: Sources,
    recipe: Recipe,
    cache: TokenCache,
    on_progress: OnProgress = ignore,
) -> Known:
    """Have the cache hold all of some text files.

    Args:
        sources: the text files.
        recipe: how their text becomes tokens; the cache's.
        cache: was opened.
        on_progress: called now and then.

    Returns:
        What the cache holds of these files.

    Raises:
        ShardError: a file can't be read, or tokens can't be kept.
    """
    keys, sizes = keys_of(sources, cache.room)
    known = cache.known(keys)
    other_form = known.source[np.flatnonzero(cache.forms(known))].tolist()
    refused = [number for number in other_form if sources[number].named]
    begins = dict(known.begins)
    order = known.fresh
    if begins or refused:  # what is refused is read again, for the error
        late = np.union1d(known.fresh, np.array(list(begins), np.int64)).astype(np.int64)
        order = np.concatenate([np.array(refused, np.int64), late])
    if not len(order):
        return known
    meter = _Meter(on_progress, cache.room.taken(sizes, order), int(sizes.sum()))

    def work() -> Iterator[tuple[Source, Begin]]:
        for number in order:
            name = np.ascontiguousarray(keys[number], ">u8").tobytes()
            yield sources[number], begins.get(int(number)) or Begin(name, 0, 0)

    with ThreadPoolExecutor(2, "tokens") as pool:
        writer = _Writer(cache, recipe.tokenizer)
        try:
            _run(pool, _batches(_events(work(), recipe, meter)), recipe.tokenizer, writer, meter)
            writer.finish()
        except OSError as e:
            raise unusable(cache.folder, e) from e
        finally:
            writer.discard()
    cache.add(writer.published)
    return cache.known(keys)


def _events(work: Iterable[tuple[Source, Begin]], recipe: Recipe, meter: _Meter) -> Iterator[Event]:
    for source, begin in work:
        for event in events_of(source, recipe, begin):
            if isinstance(event, Part):
                meter.read(len(event.text))
            yield event
        meter.end_file()


def _batches(events: Iterable[Event]) -> Iterator[Batch]:
    batch: Batch = []
    characters = 0
    for event in events:
        batch.append(event)
        if isinstance(event, Part):
            characters += len(event.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_EVENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _run(
    pool: ThreadPoolExecutor,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    writer: _Writer,
    meter: _Meter,
) -> None:
    """Encode batches on the pool's threads, and write them in their order."""
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()

    def write_first() -> None:
        batch, future = waiting.popleft()
        encoded = iter(future.result())
        for event in batch:
            writer.take(event, next(encoded) if isinstance(event, Part) else None)
        meter.wrote(writer)

    for batch in batches:
        waiting.append((batch, pool.submit(_encoded, tokenizer, batch)))
        if len(waiting) >= IN_FLIGHT:
            write_first()
    while waiting:
        write_first()


def _encoded(tokenizer: Tokenizer, batch: Batch) -> Encoded:
    """Encode the parts of a batch. A batch has texts or examples, never both."""
    parts = [event for event in batch if isinstance(event, Part)]
    marked = [part.marked for part in parts if part.marked is not None]
    if marked:
        return list(tokenizer.encode_marked(marked))
    return list(tokenizer.encode_batch([part.text for part in parts]))


class _Writer:
    """Writes tokens and their tables, file after file.

    Attributes:
        published: files that are complete.
        documents: documents that were written so far.
        tokens: tokens that were written so far.
    """

    def __init__(self, cache: TokenCache, tokenizer: Tokenizer) -> None:
        self.published: list[Path] = []
        self.documents = self.tokens = 0
        self._cache = cache
        ends = tokenizer.bos_id, tokenizer.eos_id
        self._before, self._after = (
            np.array([] if token is None else [token], np.uint32) for token in ends
        )
        self._file: TokenFileWriter | None = None
        self._passages, self._sources = _Rows(PASSAGE), _Rows(SOURCE)
        self._begin: Begin | None = None
        """The text file that is being read, and where this file of tokens goes on in it; None =
        none is."""
        self._from = 0
        """Number of `_passages` when that text file, or this file of tokens, began."""
        self._head: Head | None = None
        """The piece that is being written; None between two."""
        self._size = self._characters = 0
        """Tokens and characters of it in this file of tokens."""
        self._continues = False
        """True iff the piece has earlier tokens in another file."""

    def take(self, event: Event, ids: Array | None) -> None:
        """Write what an event of `reading` brings; `ids` are a part's tokens."""
        match event:
            case Begin():
                self._begin, self._from = event, len(self._passages)
                self._continues = event.characters > 0
            case Part() if ids is not None:
                self._write(event, ids)
            case End() if self._begin is not None:
                counts = tuple(event.skipped[why] for why in REASONS)
                self._end_source(self._begin, 1, event.form, counts)
                self._begin = None
        if self._file is not None and self._file.num_tokens >= FILE_TOKENS:
            self._publish()

    def finish(self) -> None:
        """Publish what is left."""
        if len(self._passages) or len(self._sources):
            self._publish()

    def discard(self) -> None:
        """Remove a file that is not complete."""
        if self._file is not None:
            self._file.discard()

    @property
    def _open_file(self) -> TokenFileWriter:
        if self._file is None:
            self._file = TokenFileWriter(self._cache.folder, self._cache.dtype)
        return self._file

    def _write(self, part: Part, ids: Array) -> None:
        head, file = part.head, self._open_file
        before = file.num_tokens
        if self._head is None and head.begins and not self._continues and not head.bare:
            file.add(self._before)
        self._head = head
        file.add(ids)
        if part.last and head.ends and not head.bare:
            file.add(self._after)
        self._size += file.num_tokens - before
        self._characters += len(part.text)
        if part.last:
            is_read = part.marked is not None and bool((ids & 1).all())
            self._end_passage(READ * is_read)
            self._head, self._continues = None, False
            self.documents += head.ends

    def _end_passage(self, flags: int) -> None:
        head = self._head
        if head is None:
            return
        flags |= BEGINS * head.begins | ENDS * head.ends | CONTINUES * self._continues
        ids = _pair(head.id), _pair(head.whole)
        self._passages.append((*ids, self._size, self._characters, head.uniform, flags))
        self.tokens += self._size
        self._size = self._characters = 0

    def _end_source(self, begin: Begin, complete: int, form: int, skipped: tuple[int, ...]) -> None:
        place = _pair(begin.key), begin.first, begin.characters
        count = len(self._passages) - self._from
        self._sources.append((*place, count, complete, form, skipped))
        self._from = len(self._passages)

    def _publish(self) -> None:
        """Complete this file; if a text file is being read, the next one goes on with it."""
        if self._begin is not None:
            self._interrupt(self._begin)
        tables = self._passages.table(), self._sources.table()
        self.published.append(self._open_file.publish(*tables))
        self._file, self._from = None, 0
        self._passages, self._sources = _Rows(PASSAGE), _Rows(SOURCE)

    def _interrupt(self, begin: Begin) -> None:
        """End the entry of the text file that is being read, and begin the next one's place."""
        characters = self._characters
        is_open = self._head is not None
        if is_open and self._continues:
            characters += begin.characters
        self._end_passage(OPEN)
        first = begin.first + len(self._passages) - self._from - is_open
        self._end_source(begin, 0, 0, (0,) * len(REASONS))
        self._begin = Begin(begin.key, first, characters if is_open else 0)
        self._continues = is_open


class _Rows:
    """Rows of a table. As tuples of numbers, those of a file of tokens could take 60 MB."""

    def __init__(self, kind: np.dtype[Any]) -> None:
        self._kind = kind
        self._parts: list[Array] = []
        self._waiting: list[tuple[object, ...]] = []

    def __len__(self) -> int:
        return len(self._parts) * _ROWS + len(self._waiting)

    def append(self, row: tuple[object, ...]) -> None:
        self._waiting.append(row)
        if len(self._waiting) == _ROWS:
            self._parts.append(np.array(self._waiting, self._kind))
            self._waiting.clear()

    def table(self) -> Array:
        parts = [*self._parts, np.array(self._waiting, self._kind)]
        return np.concatenate(parts, dtype=self._kind)  # else numbers would be the other way round


class _Meter:
    """Reports how far the reading is, at most twice a second."""

    def __init__(self, on_progress: OnProgress, sizes: Array, total: int) -> None:
        self._on_progress = on_progress
        self._sizes, self._file = sizes, 0
        self._done, self._total = total - int(sizes.sum()), total
        self._inside = 0
        self._began = time.monotonic()
        self._reported_at = self._began
        self._before = self._done

    def read(self, characters: int) -> None:
        """Count text of the present file; packed files may hold more than their size."""
        self._inside = min(self._inside + characters, int(self._sizes[self._file]))

    def end_file(self) -> None:
        """Count all of the present file."""
        self._done += int(self._sizes[self._file])
        self._file += 1
        self._inside = 0

    def wrote(self, writer: _Writer) -> None:
        """Report, if it is time to."""
        now = time.monotonic()
        if now - self._reported_at < _REPORT_EVERY_S:
            return
        self._reported_at = now
        done, seconds = self._done + self._inside, now - self._began
        speed = (done - self._before) / seconds
        self._on_progress(
            TextProgress(
                bytes_read=done,
                bytes_total=self._total,
                documents=writer.documents,
                tokens=writer.tokens,
                bytes_per_s=speed,
                eta_s=(self._total - done) / speed if speed else None,
            )
        )


def _pair(name: bytes) -> tuple[int, int]:
    """A 16-byte name as two numbers."""
    first, second = struct.unpack(">2Q", name)
    return first, second
