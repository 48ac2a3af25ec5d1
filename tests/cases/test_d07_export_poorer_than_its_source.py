"""D07: settings and files of the source were lost in an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cases.homes import assembled, export, found_here, train
from tests.cases.support import model_folder, tokenizer_folder

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
CHAT = [{"role": "user", "content": "hello"}]
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 7]}


def source(folder: Path) -> Path:
    """A model's folder with everything that people publish in one."""
    model_folder(folder, custom_field={"trained_by": "somebody"}, attention_dropout=0.1)
    tokenizer_folder(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "LICENSE").write_text("Do as you like.")
    (folder / "README.md").write_text("# The source\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_cache": True, "dtype": "bfloat16", "_name_or_path": "/home/somebody/model"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_export_has_the_chat_template_of_its_source(tmp_path: Path, shard: Path) -> None:
    folder, home = source(tmp_path / "source"), tmp_path / "home"
    found_here(home, shard, "--model", folder, "--tokenizer", folder)
    train(home, 1)
    out = export(home, tmp_path / "out")
    assert (out / "chat_template.jinja").exists(), "the export has no chat template"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "user: hello</s>"


def test_settings_and_files_go_round(tmp_path: Path, shard: Path) -> None:
    folder, home = source(tmp_path / "source"), tmp_path / "home"
    found_here(home, shard, "--model", folder, "--tokenizer", folder)
    train(home, 1)
    out = export(home, tmp_path / "out")
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    assert "somebody/model" not in (home / "manifest.json").read_text()
    theirs.pop("_name_or_path")
    assert ours.items() >= theirs.items()
    assert json.loads((out / "generation_config.json").read_text()) == GENERATION
    assert (out / "LICENSE").read_text() == "Do as you like."
    assert (out / "source.README.md").read_text() == "# The source\n"
    assert "epsilon" in (out / "README.md").read_text()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.use_cache
    assert loaded.generation_config.temperature == 0.6
    wide = AutoModelForCausalLM.from_pretrained(
        export(home, tmp_path / "wide", "--dtype", "float32")
    )
    assert wide.dtype == torch.float32

    # once more: the export is the source of another swarm
    again = tmp_path / "again"
    found_here(again, shard, "--model", out, "--tokenizer", out)
    train(again, 1)
    second = export(again, tmp_path / "second")
    assert json.loads((second / "config.json").read_text()) == ours
    names = {path.name for path in second.iterdir()}
    assert {"source.source.README.md", "source.privacy.json", "LICENSE"} <= names


def test_a_joiner_exports_what_the_founder_exports(tmp_path: Path, shard: Path) -> None:
    """Its home has no copy of the source: manifest and tokenizer folder have to do."""
    folder, home = source(tmp_path / "source"), tmp_path / "home"
    found_here(home, shard, "--model", folder, "--tokenizer", folder)
    train(home, 1)
    founders = export(home, tmp_path / "founders")
    (home / "initial").rename(tmp_path / "aside")
    joiners = export(home, tmp_path / "joiners")
    names: list[dict[str, Any]] = [
        {f.name: f.read_bytes() for f in out.iterdir() if f.name != "README.md"}
        for out in (founders, joiners)
    ]
    assert names[0] == names[1]


def test_without_generation_settings_transformers_makes_them(tmp_path: Path, shard: Path) -> None:
    home = tmp_path / "home"
    found_here(home, shard, "--preset", "tiny")
    node = assembled(home)
    node.checkpoints.copy()()
    node.close()
    out = export(home, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(out).config.use_cache
