"""What is trained in a comparison, as both sides are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Final, Literal

from xpeer.policies import PrivacyMode, privacy_policy

Kind = Literal["full", "lora"]
RANK: Final = 8
TOKENS: Final = 128
LARGE_PASS: Final = 2
RATE: Final = 1e-3
WINDOW: Final = 5
NOISE: Final = "privacy.noise_multiplier=1.0", "privacy.epsilon=1000"
PUBLIC_CHARS: Final = 20_000


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        kind: whether all weights are trained, or adapters.
        mode: of privacy.
        model: a Hugging Face folder; None = a Llama of 2 M parameters for bytes.
        batch: records a step.
        device: `training.device`.
    """

    kind: Kind
    mode: PrivacyMode
    model: Path | None
    batch: int
    device: str = "auto"

    @property
    def pass_records(self) -> int:
        """Records of a pass on a processor. Of a small model as many as suit its caches, as a node
        would choose; of a large one few, since four processes hold it: with 8 records of SmolLM2
        they need 24 GB.
        """
        return LARGE_PASS if self.model else 2048 // TOKENS

    @property
    def name(self) -> str:
        """In results."""
        return f"{self.model.name if self.model else 'small'} {self.kind} {self.mode}"

    @property
    def changes(self) -> list[str]:
        """Of the manifest, as `xpeer init --set` takes them."""
        return [
            f"optimiser.batch_records={self.batch}",
            f"optimiser.sequence_tokens={TOKENS}",
            f"optimiser.learning_rate={RATE}",
            f"round.window_steps={WINDOW}",
            "end.steps=100000",
            *(NOISE if privacy_policy(self.mode).charges else ()),
        ]


def write_texts(folder: Path) -> tuple[Path, Path]:
    """A shard and a public text in this folder: the Python manual's topics."""
    text = "\n".join(value for _, value in sorted(topics.topics.items()))
    shard, public = folder / "shard.txt", folder / "public.txt"
    shard.write_text(text[PUBLIC_CHARS:])
    public.write_text(text[:PUBLIC_CHARS])
    return shard, public
