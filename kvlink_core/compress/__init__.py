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
from kvlink_core.compress.registry import codec_names, get_codec, make_codec

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
]
