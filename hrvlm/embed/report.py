"""What a run will do, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import Manifest
from .probe import Probed


@dataclass(frozen=True)
class EmbedPlan:
    """What is known before the start.

    Attributes:
        images: In the input.
        waiting: Of these, those whose rows are not there yet.
        parts: Files to be written.
        left_out: Files of the folder that are no images by their names.
        tokens: To be encoded, about.
        bytes: To be written, about.
        seconds: That it takes, about; None where no image of the sample could be read.
        encoders: Processes that encode.
        probed: What the numbers come from.
        manifest: What the rows will be.
    """

    images: int
    waiting: int
    parts: int
    left_out: Sequence[str]
    tokens: int
    bytes: int
    seconds: float | None
    encoders: int
    probed: Probed
    manifest: Manifest

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("images", "waiting", "parts", "tokens", "bytes", "seconds", "encoders")
        facts = self.manifest.facts
        return {name: getattr(self, name) for name in names} | {
            "left_out": len(self.left_out),
            "model": facts.name,
            "weights": "random" if facts.random_weights else "pretrained",
            "dtype": facts.dtype,
            "device": self.probed.device,
            "rows_per_part": self.manifest.rows_per_part,
            "decode_seconds_an_image": self.probed.decode_seconds,
            "tokens_per_second": self.probed.tokens_per_second,
        }


@dataclass
class EmbedReport:
    """What a run did, and what its folder holds now.

    Attributes:
        out: The folder.
        images: In the input, or in its shard.
        rows: That are there, those with errors included.
        written: Of these, by this run.
        bad: Of all rows that are there: kind of error to [count, id of one, its error].
        parts: That are there.
        failed: Parts that could not be written although they were tried with care.
        bytes: Of the parts.
        tokens: That this run encoded.
        seconds: From the first image to the last.
        busy: Of that time, the share in which the encoders encoded; None where nothing was.
        plan: What was expected.
    """

    out: str
    images: int
    rows: int = 0
    written: int = 0
    bad: dict[str, list[Any]] = field(default_factory=dict)
    parts: int = 0
    failed: list[int] = field(default_factory=list)
    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    busy: float | None = None
    plan: EmbedPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("out", "images", "rows", "written", "parts", "failed", "bytes", "tokens")
        return {name: getattr(self, name) for name in names} | {
            "seconds": self.seconds,
            "busy": self.busy,
            "bad": [
                {"kind": kind, "count": count, "example": name, "error": error}
                for kind, (count, name, error) in self.bad.items()
            ],
            "plan": self.plan and self.plan.to_json(),
        }
