"""The directory that a recipe writes: laid out before training, so that training sees the prompts of serving."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer

from kvlink_core.errors import ConfigError, ModelNotFoundError
from kvlink_core.models.describe import EMBEDDED, EMBEDDED_DIRECTORY
from kvlink_core.models.layout_file import LayoutFile, read_layout, read_layout_file
from kvlink_core.prompt import PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.training.recipes.config import Recipe

WRAP_FILE = "soft_wrap.safetensors"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
#: What a model's directory may hold beside its weights that loading it reads.
_BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*",
           "vocab*", "merges.txt", "added_tokens.json", "kvlink.json")  # fmt: skip
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")


@dataclass(frozen=True)
class Target:
    """The directory under way.

    Attributes:
        base: the model's own directory.
        out: where the trained model is written.
        layout: of ``out``, with the link tokens or the wrap that are trained.
        links: the link tokens to train; ``None`` for none.
        added: tokens that the base's vocabulary lacks.
    """

    base: Path
    out: Path
    layout: PromptLayout
    links: LinkTokens | None
    added: tuple[int, ...]

    @property
    def bos(self) -> tuple[int, ...]:
        """What a text without a conversation begins with."""
        bos = AutoTokenizer.from_pretrained(self.out, local_files_only=True).bos_token_id
        return () if bos is None else (int(bos),)


def prepare(recipe: Recipe, out: Path) -> Target:
    """Write everything but the weights to ``out``.

    Raises:
        ModelNotFoundError: the model is no directory, or lacks its configuration or tokenizer.
        ConfigError: link tokens that the vocabulary lacks; a base that wraps its documents.
        ModelError: the tokenizer cannot be loaded, or its chat template cannot hold documents.
    """
    base = EMBEDDED_DIRECTORY if recipe.model == EMBEDDED else Path(recipe.model)
    if not (base / "config.json").is_file():
        raise ModelNotFoundError(f"the recipe's model {recipe.model!r} is no Hugging Face directory: no config.json.")
    file = read_layout_file(base)
    if file.soft_wrap is not None:
        raise ConfigError(
            f"{str(base)!r} wraps its documents already (soft_wrap in its kvlink.json); train from the model beneath."
        )
    out.mkdir(parents=True, exist_ok=True)
    for pattern in _BESIDE:
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelNotFoundError(f"cannot load the tokenizer of {str(base)!r}: {error}") from error
    keys: dict[str, Any] = (
        json.loads((base / "kvlink.json").read_text("utf-8")) if (base / "kvlink.json").is_file() else {}
    )
    keys["name"] = recipe.name or out.name
    keys.pop("default_linker", None)
    links: LinkTokens | None = None
    added: tuple[int, ...] = ()
    if recipe.train == "wrap":
        hidden = _hidden(base)
        write_wrap(out, torch.zeros(recipe.wrap.header + recipe.wrap.trailer, hidden), recipe.wrap.header)
        keys["soft_wrap"] = WRAP_FILE
    else:
        keys.pop("link_tokens", None)
        if file.preset is not None:
            keys["link_tokens"] = None
        if recipe.links.k:
            links, added = _links(recipe, file, tokenizer)
            keys["link_tokens"] = {"k": links.k, "ids": list(links.ids), "per_place": links.per_place}
            if added:
                tokenizer.save_pretrained(out)
    (out / "kvlink.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
    return Target(base, out, read_layout(out, read_layout_file(out)), links, added)


def _links(recipe: Recipe, file: LayoutFile, tokenizer: Any) -> tuple[LinkTokens, tuple[int, ...]]:
    """The link tokens that a recipe means, and which of them are new; the tokenizer is given those."""
    want = recipe.links
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if want.tokens is not None:
        if missing := [t for t in want.tokens if t not in vocabulary]:
            raise ConfigError(
                f"links.tokens: the vocabulary has no token {missing[0]!r}; leave tokens out to add new ones."
            )
        ids = tuple(vocabulary[t] for t in want.tokens)
        if len(set(ids)) != len(ids):
            raise ConfigError("links.tokens names a token twice.")
        return LinkTokens(ids, want.k, want.per_place), ()
    own = file.link_tokens
    if own is not None and own.k >= want.k:
        return LinkTokens(own.ids, own.k, own.per_place).first(want.k), ()
    taken = set(file.token_ids)
    reserved = sorted(i for t, i in vocabulary.items() if _RESERVED.fullmatch(t) and i not in taken)
    if len(reserved) >= want.k:
        return LinkTokens(tuple(reserved[: want.k]), want.k), ()
    names = [f"<|kvlink_{i}|>" for i in range(want.k)]
    if clash := [n for n in names if n in vocabulary]:
        raise ConfigError(f"the vocabulary has a token {clash[0]!r} already; name the link tokens in links.tokens.")
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in names], special_tokens=True)
    ids = tuple(int(i) for i in tokenizer.convert_tokens_to_ids(names))
    return LinkTokens(ids, want.k), ids


def _hidden(base: Path) -> int:
    config = json.loads((base / "config.json").read_text("utf-8"))
    width = config.get("hidden_size") or config.get("n_embd") or config.get("text_config", {}).get("hidden_size")
    if not isinstance(width, int):
        raise ConfigError(f"{str(base / 'config.json')!r} has no hidden_size.")
    return width


def write_wrap(out: Path, rows: Tensor, header: int) -> None:
    """Write ``[header + trailer, hidden]`` as the wrap of ``out``, in float32."""
    rows = rows.detach().float().cpu()
    tensors = {"header": rows[:header].contiguous(), "trailer": rows[header:].contiguous()}
    save_file(tensors, str(out / WRAP_FILE))


def copy_weights(base: Path, out: Path) -> None:
    """The base's weights, byte for byte: a frozen model is the same model."""
    for pattern in _WEIGHTS:
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)
