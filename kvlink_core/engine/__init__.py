"""Engine: prefill, decode, sample, and turn tokens into text."""

from kvlink_core.engine.generate import Generation, TokenEvent
from kvlink_core.engine.sampling import SamplingParams

__all__ = ["Generation", "SamplingParams", "TokenEvent"]
