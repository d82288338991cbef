"""What is compared with what: models, linkers and codecs as a user names them, and the cells that come of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvlink_core.compress import get_codec
from kvlink_core.errors import ConfigError, InputError
from kvlink_core.linking import get_linker, linker_names
from kvlink_core.models import ModelDescription, describe_model
from kvlink_core.prompt import PromptLayout

FULL = "full"
RAW = "raw"

#: As which ``full`` has its codec in tables and files: it reads no caches.
NO_CODEC = ""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One way to answer: a model, a linker and the codec that its caches went through.

    Attributes:
        model: as the run calls it.
        linker: as for ``get_linker``.
        codec: as for ``get_codec``; empty for ``full``.
    """

    model: str
    linker: str
    codec: str

    @property
    def name(self) -> str:
        """``model/linker/codec``, by which a cell can be named."""
        return "/".join(part for part in (self.model, self.linker, self.codec) if part)


@dataclass(frozen=True, slots=True)
class Contender:
    """A model of the grid, not loaded.

    Attributes:
        source: as for ``load_model``.
        label: its public name, or ``source`` where two have the same.
        digest: of everything that its answers depend on: fingerprint, layout.
        cells: of this model, ``full`` first.
        left_out: linkers that this model cannot run and another model of the grid can, with the reason.
    """

    source: str
    label: str
    digest: str
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...] = ()


def expand(linkers: Sequence[str], ks: Sequence[int]) -> list[str]:
    """Linkers, with every ``k`` for a ``link-tokens`` that names none; k = 0 is ``reposition``.

    Raises:
        UnknownLinkerError, ConfigError: one that cannot be.
    """
    if ks and "link-tokens" not in linkers:
        raise ConfigError("--k says how many link tokens 'link-tokens' uses; add --linker link-tokens.", param="k")
    found = []
    for linker in linkers:
        each = [f"link-tokens:k={k}" if k else "reposition" for k in ks] if linker == "link-tokens" else []
        found += each or [linker]
    for linker in found:
        get_linker(linker)
    return list(dict.fromkeys(found))


def contenders(
    models: Sequence[str],
    linkers: Sequence[str] | None,
    codecs: Sequence[str],
    *,
    ks: Sequence[int] = (),
    device: str = "cpu",
    dtype: str | None = None,
) -> list[Contender]:
    """The grid, checked before a model is loaded.

    Args:
        models: as for ``load_model``.
        linkers: ``None`` for all that a model can run.
        codecs: by which every linker's caches go once.
        ks: as for ``expand``.
        device, dtype: as for ``load_model``.

    Raises:
        KVLinkError: a model, linker or codec that cannot be, or a linker that none of the models can run.
    """
    if len(set(models)) < len(models):
        raise ConfigError("a model is named twice; name each once.", param="model")
    for codec in codecs:
        get_codec(codec)
    names = expand(linkers, ks) if linkers else list(linker_names())
    described = [describe_model(source, device=device, dtype=dtype) for source in models]
    labels = [each.name for each in described]
    reasons = [{name: _reason(each.layout, name) for name in names} for each in described]
    for name in names if linkers else ():
        if all(reason[name] for reason in reasons):
            raise ConfigError(f"{name}: {reasons[0][name]}", param="linker")
    found = []
    for source, each, reason in zip(models, described, reasons, strict=True):
        label = each.name if labels.count(each.name) == 1 else source
        usable = [name for name in names if name != FULL and not reason[name]]
        cells = [Cell(label, FULL, NO_CODEC)]
        cells += [Cell(label, name, codec) for name in usable for codec in dict.fromkeys(codecs)]
        left_out = tuple(f"{label}: {name} was left out: {why}" for name, why in reason.items() if why)
        found.append(Contender(source, label, _digest(each), tuple(cells), left_out))
    return found


def _reason(layout: PromptLayout, linker: str) -> str:
    """Why a model cannot run a linker, or nothing."""
    try:
        get_linker(linker).links(layout)
    except InputError as error:
        return str(error)
    return ""


def _digest(model: ModelDescription) -> str:
    try:
        layout = (model.directory / "kvlink.json").read_bytes()
    except OSError:
        layout = b""
    return hashlib.sha256(model.fingerprint.to_json().encode() + layout).hexdigest()[:16]
