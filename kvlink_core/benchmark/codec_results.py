"""What ``kvlink bench codec`` found: records that are written as JSON and checked when they are read back."""

from __future__ import annotations

import math
import statistics
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvlink_core.benchmark.codec_quality import Tally, relative
from kvlink_core.benchmark.paired import paired_difference
from kvlink_core.benchmark.results import Hardware, Model


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExactMatch(_Record):
    """Whole answers over decoded caches, held against the same questions over the caches before they were encoded.

    Attributes:
        questions: asked.
        right, reference_right: answered with exactly the expected sentence, over decoded caches and over the others.
        gained, lost: right over decoded caches alone, and over the others alone.
        points, low, high: the difference in points, and its 95 % interval.
    """

    questions: int = Field(ge=1)
    right: int
    reference_right: int
    gained: int
    lost: int
    points: float
    low: float
    high: float

    @classmethod
    def of(cls, questions: int, right: int, gained: int, lost: int) -> ExactMatch:
        """With what follows from these."""
        difference = paired_difference(gained, lost, questions)
        return cls(
            questions=questions, right=right, reference_right=right - gained + lost, gained=gained, lost=lost,
            points=difference.points, low=difference.low, high=difference.high,
        )  # fmt: skip

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        difference = paired_difference(self.gained, self.lost, self.questions)
        for name in ("points", "low", "high"):
            _same(f"{name} of an exact match", getattr(self, name), getattr(difference, name))
        if self.right - self.gained != self.reference_right - self.lost:
            raise ValueError("right answers, gained and lost ones do not add up")
        return self


class QualityRow(_Record):
    """One codec on one material.

    Attributes:
        codec: as it was asked for; ``spec`` names all of its parameters.
        tokens: of the documents, as many as were encoded.
        stored_bytes, bf16_bytes: of their caches, encoded, and before that in bfloat16.
        keys_error, values_error, logits_error: root mean square of the error over that of what it is held against. Of
            pruned caches keys and values count that are left.
        divergence: KL divergence of next-token distributions from the reference's, in nats, mean over ``places``.
        top1: share of the places where the most likely token is the reference's.
        exact: for material with questions.
    """

    codec: str
    spec: str
    tokens: int
    stored_bytes: int
    bf16_bytes: int
    keys_error: float
    values_error: float
    logits_error: float
    divergence: float
    top1: float
    places: int
    exact: ExactMatch | None

    @classmethod
    def of(cls, codec: str, spec: str, tally: Tally) -> QualityRow:
        """From what was counted."""
        exact = None
        if tally.questions:
            exact = ExactMatch.of(tally.questions, tally.right, tally.gained, tally.lost)
        return cls(
            codec=codec,
            spec=spec,
            tokens=tally.tokens,
            stored_bytes=tally.stored_bytes,
            bf16_bytes=tally.bf16_bytes,
            keys_error=relative(tally.keys),
            values_error=relative(tally.values),
            logits_error=relative(tally.logits),
            divergence=tally.divergence / tally.steps,
            top1=tally.same_choices / tally.steps,
            places=tally.steps,
            exact=exact,
        )

    @property
    def share(self) -> float:
        """Bytes as a share of those in bfloat16."""
        return self.stored_bytes / self.bf16_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token in all layers."""
        return self.stored_bytes / self.tokens


class Quality(_Record):
    """All codecs on one material. ``name`` and ``description`` say what it is; ``dtype`` what the model computed in."""

    name: str
    description: str
    model: Model
    rows: list[QualityRow] = Field(min_length=1)


class Shape(_Record):
    """The document whose cache is encoded to measure speed: numbers drawn at random, bfloat16."""

    layers: int = Field(default=32, ge=1)
    kv_heads: int = Field(default=8, ge=1)
    head_dim: int = Field(default=128, ge=1)
    tokens: int = Field(default=512, ge=1)

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return 4 * self.layers * self.kv_heads * self.head_dim * self.tokens


class SpeedRow(_Record):
    """One codec with some number of threads.

    Attributes:
        codec, spec: as in ``QualityRow``.
        threads: that torch computed with; on a GPU that of what is left to the processor.
        stored_bytes: of the encoded cache.
        encode_s, decode_s: seconds of every counted run; decoding ends with the cache on the device.
        encode_gb_s, decode_gb_s: gigabytes of bfloat16 cache a second, at the medians.
    """

    codec: str
    spec: str
    threads: int
    stored_bytes: int
    encode_s: list[float] = Field(min_length=1)
    decode_s: list[float] = Field(min_length=1)
    encode_gb_s: float
    decode_gb_s: float


class Speed(_Record):
    """All codecs on one machine."""

    shape: Shape
    device: str
    hardware: Hardware
    rows: list[SpeedRow] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for row in self.rows:
            for what, seconds in (("encode_gb_s", row.encode_s), ("decode_gb_s", row.decode_s)):
                _same(f"{what} of {row.codec!r}", getattr(row, what), gb_per_s(self.shape, seconds))
        return self


class CodecReport(_Record):
    """A whole run of ``kvlink bench codec``.

    Attributes:
        format: of this file.
        command: that repeats it.
        started: when, in UTC, ISO 8601.
        quick: with fewer runs or questions than a published figure needs.
        versions: of what computed.
        speed, quality: what was measured.
        notes: why figures may not be right, and what was not measured.
    """

    format: Literal["kvlink-bench-codec/1"]
    command: str
    started: str
    quick: bool
    versions: dict[str, str]
    speed: Speed | None
    quality: list[Quality]
    notes: list[str]


def gb_per_s(shape: Shape, seconds: list[float]) -> float:
    """Gigabytes of bfloat16 cache a second."""
    return shape.nbytes / statistics.median(seconds) / 1e9


def _same(what: str, stated: float, computed: float) -> None:
    if not math.isclose(stated, computed, rel_tol=1e-6, abs_tol=1e-9):
        raise ValueError(f"{what} is {stated}, and what it is of gives {computed}")
