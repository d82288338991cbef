"""Trained embeddings around documents: read, checked, encoded, linked, stored, and left out by ``full``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import document_slots, greedy_blended
from safetensors.torch import save_file
from strategies import DOCUMENTS, QUESTION, difference, follow, linked_by, logits_of, prompt_for
from tiny import save_tiny, tiny_configs

from kvlink_core.conformance.tiny import tiny_model as tiny_of
from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.errors import ConfigError, FingerprintMismatchError, KVLinkError, ModelError, UnsupportedModelError
from kvlink_core.linking import linker_names
from kvlink_core.linking.base import place_at_prompt_positions
from kvlink_core.models import LoadedModel, describe_model, load_layout, load_model
from kvlink_core.models.soft_wrap import read_soft_wrap
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, DocumentRef

WIDTH = 32
STEPS = 3


def wrap(directory: Path, header: torch.Tensor, trailer: torch.Tensor, name: str = "wrap.safetensors") -> Path:
    """Give a model directory a wrap."""
    save_file({"header": header, "trailer": trailer}, directory / name)
    layout = json.loads((directory / "kvlink.json").read_text()) | {"soft_wrap": name}
    (directory / "kvlink.json").write_text(json.dumps(layout))
    return directory


def embeddings(rows: int, seed: int = 0) -> torch.Tensor:
    """As large as the embeddings of the tiny models."""
    return 0.4 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return wrap(save_tiny(tmp_path / "model"), embeddings(3), embeddings(2, 1))


def inserted(
    model: LoadedModel, documents: Sequence[list[int]], header: torch.Tensor, trailer: torch.Tensor
) -> torch.Tensor:
    """The embeddings of the whole prompt, header and trailer around each document."""
    embedding = model.network.get_input_embeddings()
    left = iter(documents)
    rows = []
    for segment in model.layout.build(QUESTION, documents, links=None).segments:
        embedded = embedding(torch.tensor(next(left) if segment.kind == "document" else segment.token_ids))
        rows += [header, embedded, trailer] if segment.kind == "document" else [embedded]
    return torch.cat(rows)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (4, 0), (0, 1)])
@pytest.mark.parametrize("name", ["llama", "qwen3-window", "gemma2", "deepseek_v3"])
def test_the_linked_path_equals_a_forward_with_the_embeddings_inserted(
    tmp_path: Path, name: str, before: int, after: int
) -> None:
    """In all layers a wrapped document sees itself alone, header and trailer included."""
    header, trailer = embeddings(before), embeddings(after, 1)
    model = load_model(str(wrap(save_tiny(tmp_path, tiny_configs()[name]), header, trailer)))
    documents = [list(d) for d in DOCUMENTS]
    prompt = prompt_for(model, "soft-wrap", [model.layout.wrap.around(d) for d in documents])
    inputs = inserted(model, documents, header, trailer)
    assert len(inputs) == prompt.length
    slots = document_slots(prompt)
    linked = linked_by(model, "soft-wrap", prompt, reserve=STEPS)
    assert linked.computed_tokens == prompt.length - len(slots)
    follow(linked, greedy_blended(model.network, prompt, STEPS, stale=lambda layer: slots, inputs=inputs))


def test_full_leaves_the_wrap_out_and_the_wrap_changes_what_linking_gives(directory: Path, tmp_path: Path) -> None:
    wrapped, plain = load_model(str(directory)), load_model(str(save_tiny(tmp_path / "plain")))
    texts = [Document("", "She moved to Oslo."), Document("", "!")]

    def prompt(model: LoadedModel, spec: str):  # type: ignore[no-untyped-def]  # a prompt
        return prompt_for(model, spec, [model.layout.document_tokens(d) for d in texts])

    full = linked_by(wrapped, "full", prompt(wrapped, "full"))
    assert full.prompt == prompt(plain, "full")
    assert full.computed_tokens == full.prompt.length == prompt(wrapped, "full").length - 2 * 5
    assert difference(logits_of(full), logits_of(linked_by(plain, "full", prompt(plain, "full")))) == 0
    linked = logits_of(linked_by(wrapped, "soft-wrap", prompt(wrapped, "soft-wrap")))
    assert difference(linked, logits_of(linked_by(plain, "reposition", prompt(plain, "reposition")))) > 1e-2


def test_alone_or_in_a_batch_is_the_same(directory: Path) -> None:
    model = load_model(str(directory))
    documents = [model.layout.wrap.around(d) for d in DOCUMENTS]
    together = DocumentEncoder(model).encode(documents)
    for cache, document in zip(together, documents, strict=True):
        assert cache.token_ids.tolist() == document
        assert cache.tokens == len(document)
        alone = DocumentEncoder(model).encode([document])[0]
        torch.testing.assert_close(cache.keys, alone.keys, rtol=0, atol=2e-5)
        torch.testing.assert_close(cache.values, alone.values, rtol=0, atol=2e-5)


def test_from_text_to_an_answer_by_way_of_a_store(directory: Path, tmp_path: Path) -> None:
    model = load_model(str(directory))
    store = DocumentStore.open(str(tmp_path / "store"), fingerprint=model.fingerprint, create=True)
    document = Document("a", "Maria Lopez was born in Lima.")
    wrapped = model.layout.document_tokens(document)
    store.commit(store.write_shard([("a", DocumentEncoder(model).encode([wrapped])[0])]))
    session = Session(model, store)

    def ask(document: Document | DocumentRef, linker: str | None = None):  # type: ignore[no-untyped-def]  # an answer
        return session.start(AnswerRequest(QUESTION, [document], linker, SamplingParams(max_tokens=4)))

    stored, sent, unseen = ask(DocumentRef("a")), ask(document), ask(Document("b", "Nobody knows."))
    assert [a.documents[0].origin for a in (stored, sent, unseen)] == ["store", "store", "encoded"]
    assert {a.linker for a in (stored, sent, unseen)} == {"soft-wrap"}
    assert stored.usage.cached_tokens == len(wrapped)
    expected = linked_by(model, "soft-wrap", prompt_for(model, "soft-wrap", [wrapped]))
    assert stored.usage.prompt_tokens == expected.prompt.length
    token = int(logits_of(expected).argmax())
    assert stored.text() == sent.text()
    assert stored.text() == "" or stored.text().startswith(model.layout.decode([token]))
    full = ask(DocumentRef("a"), "full")
    assert full.usage.prompt_tokens == full.usage.computed_tokens == expected.prompt.length - 5
    with pytest.raises(FingerprintMismatchError, match="wrap"):
        DocumentStore.open(str(tmp_path / "store"), fingerprint=replace(model.fingerprint, wrap="another"))
    others = set(linker_names()) - {"full", "soft-wrap"}
    assert len(others) >= 5
    for linker in others:
        with pytest.raises(
            ConfigError, match=f"linker '{linker}' does not know; use the linker 'soft-wrap', or 'full'"
        ):
            ask(document, linker)


def test_full_has_the_whole_context_for_the_unwrapped_prompt(tmp_path: Path) -> None:
    """The wrap must not count against the context where it is left out."""
    directory = wrap(save_tiny(tmp_path, tiny_configs(context=96)["llama"]), embeddings(40), embeddings(40))
    session = Session(load_model(str(directory)))
    request = AnswerRequest(QUESTION, [Document("", "x" * 40)], "full", SamplingParams(max_tokens=1))
    assert session.start(request).usage.prompt_tokens < 96
    with pytest.raises(KVLinkError, match="context is 96"):
        session.start(replace(request, linker="soft-wrap"))


def test_a_linker_that_computes_the_wrap_is_refused(directory: Path) -> None:
    """Also one that was never told of wraps: on a GPU such token ids would break the process."""
    model = load_model(str(directory))
    documents = [model.layout.wrap.around(d) for d in DOCUMENTS]
    prompt = prompt_for(model, "soft-wrap", documents)
    linked = place_at_prompt_positions(model, prompt, DocumentEncoder(model).encode(documents), reserve=0)
    linked.recompute(torch.tensor(sorted(document_slots(prompt, 1))))
    with pytest.raises(ConfigError, match="this linker computes them; use the linker 'soft-wrap', or 'full'"):
        logits_of(linked)
    with pytest.raises(ConfigError, match="this linker computes them"):
        linked.compute_first(1)


def test_a_model_without_a_wrap(tiny_model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"names no soft_wrap file\); use the linker 'reposition'"):
        prompt_for(tiny_model, "soft-wrap")


def test_the_fingerprint_names_the_wrap_and_nothing_else_changes(directory: Path, tmp_path: Path) -> None:
    plain = describe_model(str(save_tiny(tmp_path / "plain"))).fingerprint
    one = describe_model(str(directory)).fingerprint
    assert set(one.difference(plain)) == {"wrap"}
    other = describe_model(str(wrap(directory, embeddings(3), embeddings(2, 7)))).fingerprint
    assert set(other.difference(one)) == {"wrap"}
    moved = describe_model(str(wrap(directory, embeddings(3), embeddings(2, 1), "other.safetensors"))).fingerprint
    assert moved.wrap == one.wrap


def test_the_layout_alone_wraps_alike(directory: Path) -> None:
    """What tokenizes a corpus must find the documents that a service asks for."""
    document = Document("a", "Maria.")
    tokens = load_layout(str(directory)).document_tokens(document)
    assert tokens == load_model(str(directory)).layout.document_tokens(document)
    assert tokens[:3] == [2**31, 2**31 + 1, 2**31 + 2]
    assert tokens[-2:] == [2**31 + 3, 2**31 + 4]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"header": embeddings(1)}, "has the tensors header, not header and trailer"),
        ({"header": embeddings(1), "trailer": embeddings(1), "x": embeddings(1)}, "header, trailer, x"),
        ({"header": embeddings(1)[0], "trailer": embeddings(1)}, "are not rows of embeddings"),
        ({"header": embeddings(0), "trailer": embeddings(0)}, "one at least"),
        ({"header": embeddings(1)[:, :4].contiguous(), "trailer": embeddings(1)}, "all equally wide"),
        ({"header": embeddings(1) / 0, "trailer": embeddings(1)}, "not finite numbers"),
        ({"header": embeddings(1).long(), "trailer": embeddings(1).long()}, "not finite numbers"),
    ],
)
def test_files_that_are_no_wrap(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=reason):
        read_soft_wrap(tmp_path, "w.safetensors")


def test_a_file_that_is_missing_or_damaged(directory: Path) -> None:
    content = (directory / "wrap.safetensors").read_bytes()
    for damaged in (b"", b"no tensors at all", content[:-1], content[:40]):
        (directory / "wrap.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match="cannot read the soft_wrap file"):
            load_model(str(directory))
    (directory / "wrap.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"names the soft_wrap file 'wrap.safetensors', and .* has no such file"):
        load_model(str(directory))


@pytest.mark.parametrize("name", ["../wrap.safetensors", "/wrap.safetensors", "a\\b.safetensors", "wrap.bin", ""])
def test_names_that_are_refused(directory: Path, name: str) -> None:
    layout = json.loads((directory / "kvlink.json").read_text()) | {"soft_wrap": name}
    (directory / "kvlink.json").write_text(json.dumps(layout))
    with pytest.raises(ConfigError, match="soft_wrap"):
        describe_model(str(directory))


def test_a_wrap_of_another_model(tmp_path: Path) -> None:
    directory = wrap(save_tiny(tmp_path), torch.zeros(1, 16), torch.zeros(1, 16))
    with pytest.raises(ConfigError, match="16 wide, and the model's are 32: they were trained for another model"):
        load_model(str(directory))


def test_a_model_that_reads_token_ids_elsewhere_too(tmp_path: Path) -> None:
    """Gemma 3n gives every layer an input of its own, made from the token ids."""
    save_file({"header": torch.zeros(1, WIDTH), "trailer": torch.zeros(0, WIDTH)}, tmp_path / "w.safetensors")
    soft_wrap = read_soft_wrap(tmp_path, "w.safetensors")
    soft_wrap.check(tiny_of("gemma3_text"))
    with pytest.raises(UnsupportedModelError, match="computes something else from embeddings"):
        soft_wrap.check(tiny_of("gemma3n_text"))


def test_rows_in_the_dtype_of_the_model(directory: Path) -> None:
    """A wrap in float32 serves a model in bfloat16, and one in bfloat16 is read as it is."""
    model = load_model(str(directory), dtype="bfloat16")
    document = model.layout.wrap.around(DOCUMENTS[1])
    assert DocumentEncoder(model).encode([document])[0].keys.dtype == torch.bfloat16
    half = embeddings(2).bfloat16()
    wrap(directory, half, half.clone())
    assert torch.equal(read_soft_wrap(directory, "wrap.safetensors").embeddings, torch.cat([half, half]).float())
