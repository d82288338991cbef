"""A run of ``kvlink bench codec``: what it measures, in which order, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import torch

from kvlink_core.benchmark.codec_material import Material, long_documents, own_text, passages
from kvlink_core.benchmark.codec_quality import compare
from kvlink_core.benchmark.codec_results import CodecReport, Quality, QualityRow, Shape, Speed
from kvlink_core.benchmark.codec_speed import measure_speed
from kvlink_core.benchmark.hardware import CoreWatch, describe_hardware, describe_versions
from kvlink_core.benchmark.results import Model
from kvlink_core.benchmark.ttft import ENOUGH_RUNS
from kvlink_core.compress import Codec, codec_spec, get_codec, pruning_of
from kvlink_core.errors import InputError
from kvlink_core.models import LoadedModel, load_model

Progress = Callable[[str, int, int], None]

#: What is measured when nothing is named.
DEFAULT_CODECS = (
    "raw", "lossless", "fp8", "fp8:zstd=1", "int8", "int8:zstd=1", "int4", "int4:zstd=1", "int4:group=128,zstd=1",
    "int4:group=128,keys=token,zstd=1",
)  # fmt: skip

#: Questions that a figure needs at least.
ENOUGH_QUESTIONS = 2000


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    Attributes:
        codecs: as a user writes them.
        model: answers the questions.
        text_model: a second model, whose own text is followed; ``None`` for none.
        device: a torch device.
        questions: held-out questions; 0 leaves quality out.
        document_tokens: of a long document, at most.
        texts: that the second model draws, each of ``text_tokens`` of document and ``following`` to be followed.
        repeats: counted runs of each codec; 0 leaves speed out.
        shape: of the cache that these encode.
    """

    codecs: Sequence[str] = DEFAULT_CODECS
    model: str = "embedded"
    text_model: str | None = None
    device: str = "cpu"
    questions: int = ENOUGH_QUESTIONS
    document_tokens: int = 512
    texts: int = 32
    text_tokens: int = 320
    following: int = 64
    repeats: int = ENOUGH_RUNS
    shape: Shape = field(default_factory=Shape)

    @property
    def quick(self) -> bool:
        """Whether something is measured less than a figure needs."""
        return 0 < self.questions < ENOUGH_QUESTIONS or 0 < self.repeats < ENOUGH_RUNS


def run(
    plan: Plan, command: str, started: datetime, watch: CoreWatch, progress: Progress = lambda name, done, total: None
) -> CodecReport:
    """Measure everything.

    Args:
        plan: what.
        command, started: for the report.
        watch: has looked since before.
        progress: called with what is under way.

    Raises:
        KVLinkError: a codec that there is not, a model that cannot be loaded, a device that cannot be used.
    """
    codecs = {spec: get_codec(spec) for spec in dict.fromkeys(plan.codecs)}
    notes: list[str] = []
    models = [load_model(plan.model, device=plan.device)] if plan.questions else []
    texts = [load_model(plan.text_model, device=plan.device)] if plan.text_model else []
    speed = _speed(plan, codecs, watch, notes, progress) if plan.repeats else None
    busy = watch.warning()
    if speed and busy:
        notes.append(f"while speed was measured, {busy}")
    quality = []
    for model in models:
        linked = (passages(model, plan.questions), long_documents(model, plan.questions, plan.document_tokens))
        quality += [_quality(plan.model, model, material, codecs, progress) for material in linked]
    for model in texts:
        material = own_text(model, plan.texts, *_fitting(model, plan, codecs.values()))
        quality.append(_quality(plan.text_model or "", model, material, codecs, progress))
    if models and not texts:
        notes.append("no second model's own text was followed, since --text-model names none.")
    return CodecReport(
        format="kvlink-bench-codec/1",
        command=command,
        started=started.isoformat(timespec="seconds"),
        quick=plan.quick,
        versions=describe_versions(),
        speed=speed,
        quality=quality,
        notes=notes,
    )


def _fitting(model: LoadedModel, plan: Plan, codecs: Iterable[Codec]) -> tuple[int, int]:
    """Tokens of a text and tokens that follow, cut to the model's context, in which some scorers read a text twice."""
    following = min(plan.following, model.context_length // 4)
    prunings = [pruning for codec in codecs if (pruning := pruning_of(codec)) is not None]
    twice = any(pruning.reads == "again" for pruning in prunings)
    room = model.context_length // 2 if twice else model.context_length - following - 1
    return min(plan.text_tokens, room), following


def _speed(
    plan: Plan, codecs: Mapping[str, Codec], watch: CoreWatch, notes: list[str], progress: Progress
) -> Speed | None:
    device = torch.device(plan.device)
    able = _able(codecs, plan, device, notes)
    most = torch.get_num_threads()
    threads = sorted({1, most}) if device.type == "cpu" else [most]
    rows = measure_speed(able, plan.shape, device, threads, plan.repeats, progress)
    if not rows:
        return None
    return Speed(shape=plan.shape, device=plan.device, hardware=describe_hardware(device, watch), rows=rows)


def _able(codecs: Mapping[str, Codec], plan: Plan, device: torch.device, notes: list[str]) -> dict[str, Codec]:
    """Those that encode a cache without the model that made it; some scorers want to see the model read."""
    small = Shape(tokens=2, **plan.shape.model_dump(exclude={"tokens"}))
    able = {}
    for name, codec in codecs.items():
        try:
            measure_speed({name: codec}, small, device, [torch.get_num_threads()], 1)
        except InputError as error:
            notes.append(f"the speed of {name} was not measured: {error}")
        else:
            able[name] = codec
    return able


def _quality(
    source: str,
    model: LoadedModel,
    material: Material,
    codecs: Mapping[str, Codec],
    progress: Progress,
) -> Quality:
    tallies = compare(model, material, codecs, lambda done, total: progress(material.name, done, total))
    return Quality(
        name=material.name,
        description=material.description,
        model=Model(
            source=source,
            type=model.spec.model_type,
            parameters=sum(p.numel() for p in model.network.parameters()),
            dtype=model.fingerprint.dtype,
            device=str(model.device),
        ),
        rows=[QualityRow.of(name, codec_spec(codecs[name]), tally) for name, tally in tallies.items()],
    )
