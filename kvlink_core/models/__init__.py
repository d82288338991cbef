"""Models: load one, know its attention, read its keys before RoPE, re-position them."""

from kvlink_core.models.loader import LoadedModel, load_model
from kvlink_core.models.spec import ModelSpec

__all__ = ["LoadedModel", "ModelSpec", "load_model"]
