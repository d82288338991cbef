"""A loss under the training mask is the negative log-likelihood of the same answer through linking (1e-5)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny, tiny_configs
from transformers import AutoModelForCausalLM

from kvlink_core.encode import DocumentEncoder
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.training.recipes.config import Source
from kvlink_core.training.recipes.examples import Reader
from kvlink_core.training.recipes.masks import block_mask, visible
from kvlink_core.training.recipes.network import plain_attention
from kvlink_core.training.recipes.rows import collate
from kvlink_core.training.recipes.trainee import Rows, Trainee
from kvlink_core.types import Document, Message

ASKED: Sequence[tuple[str, str, Sequence[str]]] = (
    ("Who?", "Anna.", ["Anna sings.", "Bert is deaf."]),
    ("Where to?", "To Oslo", ["She left.", "It is Oslo.", "No."]),
    ("Why?", "So.", ["It rains."]),
)


def through_linking(model: LoadedModel, linker_name: str) -> float:
    """Mean negative log-likelihood per token of all answers, each computed as a request would."""
    linker = get_linker(linker_name)
    total, count = 0.0, 0
    for question, answer, texts in ASKED:
        documents = [model.layout.document_tokens(Document(str(i), t)) for i, t in enumerate(texts)]
        caches = DocumentEncoder(model).encode(documents) if linker.uses_caches else []
        prompt = model.layout.build([Message("user", question)], documents, links=linker.links(model.layout))
        ids = [*model.layout.plain_tokens(answer), 257]
        linked = linker.link(model, prompt, caches, reserve=len(ids))
        logits = linked.compute(linked.token_ids[linked.pending], linked.pending)
        for offset, token in enumerate(ids):
            total -= float(logits.log_softmax(-1)[token])
            count += 1
            at = torch.tensor([prompt.length + offset])
            logits = linked.compute(torch.tensor([token]), at) if offset + 1 < len(ids) else logits
    return total / count


def under_the_mask(model: LoadedModel, data: Path, attention: str, rows: Rows | None = None) -> float:
    """The same by ``Trainee``: all examples packed into one row."""
    network = AutoModelForCausalLM.from_pretrained(
        model.description.directory, attn_implementation=plain_attention(model.description.config), dtype=torch.float32
    )
    source = Source(path=data / "qa.jsonl", kind="qa", attention=attention)
    reader = Reader(source, model.layout, model.layout.link_tokens, 1000, (256,), None)
    pairs = [reader.pair(i) for i in range(len(reader))]
    batch = collate([[p for p in pairs if p is not None]])
    batch = {k: v for k, v in batch.items() if not k.startswith("teacher")}
    trainee = Trainee(network, rows, tied=None, attention="sdpa", dtype=torch.float32)
    with torch.no_grad():
        return float(trainee(**batch)["loss"])


@pytest.fixture
def plain_data(tmp_path: Path) -> Path:
    lines = [{"question": q, "answer": a, "documents": list(d)} for q, a, d in ASKED]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.mark.parametrize("name", ["llama", "qwen3-window", "gemma2", "llama-yarn"])
@pytest.mark.parametrize(("attention", "linker"), [("segments", "link-tokens"), ("full", "full")])
def test_packed_rows(tmp_path: Path, plain_data: Path, name: str, attention: str, linker: str) -> None:
    model = load_model(str(save_tiny(tmp_path / "model", tiny_configs()[name])))
    assert under_the_mask(model, plain_data, attention) == pytest.approx(through_linking(model, linker), rel=1e-5)


def test_the_two_masks_differ(tiny_model: LoadedModel, plain_data: Path) -> None:
    """So that the test above can fail."""
    assert abs(under_the_mask(tiny_model, plain_data, "segments") - through_linking(tiny_model, "full")) > 1e-3


def test_a_wrap(tmp_path: Path, plain_data: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    values = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    save_file({"header": values[:2].contiguous(), "trailer": values[2:].contiguous()}, directory / "w.safetensors")
    keys = json.loads((directory / "kvlink.json").read_text())
    del keys["link_tokens"]
    (directory / "kvlink.json").write_text(json.dumps({**keys, "soft_wrap": "w.safetensors"}))
    model = load_model(str(directory))
    rows = Rows(tuple(range(2**31, 2**31 + 5)), values)
    assert under_the_mask(model, plain_data, "segments", rows) == pytest.approx(
        through_linking(model, "soft-wrap"), rel=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_has_the_same_mask() -> None:
    from torch.nn.attention.flex_attention import create_mask

    context = torch.tensor([[1] * 7 + [2] * 5 + [0] * 4, [1] * 16])
    document = torch.tensor([[0, 1, 1, 0, 2, 2, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0], [0, *[1] * 5, *[2] * 5, *[0] * 5]])
    for window in (None, 3):
        block = block_mask(context, document, window)
        seen = create_mask(block.mask_mod, 2, 1, 16, 16, device="cpu")
        assert torch.equal(seen, visible(context, document, window))
