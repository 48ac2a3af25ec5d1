"""Reads the files of a shard, in a stream of pieces of text that can be encoded one by one.

No file has to fit into memory, nor a text that is a file. A row of a table has to, and what its
format packs together: a page of .parquet, a batch of .arrow that is packed. Knows nothing of where
tokens are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from xpeer.identity import blake2b
from xpeer.training import tokens
from xpeer.training.chat_shapes import Marked
from xpeer.training.document import document_of
from xpeer.training.formats import texts
from xpeer.training.formats.examples import Example, asks_for_examples
from xpeer.training.formats.long import LongText
from xpeer.training.formats.rows import NO_CHAT, NO_COLUMN, OtherFormError
from xpeer.training.partition import cut_document, cut_text, piece_id
from xpeer.training.records import uniform_of
from xpeer.training.sources import Source
from xpeer.training.tokenizer import Tokenizer
from xpeer.training.tokens import parts_of

READING: Final = "reading/2"
"""Names how files are read. Whoever changes which texts and examples `formats` makes of a file, or
how they are cut, gives it another name: files that did not change would keep the tokens of before.
"""
FORMS: Final = ("", "mark-up", "JSON", NO_COLUMN)
"""Forms of texts that are not read, in an order that the cache of tokens keeps."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides which tokens a file becomes, besides its content."""

    tokenizer: Tokenizer
    text_field: str = "text"
    piece_characters: int = 0
    """A longer document is cut into pieces; 0 = none is."""

    @property
    def makes_examples(self) -> bool:
        """Whether rows are examples: each is one record, and part of it is predicted."""
        return asks_for_examples(self.text_field)

    @property
    def digest(self) -> str:
        """Names the recipe: files of tokens of one digest belong together."""
        special = (str(self.tokenizer.bos_id), str(self.tokenizer.eos_id))
        words: tuple[str, ...] = (
            READING,
            self.tokenizer.name,
            *special,
            self.text_field,
            str(self.piece_characters),
        )
        if self.makes_examples:
            words = (*words, self.tokenizer.chat.digest)
        return blake2b(b"tokens/1", *(word.encode() for word in words), size=16).hex()


@dataclass(frozen=True, slots=True)
class Head:
    """Says what the tokens of a part of a text belong to."""

    id: bytes
    """Of the piece; for a document that is not cut, of the document."""
    whole: bytes
    """Of the document."""
    uniform: float
    begins: bool
    ends: bool
    bare: bool = False
    """Whether no tokens of begin and end are added: an example has what it needs."""


@dataclass(frozen=True, slots=True)
class Begin:
    """A text file begins. `key` says which, `first` and `characters` what of it is skipped."""

    key: bytes
    first: int
    characters: int


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a piece, to be encoded."""

    head: Head
    text: str
    last: bool
    """Whether the piece ends here."""
    marked: Marked | None = None
    """For an example, its text with what is predicted."""


@dataclass(frozen=True, slots=True)
class End:
    """A text file has ended."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Number of its rows without text, by reason."""
    form: int = 0
    """Index into `FORMS`."""


Event = Begin | Part | End


def events_of(source: Source, recipe: Recipe, begin: Begin) -> Iterator[Event]:
    """Read a text file, but for what an earlier start has read of it.

    Raises:
        ShardError: the file can't be read, or is not what its name says; names file and place.
    """
    skipped: Counter[str] = Counter()
    form, place = 0, _Place(begin.first, begin.characters)
    yield begin
    try:
        for text in texts(source.path, recipe.text_field, skipped, named=source.named):
            if isinstance(text, Example):
                marked = recipe.tokenizer.chat.mark(text)
                if marked is None:
                    skipped[NO_CHAT] += 1
                elif not place.skip_piece():
                    yield Part(_head_of(text.id, bare=True), marked.text, last=True, marked=marked)
            else:
                yield from _parts(text, recipe, place)
    except OtherFormError as e:
        if source.named:
            raise
        form = FORMS.index(e.form)
    yield End(skipped, form)


@dataclass(slots=True)
class _Place:
    """Where reading goes on in a file: what comes before is skipped."""

    pieces: int
    characters: int
    """Of the piece after those."""

    def skip_piece(self) -> bool:
        """Whether a piece is one to skip; if so, it is counted."""
        skipped = self.pieces > 0
        self.pieces -= skipped
        return skipped


def _parts(text: str | LongText, recipe: Recipe, place: _Place) -> Iterator[Part]:
    """Cut a text into parts that can be encoded one by one."""
    uncut = min(tokens.PIECE, recipe.piece_characters or tokens.PIECE)
    if isinstance(text, str) and not place.characters and len(text) <= uncut:
        if not place.skip_piece():
            yield Part(_head_of(document_of(text, "").id, bare=False), text, last=True)
        return
    for head, blocks in _pieces(text, recipe.piece_characters):
        if place.skip_piece():
            continue
        rest = _after(blocks, place.characters)
        for part, last in _marking_last(parts_of(recipe.tokenizer, rest)):
            yield Part(head, part, last)
        place.characters = 0


def _head_of(document: str, *, bare: bool) -> Head:
    """The head of a document that is not cut, by its id in hex."""
    name = bytes.fromhex(document)
    return Head(name, name, uniform_of(document), begins=True, ends=True, bare=bare)


def _pieces(text: str | LongText, length: int) -> Iterator[tuple[Head, Iterable[str]]]:
    """Cut a text into pieces, each in blocks. A piece's blocks end before the next one is asked."""
    if isinstance(text, str):
        document = document_of(text, "")
        uniform, whole = uniform_of(document.id), bytes.fromhex(document.id)
        for piece in cut_document(document, length):
            name = bytes.fromhex(piece.id)
            yield Head(name, whole, uniform, piece.begins, piece.ends), [piece.text]
        return
    uniform, whole = uniform_of(text.id), bytes.fromhex(text.id)
    if not length:
        yield Head(whole, whole, uniform, begins=True, ends=True), text.blocks()
        return
    for number, (piece_text, last) in enumerate(_marking_last(cut_text(text.blocks(), length))):
        name = whole if number == 0 and last else bytes.fromhex(piece_id(text.id, number))
        yield Head(name, whole, uniform, number == 0, last), [piece_text]


def _after(blocks: Iterable[str], characters: int) -> Iterator[str]:
    """Skip the first characters."""
    for block in blocks:
        if characters < len(block):
            yield block[characters:]
        characters = max(0, characters - len(block))


def _marking_last(items: Iterable[str]) -> Iterator[tuple[str, bool]]:
    before: str | None = None
    for item in items:
        if before is not None:
            yield before, False
        before = item
    if before is not None:
        yield before, True
