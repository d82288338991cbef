"""Models: describe one, load one, know its attention, read its keys before RoPE, re-position them."""

from kvlink_core.models.describe import ModelDescription, describe_model, load_layout
from kvlink_core.models.loader import LoadedModel, load_model
from kvlink_core.models.spec import ModelSpec

__all__ = ["LoadedModel", "ModelDescription", "ModelSpec", "describe_model", "load_layout", "load_model"]
