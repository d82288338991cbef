"""Catch keys before RoPE, without a copy of any modelling code.

Every supported attention calls a module-level ``apply_rotary_pos_emb(query, key, cos, sin)`` and then hands the
rotated key to the cache. A recorder placed between the two sees both: the function is replaced once per modelling
module by one that notes its ``key`` argument while a capture is active in this thread, and is otherwise unchanged.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from kvlink_core.errors import UnsupportedModelError

_FUNCTION = "apply_rotary_pos_emb"
_active = threading.local()
_originals: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {}
_install_lock = threading.Lock()


def install(attention: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Make the modelling module of ``attention`` capturable; idempotent and thread-safe.

    Returns the original function, for re-positioning.

    Raises:
        UnsupportedModelError: the module has no such function.
    """
    name = type(attention).__module__
    with _install_lock:
        if name in _originals:
            return _originals[name]
        module = sys.modules[name]
        original = vars(module).get(_FUNCTION)
        if original is None:
            raise UnsupportedModelError(f"{name} has no {_FUNCTION}: its keys cannot be read before RoPE.")

        def recording(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            cache: UnrotatedCache | None = getattr(_active, "cache", None)
            if cache is not None:
                cache.note(k)
            return original(q, k, *args, **kwargs)

        setattr(module, _FUNCTION, recording)
        _originals[name] = original
        return original  # type: ignore[no-any-return]


class UnrotatedCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """A cache for one forward pass over documents: keeps each layer's key before RoPE, and its value.

    Use as a context manager around the forward; afterwards ``keys[layer]`` and ``values[layer]`` are
    ``[batch, kv_heads, tokens, head_dim]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._noted: torch.Tensor | None = None

    def __enter__(self) -> UnrotatedCache:
        assert getattr(_active, "cache", None) is None, "captures do not nest"
        _active.cache = self
        return self

    def __exit__(self, *_: object) -> None:
        _active.cache = None

    def note(self, key: torch.Tensor) -> None:
        """Called with the key that is about to be rotated."""
        self._noted = key

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with its rotated key; keeps the unrotated one instead."""
        assert self._noted is not None
        assert layer_idx == len(self.keys)
        assert self._noted.shape == key_states.shape
        self.keys.append(self._noted)
        self.values.append(value_states)
        self._noted = None
        return key_states, value_states
