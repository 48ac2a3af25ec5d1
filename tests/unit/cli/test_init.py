"""`xpeer init` and `xpeer id`: what they write, what they refuse; refusing writes nothing."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from tests.cases.support import tokenizer_folder
from tests.in_memory import corpus_digest
from xpeer import config_sources
from xpeer.cli import main
from xpeer.config import Home, NodeConfig
from xpeer.errors import ExitCode
from xpeer.identity import Identity, blake2b
from xpeer.manifest import Manifest, SharedCorpus
from xpeer.manifest.signed import SignedManifest
from xpeer.training.document import document_of
from xpeer.training.flat import digest, read_flat
from xpeer.training.model import from_folder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
PEER = Identity.generate().peer_id
SEED = f"/dns4/seed.example/tcp/4001/p2p/{PEER}"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.delenv("XPEER_HOME", raising=False)


@pytest.fixture
def model_config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def xpeer(*args: str, text: str = "") -> tuple[int, str, str]:
    quick = ["--skip-trial", "--skip-estimate"] if args[:1] == ("init",) else []  # see test_trial
    result = CliRunner().invoke(main, [*args, *quick], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def names(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def opened(home: Path) -> Manifest:
    return SignedManifest.load(Home(home).manifest).open()


def test_found_a_swarm(tmp_path: Path, model_config: str) -> None:
    home = tmp_path / "home"
    code, out, err = xpeer(
        "init", "--home", str(home), "--swarm", "demo", "--model-config", model_config,
        "--shard", str(tmp_path / "text"), "--listen", "/ip4/0.0.0.0/tcp/4002", "--bootstrap", SEED,
        "--set", "end.steps=321", "--set", "round.codec=bfloat16", "--set", "round.window_s=2.5",
    )  # fmt: skip
    assert code == ExitCode.OK, err
    signed = SignedManifest.load(Home(home).manifest)
    made = signed.open(out.strip())
    assert made.name == "demo"
    assert (made.end.steps, made.round.codec, made.round.window_s) == (321, "bfloat16", 2.5)
    assert made.privacy.mode == "record"
    assert "PRIVACY" not in err
    assert "xpeer start --bootstrap" in err
    # The initial model on the disk is the one that the manifest names.
    flat = read_flat(from_folder(Home(home).initial_model))
    assert (digest(flat), flat.numel()) == (made.model.initial_digest, made.model.num_params)
    # Its public text is the Python manual, and small enough to be sent.
    assert 150_000 < len(made.public_text.text.encode()) <= 200_000
    guessing = math.log(made.model.config["vocab_size"])  # as random parameters do
    assert made.public_text.initial_loss == pytest.approx(guessing, rel=0.1)
    assert made.start_loss == math.inf  # such a start says nothing of what is worse
    settings = config_sources.load(Home(home).config, {})
    assert settings.data.shard == [str(tmp_path / "text")]
    assert settings.network.listen == ["/ip4/0.0.0.0/tcp/4002"]
    assert settings.network.bootstrap == [SEED]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (["--privacy", "off"], 1000),
        (["--privacy", "off", "--set", "privacy.noise_multiplier=1"], 1000),
        (["--privacy", "off", "--set", "end.tokens=5000"], None),
        (["--set", "end.tokens=5000"], 1000),
        (["--set", "privacy.noise_multiplier=null"], 1000),
        (["--set", "privacy.noise_multiplier=1"], None),
    ],
)
def test_a_run_has_an_end_and_noise(
    tmp_path: Path, model_config: str, given: list[str], steps: int | None
) -> None:
    home = tmp_path / "home"
    fixed = ("init", "--home", str(home), "--swarm", "demo", "--model-config", model_config)
    code, _, err = xpeer(*fixed, "--shard", str(tmp_path / "text"), *given)
    assert code == ExitCode.OK, err
    assert opened(home).end.steps == steps


def test_a_shared_corpus_is_named_and_measured(tmp_path: Path, model_config: str) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    code, _, err = xpeer(
        "init", "--home", str(tmp_path / "h"), "--swarm", "books", "--model-config", model_config,
        "--corpus", str(tmp_path / "b.txt"), "--corpus", str(tmp_path / "a.txt"),
    )  # fmt: skip
    assert code == ExitCode.OK, err
    shared = opened(tmp_path / "h").shared_corpus
    digest = corpus_digest([document_of(text, "elsewhere") for text in ("first", "second")])
    assert shared == SharedCorpus("books", digest)
    settings = config_sources.load(Home(tmp_path / "h").config, {})
    assert settings.data.corpus == [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]


def test_a_corpus_is_measured_by_the_field_that_nodes_read(
    tmp_path: Path, model_config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("body,title\nfirst,1\nsecond,2\n")
    monkeypatch.setenv("XPEER_DATA_TEXT_FIELD", "body")
    code, _, err = xpeer(
        "init", "--home", str(tmp_path / "h"), "--swarm", "books", "--model-config", model_config,
        "--corpus", str(tmp_path / "a.csv"),
    )  # fmt: skip
    assert code == ExitCode.OK, err
    digest = corpus_digest([document_of(text, "") for text in ("first", "second")])
    assert opened(tmp_path / "h").shared_corpus == SharedCorpus("books", digest)


def test_json_and_two_swarms_are_never_alike(tmp_path: Path, model_config: str) -> None:
    answers = []
    for name in ("a", "b"):
        code, out, _ = xpeer(
            "init", "--home", str(tmp_path / name), "--swarm", "demo", "--json",
            "--model-config", model_config,
        )  # fmt: skip
        assert code == ExitCode.OK
        answers.append(json.loads(out))
    assert answers[0].keys() == {"swarm_id", "swarm_name", "peer_id"}
    assert answers[0]["swarm_id"] != answers[1]["swarm_id"]
    keys = [Home(tmp_path / name).swarm_key.read_bytes() for name in ("a", "b")]
    assert keys[0] != keys[1]
    assert (
        opened(tmp_path / "a").model.initial_digest != opened(tmp_path / "b").model.initial_digest
    )


def test_the_written_settings_are_only_what_was_given(tmp_path: Path, model_config: str) -> None:
    xpeer("init", "--home", str(tmp_path / "h"), "--swarm", "demo", "--model-config", model_config)
    text = Home(tmp_path / "h").config.read_text()
    assert config_sources.load(Home(tmp_path / "h").config, {}) == NodeConfig()
    # Every commented line is a setting that exists: uncommented, the file is still read.
    bare = text.replace("# listen", "listen").replace("# shard", "shard")
    Home(tmp_path / "h").config.write_text(bare.replace("# tokenizer", "tokenizer"))
    assert config_sources.load(Home(tmp_path / "h").config, {}).network.listen == []


def test_privacy_off_is_loud(tmp_path: Path, model_config: str) -> None:
    code, _, err = xpeer(
        "init", "--home", str(tmp_path / "h"), "--swarm", "demo", "--privacy", "off",
        "--model-config", model_config,
    )  # fmt: skip
    assert code == ExitCode.OK
    assert "PRIVACY OFF" in err
    assert opened(tmp_path / "h").privacy.mode == "off"


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_presets(tmp_path: Path, preset: str) -> None:
    code, _, err = xpeer("init", "--home", str(tmp_path / "h"), "--swarm", "d", "--preset", preset)
    assert code == ExitCode.OK, err
    low, high = {"tiny": (100_000, 300_000), "small": (1_500_000, 2_100_000)}[preset]
    assert low < opened(tmp_path / "h").model.num_params < high


def test_a_model_from_a_folder_and_a_public_text(tmp_path: Path, model_config: str) -> None:
    xpeer("init", "--home", str(tmp_path / "a"), "--swarm", "demo", "--model-config", model_config)
    text = "é" * 150_000  # 300 kB: cut in the middle of a character, had it been odd
    (tmp_path / "public.txt").write_text("x" + text)
    code, _, err = xpeer(
        "init", "--home", str(tmp_path / "b"), "--swarm", "demo",
        "--model", str(tmp_path / "a" / "initial"), "--public-text", str(tmp_path / "public.txt"),
    )  # fmt: skip
    assert code == ExitCode.OK, err
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    assert first.model.initial_digest == second.model.initial_digest
    assert second.public_text.text == "x" + "é" * 99_999
    assert second.public_text.digest == blake2b(second.public_text.text.encode()).hex()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "round.windwo_steps=5"], "did you mean round.window_steps?"),
        (["--set", "rond.fragments=5"], "did you mean round.fragments?"),
        (["--set", "end.steps"], "is not section.field=value"),
        (["--set", "end.steps=many"], "end.steps"),
        (["--set", "end.steps=0"], "end.steps"),
        (["--set", "optimiser.learning_rate=NaN"], "optimiser.learning_rate"),
        (["--set", "optimiser.learning_rate=Infinity"], "optimiser.learning_rate"),
        (["--set", "optimiser.learning_rate=1e999"], "optimiser.learning_rate"),
        (["--set", "privacy.mode=off"], "use --privacy"),
        (["--set", "model.num_params=5"], "not set by hand"),
        (["--set", "end.steps=null"], "sigma can't be calibrated"),
        (["--set", "round.fragments=1000000000"], "round.fragments"),
        (["--set", "round.masks=true"], "set round.group = 3 to 8"),
        (["--set", "round.masks=true", "--set", "round.mask_bits=8"], "mask_bits"),
        (["--set", "optimiser.sequence_tokens=1000"], "128 positions"),
        (["--preset", "tiny"], "exclude one another"),
        (["--public-text", "/nonexistent"], "--public-text"),
        (["--public-text", "/dev/null"], "holds no text"),
        (["--public-text", "{invisible}"], "holds no text"),
        (["--tokenizer", "/nonexistent"], "tokenizer.json"),
        (["--swarm", ""], "is no name"),
        (["--swarm", "a\x1b[2Jb"], "is no name"),
        (["--bootstrap", "/ip4/1.2.3.4/tcp/4001"], "/p2p/PEERID"),
        (["--shard", "bad\udcff"], "is not UTF-8"),
        (["--join", "xpeer1.x"], "one of them is needed"),
    ],
)
def test_wrong_options_change_nothing(
    tmp_path: Path, model_config: str, options: list[str], complaint: str
) -> None:
    invisible = tmp_path / "invisible.txt"
    invisible.write_text("\u200b\ufeff" * 40, encoding="utf-8")
    before = names(tmp_path)
    code, out, err = xpeer(
        "init", "--home", str(tmp_path / "h"), "--swarm", "demo", "--model-config", model_config,
        *(option.replace("{invisible}", str(invisible)) for option in options),
    )  # fmt: skip
    assert (code, out) == (ExitCode.BAD_CONFIG, "")
    assert complaint in err
    assert err.startswith("xpeer: error: ")
    assert len(err.splitlines()) == 1
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"model_type": "no-such-model"}',
        '{"model_type": "llama", "hidden_size": 7, "num_attention_heads": 2}',
        json.dumps(CONFIG | {"vocab_size": 258}),
        json.dumps(CONFIG | {"auto_map": {"AutoModel": "evil.py"}}),
    ],
)
def test_wrong_models_change_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.json").write_text(content)
    before = names(tmp_path)
    code, out, err = xpeer(
        "init", "--home", str(tmp_path / "h"), "--swarm", "demo",
        "--model-config", str(tmp_path / "model.json"),
    )  # fmt: skip
    assert (code, out) == (ExitCode.BAD_CONFIG, "")
    assert "xpeer: error: " in err
    assert names(tmp_path) == before


def test_a_used_home_is_refused(tmp_path: Path, model_config: str) -> None:
    args = ["init", "--home", str(tmp_path / "h"), "--swarm", "d", "--model-config", model_config]
    assert xpeer(*args)[0] == ExitCode.OK
    before = names(tmp_path)
    code, _, err = xpeer(*args)
    assert code == ExitCode.BAD_CONFIG
    assert "belongs to a swarm already" in err
    assert names(tmp_path) == before


def test_settings_of_a_person_are_kept_and_wrong_ones_refused(
    tmp_path: Path, model_config: str
) -> None:
    home = Home(tmp_path / "h")
    args = ["init", "--home", str(home.path), "--swarm", "d", "--model-config", model_config]
    home.path.mkdir()
    home.config.write_text("[network]\nlisen = []\n")
    code, _, err = xpeer(*args)
    assert code == ExitCode.BAD_CONFIG
    assert "did you mean listen?" in err
    home.config.write_text("# mine\n")
    code, _, err = xpeer(*args, "--shard", "text")
    assert code == ExitCode.BAD_CONFIG
    assert "exists already, so data.shard would be ignored" in err
    assert xpeer(*args)[0] == ExitCode.OK
    assert home.config.read_text() == "# mine\n"


def test_a_tokenizer_is_measured_and_remembered(tmp_path: Path, model_config: str) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer")
    args = ["--swarm", "d", "--model-config", model_config, "--tokenizer", str(folder)]
    code, _, err = xpeer("init", "--home", str(tmp_path / "h"), *args)
    assert code == ExitCode.OK, err
    made = opened(tmp_path / "h").tokenizer
    assert made.kind == "huggingface"
    assert made.digest == blake2b((folder / "tokenizer.json").read_bytes()).hex()
    assert config_sources.load(Home(tmp_path / "h").config, {}).data.tokenizer == str(folder)
    tokenizer_folder(folder, 321)
    code, _, err = xpeer("init", "--home", str(tmp_path / "other"), *args)
    assert (code, "321 ids" in err) == (ExitCode.BAD_CONFIG, True), err
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    code, _, err = xpeer("init", "--home", str(tmp_path / "other"), *args)
    assert (code, "--tokenizer" in err, "malformed" in err) == (ExitCode.BAD_CONFIG, True, True)
    assert not (tmp_path / "other").exists()


def test_id_makes_a_key_once(tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    code, first, err = xpeer("id", "--home", str(home.path))
    assert code == ExitCode.OK
    assert "made a new key" in err
    code, second, err = xpeer("id", "--home", str(home.path), "--json")
    assert (code, err) == (ExitCode.OK, "")
    assert (
        json.loads(second)["peer_id"] == first.strip() == Identity.load(home.identity_key).peer_id
    )
    assert stat.S_IMODE(home.identity_key.stat().st_mode) == 0o400
    home.identity_key.chmod(0o444)
    code, out, err = xpeer("id", "--home", str(home.path))
    assert (code, out) == (ExitCode.BAD_CONFIG, "")
    assert "chmod 0400" in err


def test_the_manifest_of_this_version_is_readable(tmp_path: Path, model_config: str) -> None:
    xpeer("init", "--home", str(tmp_path / "h"), "--swarm", "d", "--model-config", model_config)
    body = SignedManifest.load(Home(tmp_path / "h").manifest).body
    assert msgspec.json.decode(body)["version"] == 1


@pytest.mark.parametrize("variable", [False, True])
def test_the_field_of_the_text_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_config: str, *, variable: bool
) -> None:
    """Also one that a variable gave, which a service will not have."""
    if variable:
        monkeypatch.setenv("XPEER_DATA_TEXT_FIELD", "messages")
    given = [] if variable else ["--text-field", "messages"]
    home = tmp_path / "home"
    code, _, err = xpeer(
        "init", "--home", str(home), "--swarm", "demo", "--model-config", model_config, *given
    )
    assert code == 0, err
    monkeypatch.delenv("XPEER_DATA_TEXT_FIELD", raising=False)
    assert config_sources.load(home / "config.toml", {}).data.text_field == "messages"


def test_an_empty_field_of_the_text_is_refused(tmp_path: Path, model_config: str) -> None:
    for command in (
        ("init", "--swarm", "demo", "--model-config", model_config),
        ("start", "--dry-run"),
    ):
        code, _, err = xpeer(*command, "--home", str(tmp_path / "home"), "--text-field", " ")
        assert (code, "--text-field is empty" in err) == (ExitCode.BAD_CONFIG, True), err
