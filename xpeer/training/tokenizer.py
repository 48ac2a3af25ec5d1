"""Converts text to token ids and back: as bytes, or by the swarm's Hugging Face tokenizer.json.

`encode` never returns ids of special tokens, whatever the text says: a shard that contains
"<|endoftext|>" can't forge the end of a document.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from xpeer import belonging, manifest
from xpeer.errors import ConfigError
from xpeer.folders import folder_named
from xpeer.identity import blake2b
from xpeer.source import has_tokenizer
from xpeer.tokenizer_files import differing, writing_of
from xpeer.training.chat import ChatTemplate
from xpeer.training.chat_shapes import Marked
from xpeer.training.kept import TOKENIZER_FILES, copy

BYTE_BOS: Final = 256
BYTE_EOS: Final = 257
BYTE_VOCABULARY: Final = 259
"""Number of ids. The last one is padding, with which other programs fill batches up."""
_NAMES: Final = {BYTE_BOS: "<|begin|>", BYTE_EOS: "<|end|>", BYTE_EOS + 1: "<|pad|>"}


class Tokenizer(Protocol):
    """Converts between text and ids. Several threads may use it at once."""

    @property
    def name(self) -> str:
        """A key for caches: two tokenizers of one name make the same ids of every text."""

    @property
    def vocab_size(self) -> int:
        """A number above every id."""

    @property
    def bos_id(self) -> int | None:
        """The id to put before a document; None = the tokenizer has none."""

    @property
    def eos_id(self) -> int | None:
        """The id to put after a document; None = the tokenizer has none."""

    def encode(self, text: str) -> list[int]:
        """Convert text without lone surrogates to ids, none of them special."""

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """Do as `encode` with several texts at once, on all cores; (n,) uint32 each."""

    def encode_marked(self, texts: list[Marked]) -> list[npt.NDArray[np.uint32]]:
        """Encode texts of which parts are predicted; (n,) uint32 each.

        Returns:
            2 id + 1 for a token that is read and not predicted, 2 id for the others. A text that is
            no chat gets the tokens of begin and end.
        """

    @property
    def chat(self) -> ChatTemplate:
        """Writes chats."""

    def decode(self, ids: list[int]) -> str:
        """Convert ids to text; special ids vanish, broken characters become U+FFFD."""

    def spell(self, ids: list[int]) -> str:
        """Convert ids to text, with special ones by their names. For people."""

    def save_hf(self, folder: Path) -> None:
        """Write the files that transformers' AutoTokenizer reads. Raises OSError."""


class ByteTokenizer:
    """Uses the bytes of UTF-8 as ids, followed by begin, end and padding."""

    name = "byte/1"
    vocab_size = BYTE_VOCABULARY
    bos_id: int | None = BYTE_BOS
    eos_id: int | None = BYTE_EOS

    def encode(self, text: str) -> list[int]:
        """Convert text to one id per byte of UTF-8."""
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """See `Tokenizer.encode_batch`; one core is enough."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def encode_marked(self, texts: list[Marked]) -> list[npt.NDArray[np.uint32]]:
        """See `Tokenizer.encode_marked`."""
        return [_with_ends(self, *self._bytes_of(marked)) for marked in texts]

    def _bytes_of(self, marked: Marked) -> tuple[list[int], list[bool]]:
        ids, read, done = [], [], 0
        for begin, end in (*marked.spans, (len(marked.text), len(marked.text))):
            for part, is_read in ((marked.text[done:begin], True), (marked.text[begin:end], False)):
                data = part.encode()
                ids += list(data)
                read += [is_read] * len(data)
            done = end
        return ids, read

    @property
    def chat(self) -> ChatTemplate:
        """A template that writes no chat."""
        return ChatTemplate("", {}, ())

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`."""
        return bytes(i for i in ids if i < BYTE_BOS).decode(errors="replace")

    def spell(self, ids: list[int]) -> str:
        """See `Tokenizer.spell`."""
        spelled = b"".join(bytes([i]) if i < BYTE_BOS else _NAMES[i].encode() for i in ids)
        return spelled.decode(errors="replace")

    def save_hf(self, folder: Path) -> None:
        """Write an equal tokenizer for transformers: byte-level BPE without a single merge."""
        vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        fast = Fast(models.BPE(vocab=vocabulary, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        special = dict(zip(("bos_token", "eos_token", "pad_token"), _NAMES.values(), strict=True))
        fast.add_special_tokens(list(special.values()))
        (folder / "tokenizer.json").write_text(fast.to_str(), encoding="utf-8")
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **special,
                "split_special_tokens": True,
                "clean_up_tokenization_spaces": False,
            },
        )


class HuggingFaceTokenizer:
    """Reads a tokenizer.json, without transformers.

    Args:
        folder: holds tokenizer.json, and beside it the files that name its special tokens.
        digest: BLAKE2b-256 (hex) that the manifest demands; empty = any.
        spec: section of the manifest, which says how chats are written; None = there is none.

    Raises:
        ConfigError: the file is missing, malformed, or has another digest; or no token can fill up
            a batch.
    """

    def __init__(
        self, folder: Path, digest: str = "", spec: manifest.Tokenizer | None = None
    ) -> None:
        file = folder / "tokenizer.json"
        try:
            data = belonging.read_inside(file, folder)
        except OSError as e:
            raise ConfigError(
                f"data.tokenizer: {file} can't be read: {e.strerror}",
                "name the folder that holds the tokenizer.json of the swarm's model",
            ) from e
        seen = blake2b(data).hex()
        if digest and seen != digest:
            raise ConfigError(
                f"data.tokenizer: {file} has digest {seen[:16]}, the manifest says {digest[:16]}",
                "use the very file that the founder used",
            )
        self.name = f"huggingface/{seen}/{tokenizers.__version__}"
        self._fast = _parse(data, file)
        self._fast.encode_special_tokens = True
        self._fast.no_padding()
        self._fast.no_truncation()
        self._folder = folder
        self._writing = writing_of(folder)
        self._differing = (
            differing(self._writing, spec.special, spec.chat_digest, chats=True) if spec else []
        )
        self.bos_id = self._id("bos_token")
        self.eos_id = self._id("eos_token")
        if all(self._id(name) is None for name in ("pad_token", "eos_token", "unk_token")):
            # records need none, but users of the exported model could not fill up a batch
            raise ConfigError(
                f"data.tokenizer: {folder} names no padding, end or unknown token",
                "add pad_token to its tokenizer_config.json",
            )

    @property
    def vocab_size(self) -> int:
        """A number above every id. Added tokens may leave gaps below them."""
        return max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Convert text to ids, none of them special."""
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """See `Tokenizer.encode_batch`; the library's own threads share the work."""
        encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        # faster than np.array, which matters: Python does this on one core
        return [np.frombuffer(array("I", each.ids), np.uint32) for each in encoded]

    def encode_marked(self, texts: list[Marked]) -> list[npt.NDArray[np.uint32]]:
        """See `Tokenizer.encode_marked`."""
        chats = [marked.text for marked in texts if marked.is_chat]
        of_chats = iter(self._with_special.encode_batch(chats, add_special_tokens=False))
        of_others = iter(self._completed([each for each in texts if not each.is_chat]))
        encoded = []
        for marked in texts:
            if marked.is_chat:
                each = next(of_chats)
                read = np.array(_read_of(marked, each.offsets), np.uint32)
                encoded.append(2 * np.array(each.ids, np.uint32) + read)
            else:
                prompt, rest = next(of_others)
                read_all = [True] * len(prompt) + [False] * len(rest)
                encoded.append(_with_ends(self, prompt + rest, read_all))
        return encoded

    def _completed(self, texts: list[Marked]) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of prompts as they are when a model is asked, and those that follow each.

        Where a token of the whole text would reach over the border, both are encoded apart.
        """
        wholes = [marked.text for marked in texts]
        sizes = [begin for ((begin, _),) in (marked.spans for marked in texts)]
        prompts = [text[:size] for text, size in zip(wholes, sizes, strict=True)]
        completions = [text[size:] for text, size in zip(wholes, sizes, strict=True)]
        of_prompts = self._fast.encode_batch_fast(prompts, add_special_tokens=False)
        of_wholes = self._fast.encode_batch_fast(wholes, add_special_tokens=False)
        for asked, whole, completion in zip(of_prompts, of_wholes, completions, strict=True):
            before, ids = list(asked.ids), list(whole.ids)
            follows = ids[: len(before)] == before
            yield before, ids[len(before) :] if follows else self._following(completion)

    def _following(self, text: str) -> list[int]:
        """Ids of a text behind another one: without the space that some tokenizers begin with."""
        line, ids = self.encode("\n"), self.encode("\n" + text)
        return ids[len(line) :] if ids[: len(line)] == line else self.encode(text)

    @functools.cached_property
    def _with_special(self) -> Fast:
        """The tokenizer that takes special tokens in a text for what they are."""
        fast = Fast.from_str(self._fast.to_str())
        fast.encode_special_tokens = False
        fast.no_padding()
        fast.no_truncation()
        return fast

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The template in the tokenizer's folder."""
        added = self._fast.get_added_tokens_decoder().values()
        forbidden = [token.content for token in added if token.special]
        writing = self._writing
        return ChatTemplate(writing.template, writing.special, forbidden, self._differing)

    def decode(self, ids: list[int]) -> str:
        """Convert ids to text as well as the tokenizer can; special ids vanish."""
        return self._fast.decode(ids, skip_special_tokens=True)

    def spell(self, ids: list[int]) -> str:
        """See `Tokenizer.spell`."""
        return self._fast.decode(ids, skip_special_tokens=False)

    def save_hf(self, folder: Path) -> None:
        """Copy the tokenizer's files, including the chat template."""
        copy(self._folder, folder, TOKENIZER_FILES)

    def _id(self, name: str) -> int | None:
        text = self._writing.special.get(name)
        return None if text is None else self._fast.token_to_id(text)


def load_tokenizer(
    spec: manifest.Tokenizer, folder: str = "", *, base_model: str = ""
) -> Tokenizer:
    """Load the tokenizer that the manifest asks for.

    Args:
        spec: section of the manifest.
        folder: this node's `data.tokenizer`; not needed for the byte tokenizer.
        base_model: this node's `data.base_model`; may hold the tokenizer if `folder` is empty.

    Raises:
        ConfigError: the folder does not hold that tokenizer.
    """
    if spec.kind == "byte":
        return ByteTokenizer()
    named = folder_named("data.tokenizer", folder, "tokenizer") if folder else None
    if named is None and base_model:
        beside = folder_named("data.base_model", base_model, "model")
        named = beside if has_tokenizer(beside, "data.base_model") else None
    if named is None:
        raise ConfigError(
            "data.tokenizer is not set, and the manifest asks for a Hugging Face tokenizer",
            "set it to the folder that holds the tokenizer.json of the swarm's model",
        )
    return HuggingFaceTokenizer(named, spec.digest, spec)


def _parse(data: bytes, file: Path) -> Fast:
    try:
        return Fast.from_str(data.decode())
    except Exception as e:  # tokenizers raises nothing narrower
        raise ConfigError(f"data.tokenizer: {file} is malformed: {e}", "restore the file") from e


def _read_of(marked: Marked, offsets: list[tuple[int, int]]) -> list[bool]:
    """Whether each token has nothing of what is predicted. One that begins above it may have."""
    read, spans, number = [], marked.spans, 0
    for begin, end in offsets:
        while number < len(spans) and begin >= spans[number][1]:
            number += 1
        read.append(number == len(spans) or max(end, begin + 1) <= spans[number][0])
    return read


def _with_ends(tokenizer: Tokenizer, ids: list[int], read: list[bool]) -> npt.NDArray[np.uint32]:
    """Add the tokens of begin, which is read, and of end, which is predicted."""
    if tokenizer.bos_id is not None:
        ids, read = [tokenizer.bos_id, *ids], [True, *read]
    if tokenizer.eos_id is not None:
        ids, read = [*ids, tokenizer.eos_id], [*read, False]
    return 2 * np.array(ids, np.uint32) + np.array(read, np.uint32)


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(code) for code in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
