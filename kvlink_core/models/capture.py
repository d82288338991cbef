"""See the calls that rotate keys, without a copy of any modelling code.

Attention modules call module-level functions (``apply_rotary_pos_emb`` and its variants) and then hand the rotated key
to the cache. Each such function is replaced, once per modelling module, by one that notes its arguments and its
result while a recorder is active in this thread, and is otherwise unchanged. What the notes mean for one model is
found in ``key_recipe``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvlink_core.errors import UnsupportedModelError

#: What the modelling modules of transformers call the functions that rotate.
ROTATING_FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb")

_active = threading.local()
_install_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class RotationCall:
    """One call of a rotating function: the unpatched function, what it was given and what it returned."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


def install(network: torch.nn.Module) -> None:
    """Make the modelling modules of ``network`` recordable; idempotent and thread-safe."""
    names = {type(m).__module__ for m in network.modules()}
    with _install_lock:
        for name in sorted(names):
            module = sys.modules[name]
            for function in ROTATING_FUNCTIONS:
                original = vars(module).get(function)
                if original is not None and not hasattr(original, "kvlink_original"):
                    setattr(module, function, _recording(original))


def _recording(original: Callable[..., Any]) -> Callable[..., Any]:
    def recording(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        recorder: Recorder | None = getattr(_active, "recorder", None)
        if recorder is not None:
            recorder.calls.append(RotationCall(original, args, kwargs, result))
        return result

    recording.kvlink_original = original  # type: ignore[attr-defined]
    return recording


class Recorder(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """A cache for one forward pass from nothing that sees, layer by layer, how keys were rotated.

    Use as a context manager around the forward. Subclasses say what to keep in ``keep``; ``numbers`` are the numbers
    of the layers that cached, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RotationCall] = []
        self.numbers: list[int] = []

    def __enter__(self) -> Recorder:
        assert getattr(_active, "recorder", None) is None, "recorders do not nest"
        _active.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        _active.recorder = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with the key and value that it caches."""
        if layer_idx in self.numbers:
            raise UnsupportedModelError(f"this model visits its layer {layer_idx} more than once for each token.")
        self.numbers.append(layer_idx)
        calls, self.calls = self.calls, []
        self.keep(calls, key_states, value_states)
        return key_states, value_states

    def keep(self, calls: Sequence[RotationCall], keys: torch.Tensor, values: torch.Tensor) -> None:
        """The next layer rotated with ``calls`` and caches ``keys`` and ``values``, ``[batch, heads, tokens, dim]``."""
        raise NotImplementedError

    def update_conv_state(self, *_: Any, **__: Any) -> torch.Tensor:
        """Refuses models that mix convolutions over tokens into their attention."""
        raise UnsupportedModelError(_RECURRENT)

    def update_recurrent_state(self, *_: Any, **__: Any) -> torch.Tensor:
        """Refuses models with recurrent state."""
        raise UnsupportedModelError(_RECURRENT)

    def update_indexer(self, *_: Any, **__: Any) -> torch.Tensor:
        """Refuses models whose attention picks tokens by a second, learned index."""
        raise UnsupportedModelError(
            "this model keeps index keys beside its keys and picks the tokens it attends to by them; a document's "
            "cache would have to hold both, which is not supported."
        )


_RECURRENT = (
    "this model keeps a recurrent state: what it knows after a document depends on everything before it in an order "
    "that caches of single documents cannot restore."
)
