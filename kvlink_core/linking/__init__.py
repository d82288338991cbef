"""Linking: strategies that turn document caches and a prompt into a linked cache."""

from kvlink_core.linking.base import Linker
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.linking.registry import get_linker, linker_names

__all__ = ["LinkedCache", "Linker", "get_linker", "linker_names"]
