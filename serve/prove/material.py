"""What the proofs ask, and what the right answer is: documents, questions about them, and the oracle's tokens.

The model has random weights, drawn wide: its answers depend on every document and go on for as long as is asked, so a
cache at a wrong place, or of another document, changes them within a token or two. A trained model would say the same
few words whatever its caches are worth.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.models.describe import EMBEDDED_DIRECTORY
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.training.worlds import make_world
from kvlink_core.types import Document, Message

#: Where the two likeliest tokens are nearer than this, adding in another order may exchange them: no fault.
_LEAST_MARGIN = 2e-3

_ASKED = (
    "What do they say?",
    "Tell me all that is known.",
    "Who is meant, and where?",
    "Which of them was first?",
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about stored documents, and what the oracle answers.

    Attributes:
        text: the user's turn.
        documents: ids, in the order of the prompt.
        max_tokens: asked for.
        answer: the oracle's greedy answer.
        tokens: how many that are.
    """

    text: str
    documents: tuple[str, ...]
    max_tokens: int
    answer: str
    tokens: int


def make_model(directory: Path, *, small: bool) -> LoadedModel:
    """Write and load the model of the proofs: the embedded one's tokenizer and layout, wide random weights.

    Args:
        directory: is made.
        small: 3 narrow layers, which compute next to nothing, rather than the embedded model's shape.
    """
    shutil.copytree(EMBEDDED_DIRECTORY, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    values = json.loads((directory / "config.json").read_text("utf-8"))
    values |= {"initializer_range": 0.2, "dtype": "float32", "tie_word_embeddings": False}
    if small:
        values |= {
            "initializer_range": 0.4, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        }  # fmt: skip
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**values)).save_pretrained(directory)
    layout = directory / "kvlink.json"
    layout.write_text(json.dumps(json.loads(layout.read_text("utf-8")) | {"name": "kvlink-proof"}), "utf-8")
    return load_model(str(directory), dtype="float32")


def make_documents(count: int, *, sentences: int) -> dict[str, str]:
    """Texts by id: passages of generated worlds, so many of them to a document; always the same ones."""
    documents: dict[str, str] = {}
    passages: list[str] = []
    seed = 0
    while len(documents) < count:
        while len(passages) < sentences:
            passages += make_world(seed, (8, 12)).passages
            seed += 1
        documents[f"doc{len(documents):03}"] = " ".join(passages[:sentences])
        del passages[:sentences]
    return documents


def store_documents(
    model: LoadedModel, url: str, documents: dict[str, str], *, options: dict[str, str] | None, per_shard: int
) -> None:
    """Make a store at ``url`` with these documents, so many to a shard."""
    store = DocumentStore.open(url, fingerprint=model.fingerprint, create=True, storage_options=options)
    encoder = DocumentEncoder(model)
    names = list(documents)
    rows = []
    for first in range(0, len(names), per_shard):
        some = names[first : first + per_shard]
        tokens = [model.layout.document_tokens(Document(name, documents[name])) for name in some]
        rows += store.write_shard(list(zip(some, encoder.encode(tokens), strict=True)))
    store.commit(rows)
    store.close()


def make_questions(
    model: LoadedModel,
    documents: dict[str, str],
    count: int,
    *,
    per_request: int,
    zipf: float,
    max_tokens: Sequence[int],
    seed: int,
) -> list[Question]:
    """Questions over documents drawn by Zipf's law, with the oracle's answers: computed here, with nothing stored.

    A question whose answer hangs on two tokens that are about equally likely is not asked.

    Args:
        model: answers.
        documents: the most popular first.
        count: of questions.
        per_request: documents of each.
        zipf: exponent of their popularity.
        max_tokens: of an answer; each question takes the next of these.
        seed: of what is drawn.
    """
    drawn = random.Random(seed)
    names = list(documents)
    weights = [1 / (rank + 1) ** zipf for rank in range(len(names))]
    session = Session(model)
    questions: list[Question] = []
    while len(questions) < count:
        picked: list[str] = []
        while len(picked) < min(per_request, len(names)):
            (name,) = drawn.choices(names, weights)
            if name not in picked:
                picked.append(name)
        text = drawn.choice(_ASKED)
        most = max_tokens[len(questions) % len(max_tokens)]
        request = AnswerRequest(
            [Message("user", text)],
            [Document("", documents[name]) for name in picked],
            sampling=SamplingParams(max_tokens=most, logprobs=2),
        )
        events = list(session.start(request))
        likely = [each.top for event in events for each in event.logprobs]
        if likely and min(first[1] - second[1] for first, second in likely) > _LEAST_MARGIN:
            answer = "".join(event.text for event in events)
            questions.append(Question(text, tuple(picked), most, answer, len(likely)))
    return questions
