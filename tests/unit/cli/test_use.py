"""`xpeer generate` and `xpeer eval`, of a home's checkpoint, an export, and adapters."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.cases.support import model_folder, tokenizer_folder
from xpeer.cli import main
from xpeer.errors import ConfigError, ExitCode
from xpeer.manifest.model import Lora, Model
from xpeer.training import adapters, trained
from xpeer.training.chat_shapes import Marked
from xpeer.training.export import export_adapters, export_hf, generate
from xpeer.training.flat import digest, read_flat
from xpeer.training.model import from_folder
from xpeer.training.tokenizer import HuggingFaceTokenizer

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 9


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    model_folder(folder)
    tokenizer_folder(folder)
    return folder


def xpeer(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="xpeer")
    return done.exit_code, done.stdout, done.stderr


def by_hand(model: torch.nn.Module, ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double()
    return float(-torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].sum())


def test_each_token_but_the_first_is_predicted_once(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "BATCH_RECORDS", 3)
    monkeypatch.setattr(trained, "LONGEST_RECORD", 50)
    made = trained.from_export(base)
    assert made.tokenizer.bos_id == 0
    assert made.tokenizer.eos_id == 1
    ids = [0, *made.tokenizer.encode(TEXT), 1]
    found = trained.evaluate_text(made, TEXT)
    assert found.tokens == len(ids) - 1
    assert found.bytes == len(TEXT.encode())
    by_parts = sum(by_hand(made.model, ids[at : at + 50]) for at in range(0, len(ids) - 1, 49))
    assert found.nats == pytest.approx(by_parts, rel=1e-5)


def test_eval_of_an_export(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    model = from_folder(base)
    export_hf(model, HuggingFaceTokenizer(base), tmp_path / "export")
    options: list[str | Path] = ["--model", tmp_path / "export", "--text", tmp_path / "text"]
    code, out, err = xpeer("eval", *options, "--json")
    assert code == ExitCode.OK, err
    found = json.loads(out)
    assert found["loss_per_token"] == pytest.approx(math.log(300), abs=0.5)
    assert found["loss_per_byte"] * found["bytes"] == pytest.approx(
        found["loss_per_token"] * found["tokens"]
    )
    code, out, err = xpeer("eval", *options)
    assert f"{found['loss_per_token']:.4f} nats per token" in out
    code, _, err = xpeer("eval", "--model", tmp_path / "export", "--text", tmp_path / "none")
    assert code == ExitCode.BAD_CONFIG
    assert "--text" in err


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHATS = [("Where?", "In the wood."), ("Who is it?", "A fox, and a dog that sleeps.")]


@pytest.fixture(scope="module")
def chatting(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chatting"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def rows_file(folder: Path, rows: list[object]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def chat(*turns: tuple[str, str]) -> Any:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def special(model: trained.Trained, text: str) -> list[int]:
    """Ids of a text whose special tokens count as such."""
    (ids,) = model.tokenizer.encode_marked([Marked(text, (), is_chat=True)])
    return [int(each) for each in ids // 2]


def test_eval_of_chats_is_that_of_their_answers(chatting: Path, tmp_path: Path) -> None:
    """The loss was that of raw JSON, without a word."""
    rows = [chat(("user", asked), ("assistant", said)) for asked, said in CHATS]
    rows += [chat(("user", "Nobody answers.")), chat(("user", "<s>"), ("assistant", "forged"))]
    file = rows_file(tmp_path, rows)
    options: list[Any] = ["eval", "--model", chatting, "--text", file, "--text-field", "messages"]
    code, out, err = xpeer(*options, "--json")
    assert code == ExitCode.OK, err
    assert "2 rows are left out: no example 1, template 1" in err
    found = json.loads(out)
    model: Any = trained.from_export(chatting)
    nats, tokens = 0.0, 0
    for asked, said in CHATS:
        head = special(model, f"<s>user: {asked}</s><s>assistant: ")
        ids = special(model, f"<s>user: {asked}</s><s>assistant: {said}</s>")
        nats += by_hand(model.model, ids) - by_hand(model.model, ids[: len(head)])
        tokens += len(ids) - len(head)
    assert found["rows"] == 2
    assert found["tokens"] == tokens
    assert found["bytes"] == sum(len(f"{said}</s>") for _, said in CHATS)
    assert found["loss_per_token"] == pytest.approx(nats / tokens, rel=1e-4)
    code, out, _ = xpeer(*options)
    assert "in 2 rows" in out


def test_eval_of_rows_of_text_is_that_of_each_text(base: Path, tmp_path: Path) -> None:
    texts = [f"{number} foxes and no dog" * number for number in range(1, 12)]
    file = rows_file(tmp_path, [{"body": text} for text in texts])
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text('[data]\ntext_field = "body"\n')
    code, out, err = xpeer("eval", "--home", home, "--model", base, "--text", file, "--json")
    assert code == ExitCode.OK, err
    found = json.loads(out)
    model = trained.from_export(base)
    alone = [trained.evaluate_text(model, text) for text in texts]
    assert found["rows"] == len(texts)
    assert found["tokens"] == sum(each.tokens for each in alone)
    assert found["bytes"] == sum(each.bytes for each in alone)
    total = sum(each.nats for each in alone)
    assert found["loss_per_token"] * found["tokens"] == pytest.approx(total, rel=1e-4)


def test_eval_says_what_can_not_be_measured(
    chatting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "LONGEST_RECORD", 20)
    file = rows_file(tmp_path, [chat(("user", "Where?"), ("assistant", "In the wood."))])
    options: list[Any] = ["eval", "--model", chatting, "--text", file]
    code, _, err = xpeer(*options, "--text-field", "messages")
    assert code == ExitCode.BAD_CONFIG
    assert "nothing in it is predicted: too long 1" in err
    code, _, err = xpeer(*options)
    assert code == ExitCode.BAD_CONFIG
    assert "'text'" in err
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["eval", "--model", chatting, "--text", tmp_path / "text.txt"]
    code, _, err = xpeer(*options, "--text-field", "messages")
    assert code == ExitCode.BAD_CONFIG
    assert "--text-field" in err


def test_a_chat_model_is_asked_with_its_template(base: Path, chatting: Path) -> None:
    model: Any = trained.from_export(chatting)
    ids = special(model, "<s>user: The</s><s>assistant: ")
    answer: list[int] = []
    for _ in range(8):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids + answer])).logits[0, -1]
        if int(logits.argmax()) in (0, 1, 2):  # special tokens end it
            break
        answer.append(int(logits.argmax()))
    options: list[str | Path] = ["generate", "--chat", "--tokens", "8", "--json", "--model"]
    code, out, err = xpeer(*options, chatting, "--prompt", "The")
    assert code == ExitCode.OK, err
    assert json.loads(out)["text"] == model.tokenizer.decode(answer)
    for folder, prompt, said in ((base, "The", "no chat template"), (chatting, "a</s>", "</s>")):
        code, _, err = xpeer(*options, folder, "--prompt", prompt)
        assert code == ExitCode.BAD_CONFIG
        assert said in err
        assert "--chat" in err


@pytest.mark.parametrize("token", [0, 1, 2])
def test_an_answer_ends_at_any_special_token(chatting: Path, token: int) -> None:
    """That which ends a turn is not always that which ends a text."""
    model: Any = trained.from_export(chatting)
    output: Any = model.model.get_output_embeddings()
    wanted = torch.nn.functional.one_hot(torch.tensor(token), 300).float()
    with torch.no_grad():
        output.weight[:] = 0
        output.bias = torch.nn.Parameter(wanted)
    asked: list[int] = []
    model.model.register_forward_hook(lambda *_: asked.append(token))
    assert generate(model.model, model.tokenizer, "The", 3, chat=True) == ""
    assert len(asked) == 1


def test_generate_repeats_with_its_seed(base: Path) -> None:
    options: list[str | Path] = ["generate", "--model", base, "--prompt", "The", "--tokens", "8"]
    code, first, err = xpeer(*options, "--temperature", "1", "--seed", "3")
    assert code == ExitCode.OK, err
    assert xpeer(*options, "--temperature", "1", "--seed", "3")[1] == first
    assert len({xpeer(*options, "--temperature", "1", "--seed", str(n))[1] for n in range(4)}) > 1
    assert json.loads(xpeer(*options, "--json")[1])["prompt"] == "The"
    assert xpeer(*options, "--temperature", "nan")[0] == ExitCode.BAD_CONFIG


def test_adapters_need_their_own_base(base: Path, tmp_path: Path) -> None:
    model = from_folder(base)
    lora = Lora(rank=2, alpha=4.0, seed=1, base_digest=digest(read_flat(model)))
    adapted = adapters.adapt(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    folder = tmp_path / "adapters"
    section = Model({}, 1, "", lora, "tiny")
    export_adapters(adapted, section, HuggingFaceTokenizer(base), folder)
    made = trained.from_export(folder, base)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(made.model(input_ids=ids).logits, adapted(input_ids=ids).logits)
    with pytest.raises(ConfigError, match="--base-model is not set"):
        trained.from_export(folder)
    other = tmp_path / "other"
    model_folder(other, initializer_range=0.03)
    with pytest.raises(ConfigError, match="the adapters are for"):
        trained.from_export(folder, other)


def test_a_home_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    code, _, err = xpeer("init", "--home", tmp_path / "h", "--swarm", "s", "--preset", "tiny")
    assert code == ExitCode.OK, err
    code, _, err = xpeer("generate", "--home", tmp_path / "h", "--prompt", "a")
    assert code == ExitCode.ERROR
    assert "there is no checkpoint" in err


def test_a_folder_without_a_tokenizer_names_the_option(tmp_path: Path) -> None:
    model_folder(tmp_path / "bare")
    code, _, err = xpeer("generate", "--model", tmp_path / "bare", "--prompt", "a")
    assert code == ExitCode.BAD_CONFIG
    assert "--tokenizer" in err
