"""Random weights: the same every time on one kind of device, and told apart from those of another."""

from __future__ import annotations

import torch

from kvlink_core.models import describe_model, load_model


def test_random_weights_are_the_same_every_time() -> None:
    one, other = (load_model("random:llama-tiny").network for _ in range(2))
    for name, parameter in one.state_dict().items():
        assert torch.equal(parameter, other.state_dict()[name]), name


def test_weights_are_drawn_on_the_device() -> None:
    """Shown on the device that holds nothing: 16 GB of weights that were made here first would be noticed."""
    from kvlink_core.models.causal_lm import attention_of
    from kvlink_core.models.loader import _random

    description = describe_model("random:llama-8b", device="cuda")
    attention, _ = attention_of(description.config)
    network = _random(description, attention, torch.device("meta"))
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in network.parameters()) == 8_030_261_248  # as Llama 3.1 8B states


def test_another_kind_of_device_has_other_weights_and_another_dtype() -> None:
    cpu, gpu = (describe_model("random:llama-tiny", device=d) for d in ("cpu", "cuda"))
    assert cpu.dtype == torch.float32
    assert gpu.dtype == torch.bfloat16
    same = describe_model("random:llama-tiny", device="cuda", dtype="float32")
    assert same.fingerprint.digest != cpu.fingerprint.digest
    assert same.fingerprint.dtype == cpu.fingerprint.dtype
