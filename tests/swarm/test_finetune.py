"""Every command of docs/finetune.md, in its order, by three clouds that are three homes here."""

from __future__ import annotations

import json
import re
import shlex
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cases.support import (
    WORDS,
    Nodes,
    model_folder,
    running_nodes,
    tokenizer_folder,
    write_shard,
)
from xpeer.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "finetune.md"
SHORTER = {
    "end.steps=1000": "end.steps=15",
    "optimiser.batch_records=64": "optimiser.batch_records=8",
    "--tokens 60": "--tokens 5",
    "--records 20000 --batch 64 --steps 1000": "--records 2000 --batch 64 --steps 20",
}
"""What the page says for a real model, and what a tiny one takes."""
FASTER = (
    "optimiser.sequence_tokens=32",
    "round.slot_s=0.3",
    "round.window_steps=5",
    "privacy.noise_multiplier=2",  # else every start looks for it
)
pytestmark = pytest.mark.timeout(400)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def commands() -> list[tuple[str, str]]:
    """(cloud, command) as they stand on the page."""
    found = re.findall(r"^    ([ABC])\$ (xpeer .*)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(found) > 25
    return found


CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def write_chats(folder: Path) -> None:
    """Chats of two turns, no two alike."""
    folder.mkdir()
    rows = []
    for n in range(60):
        first, second = WORDS[n % len(WORDS)], WORDS[(3 * n + 1) % len(WORDS)]
        said = [("user", f"{n}?"), ("assistant", first), ("user", "And?"), ("assistant", second)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


class Clouds:
    """Three homes, the page's folders, and what its placeholders stand for."""

    def __init__(self, root: Path, nodes: Nodes) -> None:
        self.root, self.nodes = root, nodes
        self.ports = {cloud: free_port() for cloud in "ABC"}
        model_folder(root / "base")
        tokenizer_folder(root / "base")
        (root / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        for number, cloud in enumerate("AB"):
            write_shard(root / f"text-{cloud}", first=100 * number)
        write_chats(root / "text-C")
        (root / "letter.txt").write_text("Dear Madam, we have your letter.\n", encoding="utf-8")
        write_chats(root / "text-D")
        self.ids: dict[str, str] = {}

    def translated(self, cloud: str, command: str) -> list[str]:
        """The command with this machine's folders, addresses and identities."""
        places = {
            "/models/base": str(self.root / "base"),
            "/models/": str(self.root / "exports-"),
            "/data/text": str(self.root / f"text-{cloud}"),
            "/data/letter-not-in-the-shard.txt": str(self.root / "letter.txt"),
            "/data/chats-not-in-the-shard.jsonl": str(self.root / "text-D" / "chats.jsonl"),
            "/ip4/0.0.0.0/tcp/4001": f"/ip4/127.0.0.1/tcp/{self.ports[cloud]}",
            **{
                f"/dns4/{name.lower()}.example/tcp/4001": f"/ip4/127.0.0.1/tcp/{port}"
                for name, port in self.ports.items()
            },
            "file:": f"file:{self.root}/",
            **SHORTER,
            **{f"12D3KooW...{name}": peer_id for name, peer_id in self.ids.items()},
        }
        for said, meant in places.items():
            command = command.replace(said, meant)
        words = shlex.split(command)[1:]
        if words[:2] == ["init", "--swarm"]:
            words += [part for field in FASTER for part in ("--set", field)]
        return words

    def run(self, cloud: str, command: str) -> None:
        words = self.translated(cloud, command)
        if words[0] == "start" and "--dry-run" not in words:
            self.nodes.start(cloud, *words[1:])
            return
        target = words[words.index(">") + 1] if ">" in words else None
        words = words[: words.index(">")] if target else words
        # not as a process of its own: each would load torch again, which takes seconds
        done = CliRunner().invoke(main, words, env={"XPEER_HOME": str(self.nodes.home(cloud))})
        assert done.exit_code == 0, f"{cloud}$ {command}\n{done.stdout}\n{done.stderr}"
        if target:
            (self.root / target).write_text(done.stdout, encoding="utf-8")
        if words[0] == "id":
            self.ids[cloud] = done.stdout.strip()
        if words[:2] == ["init", "--swarm"]:
            self.run(cloud, "xpeer id")
        if words[0] in ("stop", "leave"):
            assert self.nodes.daemons.wait(cloud, 60) == 0


def test_every_command_of_the_page(tmp_path: Path) -> None:
    with running_nodes(tmp_path) as nodes:
        clouds = Clouds(tmp_path, nodes)
        for cloud, command in commands():
            if command.startswith("xpeer checkpoint export") and not (tmp_path / "done").exists():
                for name in "ABC":
                    nodes.until(name, lambda s: s.state == "finished", 240)
                (tmp_path / "done").touch()
            if command == "xpeer status":
                nodes.until("A", lambda s: s.progress.step > 0 and s.exchanges_done > 0, 240)
            if command == "xpeer stop":
                nodes.until(cloud, lambda s: s.progress.step > 0, 240)
            clouds.run(cloud, command)
        status = [nodes.status(name) for name in "ABC"]
        assert status == [None, None, None]  # all have left
    card = json.loads((tmp_path / "exports-letters" / "privacy.json").read_text())
    assert card
    assert (tmp_path / "exports-letters-adapters" / "adapter_model.safetensors").exists()
