"""Engine: prefill, decode, sample, and turn tokens into text."""

from kvlink_core.engine.engine import Engine, EngineSettings, EngineStats
from kvlink_core.engine.generate import Generation, TokenEvent
from kvlink_core.engine.requests import Encoded, Encoding, EngineEvent, Failed, Generated, GenerationRequest, Handle
from kvlink_core.engine.sampling import SamplingParams, TokenLogprobs

__all__ = [
    "Encoded",
    "Encoding",
    "Engine",
    "EngineEvent",
    "EngineSettings",
    "EngineStats",
    "Failed",
    "Generated",
    "Generation",
    "GenerationRequest",
    "Handle",
    "SamplingParams",
    "TokenEvent",
    "TokenLogprobs",
]
