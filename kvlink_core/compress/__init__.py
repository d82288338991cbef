"""How K and V become bytes: codecs, chosen by name."""

from kvlink_core.compress.codec import (
    DTYPES,
    CacheShape,
    Codec,
    EncodedColumn,
    EncodedDocument,
    codec_spec,
    dtype_name,
)
from kvlink_core.compress.pruning import pruning_of
from kvlink_core.compress.registry import codec_names, get_codec, make_codec
from kvlink_core.compress.scorers import scorer_names

__all__ = [
    "DTYPES",
    "CacheShape",
    "Codec",
    "EncodedColumn",
    "EncodedDocument",
    "codec_names",
    "codec_spec",
    "dtype_name",
    "get_codec",
    "make_codec",
    "pruning_of",
    "scorer_names",
]
