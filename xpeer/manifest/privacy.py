"""The manifest's section on privacy: the least that every member's shard has."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from xpeer.leaves import seen_by
from xpeer.manifest.kinds import Count, Positive
from xpeer.policies import PrivacyMode, PrivacyPolicy, privacy_policy

DELTA_MIN, DELTA_MAX = 1e-10, 1e-4
"""Bounds of privacy.delta. Below, the accountant's doubles are too coarse. Above, epsilon means too
little."""


@seen_by("members", all_public=True)
class Privacy(Struct, frozen=True, forbid_unknown_fields=True):
    """The privacy that every member's shard has at least."""

    mode: PrivacyMode = "record"
    """record: DP-SGD that protects each training sequence or document (`unit`). off: no protection.
    """
    epsilon: Positive = 8.0
    delta: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """None = min(1e-5, n^-1.1) for a shard of n records."""
    clip_norm: Positive = 1.0
    """C: L2 norm that each record's gradient is clipped to."""
    noise_multiplier: Positive | None = None
    """sigma; None = each node calibrates it so that `end.steps` steps spend exactly epsilon."""
    unit: Literal["record", "document"] = "record"
    """The unit that epsilon protects. document: whole documents are sampled, about
    `optimiser.batch_records` of them a step, and n counts documents."""
    document_records: Count = 1
    """A step uses at most this many records of a sampled document. Each is clipped to C divided by
    their number."""
    clipping: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: C starts at clip_norm and follows a quantile of the norms. Its private estimate
    costs no further epsilon."""
    clip_quantile: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    """Fraction of the units whose norm should be within C."""
    clip_rate: Annotated[float, Meta(gt=0, le=2)] = 0.2
    """How fast the logarithm of C follows the quantile."""
    clip_count_noise: Positive | None = None
    """sigma_b: standard deviation of the noise that is added to the count of units within C. None =
    a 20th of the batch, or twice sigma if that is more."""

    @property
    def policy(self) -> PrivacyPolicy:
        """Policy of `mode`."""
        return privacy_policy(self.mode)

    def in_short(self) -> str:
        """Mode and target, e.g. "record, epsilon 8"."""
        if not self.policy.charges:
            return self.mode
        unit = ", per document" if self.unit == "document" else ""
        return f"{self.mode}, epsilon {self.epsilon:g}{unit}"

    def check(self, *, shared_corpus: bool) -> None:
        """Check what no single field can.

        Raises:
            ValueError: names fields and remedy.
        """
        if self.delta is not None and not DELTA_MIN <= self.delta <= DELTA_MAX:
            raise ValueError(
                f"privacy.delta = {self.delta:g}: it is the probability with which privacy.epsilon "
                f"does not hold: set it to {DELTA_MIN:g} to {DELTA_MAX:g}, or leave it out"
            )
        if not self.policy.clips_records and (self.unit, self.clipping) != ("record", "fixed"):
            raise ValueError(
                f"privacy.unit and privacy.clipping mean nothing for privacy.mode = {self.mode}: "
                "unset them"
            )
        if self.unit == "document" and shared_corpus:
            raise ValueError(
                "privacy.unit = document: pieces of one document of a shared corpus go to several "
                "members: use privacy.unit = record, or private shards"
            )
        if self.unit == "record" and self.document_records != 1:
            raise ValueError(
                "privacy.document_records means nothing for privacy.unit = record: unset it, or "
                "set privacy.unit = document"
            )
        for field in msgspec.structs.fields(Privacy):
            name, alters = field.name, field.name in ("clip_quantile", "clip_rate")
            if self.clipping == "fixed" and alters and getattr(self, name) != field.default:
                raise ValueError(
                    f"privacy.{name} means nothing for privacy.clipping = fixed: unset it, or set "
                    "privacy.clipping = adaptive"
                )
        sigma, count = self.noise_multiplier, self.clip_count_noise
        if self.clipping == "fixed" and count is not None:
            raise ValueError(
                "privacy.clip_count_noise means nothing for privacy.clipping = fixed: unset it, or "
                "set privacy.clipping = adaptive"
            )
        if sigma is not None and count is not None and 2 * count <= sigma:
            raise ValueError(
                f"privacy.clip_count_noise = {count:g}: the count alone would cost more than a "
                f"step with privacy.noise_multiplier = {sigma:g}: set it above {sigma / 2:g}"
            )
