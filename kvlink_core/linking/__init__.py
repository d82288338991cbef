"""Linking: strategies that turn document caches and a prompt into a linked cache (docs/linkers.md)."""

from kvlink_core.linking.base import Linker
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.linking.registry import get_linker, linker_names, register_linker, unregister_linker

__all__ = ["LinkedCache", "Linker", "get_linker", "linker_names", "register_linker", "unregister_linker"]
