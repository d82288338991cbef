"""Encoding: batches change nothing, keys are those before RoPE."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from kvlink_core.encode import DocumentEncoder, length_batches
from kvlink_core.errors import EmptyDocumentError, PromptTooLongError
from kvlink_core.models import LoadedModel

DOCUMENTS = [list(range(10, 10 + n)) for n in (5, 1, 17, 5, 40, 2)]


def test_alone_or_in_a_batch_is_the_same(tiny_model: LoadedModel) -> None:
    together = DocumentEncoder(tiny_model, max_batch_tokens=10_000).encode(DOCUMENTS)
    alone = [DocumentEncoder(tiny_model).encode([d])[0] for d in DOCUMENTS]
    for a, b, document in zip(together, alone, DOCUMENTS, strict=True):
        assert a.token_ids.tolist() == document
        torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=2e-5)
        torch.testing.assert_close(a.values, b.values, rtol=0, atol=2e-5)


def test_values_and_first_keys_are_those_of_the_models_own_cache(tiny_model: LoadedModel) -> None:
    """At position 0 RoPE rotates by nothing, so the model's own key there is the unrotated one."""
    document = DOCUMENTS[2]
    own = DynamicCache()
    with torch.inference_mode():
        tiny_model.network(input_ids=torch.tensor([document]), past_key_values=own, use_cache=True)
    ours = DocumentEncoder(tiny_model).encode([document])[0]
    for layer, cached in enumerate(own.layers):
        torch.testing.assert_close(ours.values[layer], cached.values[0])
        torch.testing.assert_close(ours.keys[layer][:, 0], cached.keys[0][:, 0])
        assert (ours.keys[layer][:, 1:] - cached.keys[0][:, 1:]).abs().max() > 0.1


def test_caches_own_their_memory(tiny_model: LoadedModel) -> None:
    cache = DocumentEncoder(tiny_model).encode(DOCUMENTS)[1]
    assert cache.keys.untyped_storage().nbytes() == cache.keys.nbytes


def test_empty_and_too_long_documents_are_refused(tiny_model: LoadedModel) -> None:
    encoder = DocumentEncoder(tiny_model)
    with pytest.raises(EmptyDocumentError):
        encoder.encode([[1], []])
    with pytest.raises(PromptTooLongError, match=r"2049.*2048"):
        encoder.encode([[1] * 2049])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_cover_everything_once_within_the_limit(lengths: list[int], limit: int) -> None:
    batches = length_batches(lengths, limit)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= limit
