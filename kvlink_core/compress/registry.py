"""Codecs by name. A new one is a file of its own and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvlink_core.compress.affine import Affine
from kvlink_core.compress.codec import Codec, ParamValue
from kvlink_core.compress.fp8 import Float8
from kvlink_core.compress.lossless import LosslessCodec
from kvlink_core.compress.pruning import RULES, pruned, pruning_of
from kvlink_core.compress.quantised import QuantisedCodec
from kvlink_core.compress.raw import RawCodec
from kvlink_core.errors import ConfigError, UnknownCodecError

_FACTORIES: Mapping[str, Callable[[Mapping[str, ParamValue]], Codec]] = {
    "raw": RawCodec.from_params,
    "lossless": LosslessCodec,
    "fp8": lambda params: QuantisedCodec("fp8", Float8(), params, group=128),
    "int8": lambda params: QuantisedCodec("int8", Affine(8), params, group=128),
    "int4": lambda params: QuantisedCodec("int4", Affine(4), params, group=64),
}


def codec_names() -> tuple[str, ...]:
    """The names that ``make_codec`` knows, sorted."""
    return tuple(sorted(_FACTORIES))


def make_codec(name: str, params: Mapping[str, ParamValue]) -> Codec:
    """The codec of that name, with ``keep`` among its parameters a pruned one.

    Raises ``UnknownCodecError``, or ``ConfigError`` for parameters it does not have.
    """
    if name not in _FACTORIES:
        raise UnknownCodecError(f"no codec {name!r}; there are: {', '.join(codec_names())}", param="codec")
    own = {key: value for key, value in params.items() if key not in RULES}
    return pruned(_FACTORIES[name](own), {key: params[key] for key in params.keys() & RULES.keys()})


def get_codec(spec: str) -> Codec:
    """The codec that a user wrote as ``name`` or ``name:key=value,...``.

    Raises like ``make_codec``, and ``UnknownScorerError``.
    """
    name, _, rest = spec.partition(":")
    params: dict[str, ParamValue] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not key or not equals or key in params:
            raise ConfigError(f"codec {spec!r} is not of the form name:key=value,key=value", param="codec")
        params[key] = _parse(value)
    made = make_codec(name, params)
    pruning_of(made)  # a reader can do without the scorer, but whoever names one should hear that there is none
    return made


def _parse(value: str) -> ParamValue:
    if value in ("True", "False"):
        return value == "True"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
