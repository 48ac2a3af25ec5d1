"""A node's tokenizer has to write texts and chats as the founder's does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cases.support import tokenizer_folder
from xpeer.config import Data, Home
from xpeer.drafting import draft_manifest
from xpeer.errors import ConfigError
from xpeer.founding_model import InitialModel
from xpeer.manifest import Manifest
from xpeer.manifest.model import Model
from xpeer.needs import Needs, installing, require

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ pad_token }}{% endfor %}"


class _AnyModel(InitialModel):
    def check(self, tokenizer_vocab: int, sequence_tokens: int) -> None:
        """Fits."""

    def without_frozen(self, section: Model, tokenizer_vocab: int, sequence_tokens: int) -> Model:
        return section

    def public_loss(self, manifest: Manifest, tokenizer: object, device: str) -> None:
        """It has no parameters."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tokenizer_folder(tmp_path / "founder")
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def manifest_of(folder: Path) -> Manifest:
    return draft_manifest(
        "t", _AnyModel(None, {}, 10**6, ""), tokenizer=folder, public_text=None, changes=()
    )


def needs_of(manifest: Manifest) -> Needs:
    needs = Needs.of(manifest)
    assert needs is not None
    return needs


def changed(folder: Path, **special: Any) -> Path:
    """A copy of a tokenizer's folder with other special tokens; None = none of that name."""
    copy = folder.with_name(f"copy{len(list(folder.parent.iterdir()))}")
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text()) | special
    (copy / "special_tokens_map.json").unlink(missing_ok=True)
    kept = {key: value for key, value in config.items() if value is not None}
    (copy / "tokenizer_config.json").write_text(json.dumps(kept))
    return copy


def unmet(needs: Needs, folder: Path, text_field: str = "text") -> str:
    data = Data(tokenizer=str(folder), text_field=text_field)
    return "; ".join(needs.unmet(data, Home(folder / "home")))


def test_a_manifest_says_how_texts_and_chats_are_written(folder: Path) -> None:
    tokenizer = manifest_of(folder).tokenizer
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert len(tokenizer.chat_digest) == 64
    assert unmet(needs_of(manifest_of(folder)), folder, "messages") == ""


def test_another_end_of_texts_is_refused(folder: Path) -> None:
    needs = needs_of(manifest_of(folder))
    said = unmet(needs, changed(folder, eos_token="<pad>"))
    assert "another eos_token ('<pad>', the founder's: '</s>')" in said
    assert "copy tokenizer_config.json" in said
    assert "another bos_token (none, the founder's: '<s>')" in unmet(
        needs, changed(folder, bos_token=None)
    )
    with pytest.raises(ConfigError, match="another eos_token"):
        data = Data(tokenizer=str(changed(folder, eos_token="<pad>")))
        require(needs, data, Home(folder / "home"))


def test_another_template_is_refused_where_chats_are_trained_on(folder: Path) -> None:
    needs = needs_of(manifest_of(folder))
    other = changed(folder)
    (other / "chat_template.jinja").write_text(TEMPLATE + "\n")
    assert unmet(needs, other) == ""
    assert "has another chat template (BLAKE2b-256 " in unmet(needs, other, "messages")
    filling = changed(folder, pad_token="<extra1>")
    assert unmet(needs, filling) == ""
    assert "another pad_token" in unmet(needs, filling, "messages")
    (folder / "chat_template.jinja").unlink()
    said = unmet(needs_of(manifest_of(folder)), other, "messages")
    assert "the founder's folder has none" in said


def test_older_manifests_compare_tokenizer_json_alone(folder: Path) -> None:
    manifest = manifest_of(folder)
    plain = msgspec.structs.replace(manifest.tokenizer, special=None, chat_digest="")
    needs = needs_of(msgspec.structs.replace(manifest, tokenizer=plain))
    other = changed(folder, eos_token="<pad>")
    (other / "chat_template.jinja").unlink()
    assert unmet(needs, other, "messages") == ""
    assert set(msgspec.to_builtins(needs)) == {"tokenizer", "base_model", "source"}
    old = msgspec.json.decode(
        msgspec.json.encode({"kind": "huggingface", "digest": plain.digest}),
        type=type(plain),
    )
    assert old == plain


def test_an_invitation_carries_them(folder: Path) -> None:
    needs = needs_of(manifest_of(folder))
    again = msgspec.json.decode(msgspec.json.encode(needs), type=Needs)
    assert again == needs
    assert again.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_an_extra_goes_where_xpeer_is_and_never_comes_from_a_registry() -> None:
    """The pip in PATH is another environment's, and the name may be anybody's there."""
    said = installing("lora")
    assert f"{sys.executable} -m pip install -c constraints.txt '.[lora]'" in said
    for file in ("adapters.py", "quantised.py"):
        code = Path(sys.modules["xpeer.needs"].__file__ or "").parent / "training" / file
        assert "pip install" not in code.read_text(), "say what `installing` says"
    told = " ".join(Needs(base_model="ab" * 32, quantised=True).in_words())
    assert "xpeer[lora]" in told
    assert "pip" not in told  # it is another machine's
