from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.in_memory import corpus_digest, load_documents, read_shard, split
from tests.unit.training.homes import make_homes
from xpeer.errors import ConfigError
from xpeer.trainer.build import assemble
from xpeer.training import document
from xpeer.training.document import Document, document_of
from xpeer.training.documents import name_documents
from xpeer.training.formats import plain
from xpeer.training.records import FILL, MIN_TOKENS, cut
from xpeer.training.tokenizer import BYTE_BOS, BYTE_EOS, ByteTokenizer

TOKENIZER = ByteTokenizer()


def load(*paths: Path | str, text_field: str = "text") -> list[str]:
    return [d.text for d in load_documents([str(path) for path in paths], text_field)]


def documents(n: int, per_file: int = 1) -> list[Document]:
    return [document_of(f"text number {i}", f"file{i // per_file}") for i in range(n)]


# ---- files -----------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("béta")
    (tmp_path / "a.MD").write_text("# alpha")
    (tmp_path / "code.py").write_text("print('code')")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "sub" / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "n": 1}\n')
    (tmp_path / "sub" / ".hidden" / "c.txt").write_text("hidden")
    (tmp_path / ".d.txt").write_text("hidden")
    return tmp_path


def test_a_folder_is_searched_for_known_kinds(corpus: Path):
    assert load(corpus) == ["# alpha", "béta", "one", "two"]


def test_other_text_files_are_read_when_named_or_matched(corpus: Path):
    assert load(corpus / "code.py") == ["print('code')"]
    assert load(f"{corpus}/**/*.py", corpus / "b.txt") == ["print('code')", "béta"]


def test_a_file_that_is_matched_twice_is_read_once(corpus: Path):
    (corpus / "link.txt").symlink_to(corpus / "b.txt")
    assert load(corpus / "b.txt", corpus, f"{corpus}/*.txt").count("béta") == 1


def test_equal_texts_are_one_document(corpus: Path):
    (corpus / "z.txt").write_text("one")
    assert load(corpus).count("one") == 1


def test_relative_paths_and_home(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(corpus / "sub")
    monkeypatch.setenv("HOME", str(corpus))
    assert load("rows.jsonl", "~/b.txt") == ["one", "two", "béta"]


def test_a_name_with_brackets_is_a_name_first(tmp_path: Path):
    (tmp_path / "x[1].txt").write_text("brackets")
    assert load(tmp_path / "x[1].txt") == ["brackets"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}')
    assert load(tmp_path) == ["hello", "row"]


def test_the_id_is_the_contents(tmp_path: Path):
    (tmp_path / "a.txt").write_text("same")
    (one,) = load_documents([str(tmp_path / "a.txt")])
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    (two,) = load_documents([str(tmp_path)])
    assert one.id == two.id == document_of("same", "").id
    assert "same" not in repr(two)


def error_of(*paths: Path | str, text_field: str = "text") -> str:
    with pytest.raises(ConfigError) as caught:
        load(*paths, text_field=text_field)
    return str(caught.value)


def test_what_matches_nothing_is_named(tmp_path: Path):
    assert "matches no file" in error_of(tmp_path / "nowhere.txt")
    assert "*.txt matches no file" in error_of(f"{tmp_path}/*.txt")
    assert "holds no file of .txt, .md, .jsonl, .parquet" in error_of(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.corpus is empty"):
        load_documents([], setting="data.corpus")


def test_a_pipe_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "holds no file" in error_of(tmp_path / "pipe.txt")
    assert "holds no file" in error_of(tmp_path)


def test_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text(" \n\t ")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    assert "no text in" in error_of(tmp_path)


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"abc\xffdef")
    assert f"{tmp_path / 'a.txt'}: byte 3 is not UTF-8" in error_of(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    assert "b.jsonl: byte 27 is not UTF-8" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{secret words", "not valid JSON at character 2"),
        ('{"text": "secret words"} x', "not valid JSON at character 26"),
        ('["secret words"]', "not a JSON object"),
        ('{"text": "secret words \\ud800"}', "half a surrogate pair at character 13"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_located_and_not_shown(tmp_path: Path, line: str, problem: str):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    message = error_of(tmp_path)
    assert "rows.jsonl:2: " in message
    assert problem in message
    assert "secret" not in message


def test_the_text_field_is_the_operators_choice(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"body": "good"}\n')
    assert load(tmp_path, text_field="body") == ["good"]


def test_parquet_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in error_of(tmp_path)


def test_parquet(tmp_path: Path):
    pa = pytest.importorskip("pyarrow", reason="the extra xpeer[parquet] is not installed")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert load(tmp_path) == ["one", "two"]
    assert "no column 'body' (columns: text, n)" in error_of(tmp_path, text_field="body")
    assert "column 'n' is no text but int64" in error_of(tmp_path, text_field="n")
    path.write_bytes(path.read_bytes()[:50])
    assert "rows.parquet is damaged" in error_of(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_of_another_name_are_told_how_they_are_read(tmp_path: Path, kind: str):
    chat = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]
    rows = [{"conversations": chat, "messages": chat}]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    said = error_of(tmp_path, text_field="conversations")
    assert "is no text but" in said
    for part in ("a field called messages", "role and content", "from and value"):
        assert part in said
    assert "from and value" in error_of(tmp_path, text_field="messages")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_an_error(corpus: Path):
    (corpus / "b.txt").chmod(0)
    assert "b.txt can't be read: Permission denied" in error_of(corpus)
    (corpus / "sub").chmod(0)
    assert "can't be searched" in error_of(corpus)


def test_an_error_of_the_disk_names_the_file(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert f"{corpus / 'b.txt'} can't be read: Input/output error" in error_of(corpus / "b.txt")


# ---- the split -------------------------------------------------------------------------------


@given(st.integers(2, 60), st.integers(1, 5), st.floats(0.001, 0.49))
@settings(max_examples=50)
def test_a_split_holds_out_whole_documents_and_files(n: int, per_file: int, share: float):
    everything = documents(n, per_file)
    training, validation = split(everything, share)
    assert training
    assert validation
    assert sorted(d.id for d in training + validation) == sorted(d.id for d in everything)
    training, validation = split(everything, share, by="file")
    assert not {d.source for d in training} & {d.source for d in validation}
    assert len(training) + len(validation) == n
    if n > per_file:
        assert training
        assert validation


def test_a_single_document_is_trained_on():
    one = documents(1)
    assert split(one, 0.4) == (one, [])
    pair = documents(2, per_file=2)
    assert split(pair, 0.4, by="file") == (pair, [])


def test_the_share_held_out_is_about_what_was_asked():
    _, validation = split(documents(4000), 0.1)
    assert 320 < len(validation) < 480


def test_a_document_that_comes_moves_no_other_and_order_does_not_matter():
    few, many = documents(300), documents(400)
    held_out = {d.id for d in split(few, 0.1)[1]}
    later = {d.id for d in split(many[::-1], 0.1)[1]}
    assert held_out == later & {d.id for d in few}


# ---- records ---------------------------------------------------------------------------------


@given(st.lists(st.text("abc é", min_size=0, max_size=90), min_size=1, max_size=5))
@settings(max_examples=80)
def test_records_are_whole_documents_but_for_short_tails(texts: list[str]):
    tokens = 16
    made = [document_of(text, "f") for text in texts]
    wanted = []
    for text in texts:
        ids = [BYTE_BOS, *text.encode(), BYTE_EOS]
        for start in range(0, len(ids), tokens):
            part = ids[start : start + tokens]
            if len(part) >= MIN_TOKENS:
                wanted.append(part + [FILL] * (tokens - len(part)))
    if not wanted:
        with pytest.raises(ConfigError, match="no text: none of"):
            cut(made, TOKENIZER, tokens)
        return
    records = cut(made, TOKENIZER, tokens)
    assert records.dtype == torch.int64
    assert records.tolist() == wanted


def test_one_document_added_adds_only_its_own_records():
    few, many = documents(5), documents(6)
    before, after = cut(few, TOKENIZER, 8), cut(many, TOKENIZER, 8)
    assert torch.equal(before, after[: len(before)])


def test_no_documents():
    with pytest.raises(ConfigError, match="no text"):
        cut([], TOKENIZER, 8)


def test_jsonl_rows_of_one_file_share_its_side_when_files_are_split(tmp_path: Path):
    for name in "abcdef":
        rows = [json.dumps({"text": f"{name} {i}"}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    training, validation = split(load_documents([str(tmp_path)]), 0.3, by="file")
    for part in (training, validation):
        assert part
        assert all(count == 4 for count in Counter(d.text[0] for d in part).values())


def test_the_trainer_tells_what_became_of_the_text(tmp_path: Path):
    setup = make_homes(tmp_path, 1, privacy="off")[0]
    folder = Path(setup.config.data.shard[0])
    (folder / "notes.docx").write_text("left out")
    (folder / "short.txt").write_text("short")
    node = assemble(setup)
    node.close()
    assert node.beginning.text.shard.documents == 13
    assert node.beginning.text.shard.left_out == {".docx": 1}
    assert node.beginning.text.shard.too_short in (0, 1)  # or it is held out
    assert "text: 1 file left out: .docx 1" in node.beginning.notes


def test_texts_are_named_without_being_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "_BLOCK", 3)
    monkeypatch.setattr(plain, "LONG", 400)
    (tmp_path / "a.txt").write_text("a long text, é " * 40)
    rows = [{"text": f"row {n % 7}"} for n in range(10)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.txt").write_text("row 3")
    whole, named = read_shard([str(tmp_path)]), name_documents([str(tmp_path)])
    assert named.summary == whole.summary
    assert named.summary.repeated == 4
    sources = {each.id: each.source for each in whole.documents}
    assert list(named.with_files())[: len(sources)] == list(sources.items())
    (again,) = list(named.with_files())[len(sources) :]
    assert again == (document_of("row 3", "").id, str(tmp_path / "c.txt"))
    assert named.digest() == corpus_digest(whole.documents)
