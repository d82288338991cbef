"""A recipe: what is trained, on what, and how. One YAML file; unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvlink_core.errors import ConfigError

RECIPES_DIRECTORY = Path(__file__).parent
SHIPPED = ("kvlink", "link-only", "soft-wrap")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """One part of the mixture: a JSONL file, how its lines become examples, and how often they are drawn.

    Attributes:
        path: the file; a relative one is looked up from the recipe's directory.
        kind: ``qa``, ``instruct``, ``text`` or ``summary`` (docs/training.md has the keys of a line).
        weight: share of the draws, relative to the other sources.
        attention: ``segments``, the mask of linking, with the link tokens; or ``full``, ordinary attention without.
        segment_tokens: for ``text`` and ``summary``: tokens of each segment that a text is cut into.
        target_tokens: for ``text``: tokens of the continuation that is predicted.
        instruction: for ``summary``: what the user asks.
    """

    path: Path
    kind: Literal["qa", "instruct", "text", "summary"]
    weight: float = Field(default=1.0, gt=0)
    attention: Literal["segments", "full"] = "segments"
    segment_tokens: int = Field(default=256, ge=8)
    target_tokens: int = Field(default=256, ge=1)
    instruction: str = Field(default="Summarise the documents.", min_length=1)


class Links(_Strict):
    """The link tokens to train.

    Attributes:
        k: how many follow each document; 0 trains without links (KVLink0).
        tokens: existing tokens of the vocabulary, by their text, ``k`` of them (with ``per_place``, ``k`` for each
            place). Default: those of the model's ``kvlink.json``; else reserved tokens of the vocabulary
            (``<|reserved_special_token_N|>``, as Llama 3 has); else new ones, which make the embeddings longer.
        per_place: whether each place in the prompt has link tokens of its own, as the published checkpoints have.
    """

    k: int = Field(default=5, ge=0)
    tokens: tuple[str, ...] | None = None
    per_place: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.tokens is not None and (not self.k or not self.tokens or len(self.tokens) % self.k):
            raise ValueError(f"{len(self.tokens)} tokens do not make k={self.k} of them after each document")
        if self.tokens is not None and not self.per_place and len(self.tokens) != self.k:
            raise ValueError("as many tokens as k, unless per_place is true")
        if self.per_place and self.tokens is None and self.k:
            raise ValueError("per_place needs tokens, k for each place")
        return self


class Lora(_Strict):
    """A PEFT LoRA adapter instead of the whole model; it is merged into the weights that are written."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Wrap(_Strict):
    """Rows of trained embeddings before and after each document (arXiv 2604.13226)."""

    header: int = Field(default=8, ge=0)
    trailer: int = Field(default=8, ge=0)
    answer_tokens: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.header + self.trailer:
            raise ValueError("a wrap needs a row at least, in header or trailer")
        return self


class Recipe(_Strict):
    """A whole recipe.

    Attributes:
        train: what changes: ``model`` (all weights, or with ``lora`` an adapter, and the link tokens), ``links`` (only
            their embeddings) or ``wrap`` (only header and trailer, by self-distillation).
        model: ``embedded`` or a Hugging Face directory; a relative one is looked up from the recipe's directory.
        mixture: what to train on.
        links, lora, wrap: see there; ``links`` is not for ``wrap``, ``lora`` for ``model`` only.
        max_tokens: length of a row, into which several examples are packed; longer examples are left out.
        rows: rows of one optimizer step, over all processes.
        rows_at_once: rows of one forward pass of a process; the rest is accumulated.
        steps, warmup_steps: optimizer steps in all, and of these with a rising learning rate.
        schedule: how the learning rate falls after that.
        learning_rate, weight_decay, beta2, max_grad_norm: of AdamW.
        attention: ``sdpa`` with a 4-D mask, or ``flex``, which skips what the mask empties (CUDA).
        dtype: of the arithmetic. Trained weights are kept in float32, frozen ones as the checkpoint has them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        save_steps, keep: how often a checkpoint is written, and how many stay.
        log_steps: how often the loss is reported.
        seed: of the draws, the rows' order and the initial values.
    """

    train: Literal["model", "links", "wrap"]
    model: str
    mixture: Annotated[tuple[Source, ...], Field(min_length=1)]
    links: Links = Links()
    lora: Lora | None = None
    wrap: Wrap = Wrap()
    max_tokens: int = Field(default=4096, ge=16)
    rows: int = Field(default=64, ge=1)
    rows_at_once: int = Field(default=1, ge=1)
    steps: int = Field(default=6000, ge=1)
    warmup_steps: int = Field(default=600, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    learning_rate: float = Field(default=5e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    attention: Literal["sdpa", "flex"] = "sdpa"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    save_steps: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    log_steps: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)
    name: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.lora is not None and self.train != "model":
            raise ValueError("lora is for train: model; the others freeze the model")
        if self.train == "links" and not self.links.k:
            raise ValueError("train: links needs links.k of 1 or more")
        if self.train == "wrap" and any(s.attention == "full" for s in self.mixture):
            raise ValueError("train: wrap learns from documents apart: attention: full has nothing to teach it")
        if self.train == "wrap" and any(s.kind == "instruct" for s in self.mixture):
            raise ValueError("train: wrap needs documents, which the kind instruct has not")
        if self.train == "links" and all(s.attention == "full" or s.kind == "instruct" for s in self.mixture):
            raise ValueError("train: links needs a source with documents and attention: segments")
        return self


def read_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: a YAML file.
        overrides: ``key=value``, nested keys with dots (``links.k=1``); values are YAML.

    Raises:
        ConfigError: no such file, not YAML, or keys and values that are not those of ``Recipe``.
    """
    path = Path(name)
    if not path.is_file():
        hint = f"; `kvlink train {name} --show` prints the recipe to start from" if name in SHIPPED else ""
        raise ConfigError(f"there is no recipe file {name!r}{hint}.")
    try:
        keys = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{name!r} has no keys; `kvlink train kvlink --show` prints a recipe.")
    for override in overrides:
        _override(keys, override)
    try:
        recipe = Recipe.model_validate(keys)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{name!r} is not a valid recipe: {reasons}") from error
    return _from_directory(recipe, path.parent)


def _override(keys: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not key=value.")
    *outer, last = key.split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not YAML.") from error
    for part in outer:
        inner = keys.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {part} has no keys of its own.")
        keys = inner
    keys[last] = value


def _from_directory(recipe: Recipe, directory: Path) -> Recipe:
    """Paths as seen from the recipe's directory."""
    sources = tuple(s.model_copy(update={"path": directory / s.path}) for s in recipe.mixture)
    model = recipe.model
    if not model.startswith(("embedded", "random:")) and not Path(model).is_absolute():
        model = str(directory / model)
    return recipe.model_copy(update={"mixture": sources, "model": model})


def shipped(name: str) -> str:
    """The text of a recipe that ships.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SHIPPED:
        raise ConfigError(f"no recipe {name!r} ships with KVLink; there are {', '.join(SHIPPED)}.")
    return (RECIPES_DIRECTORY / f"{name}.yaml").read_text("utf-8")
