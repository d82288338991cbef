"""``kvlink.json``: how a model's prompts are laid out, beside its ``config.json``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import AutoTokenizer

from kvlink_core.errors import ConfigError, ModelError, ModelNotFoundError
from kvlink_core.models.soft_wrap import read_soft_wrap
from kvlink_core.presets import PRESETS
from kvlink_core.prompt import DocumentsIn, PromptLayout
from kvlink_core.template import DocumentTemplate, LinkTokens
from kvlink_core.text import first_line


class _LinkTokensEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    k: int = Field(ge=1)
    ids: tuple[Annotated[int, Field(ge=0)], ...]
    per_place: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.ids or len(self.ids) % self.k or (not self.per_place and len(self.ids) != self.k):
            raise ValueError(f"{len(self.ids)} ids do not make k={self.k} of them after each document")
        return self


class LayoutFile(BaseModel):
    """The file's keys; unknown ones are refused. All may be left out: then documents stand, as plain text, at the
    start of the last user turn, and there are no link tokens. ``preset`` names the layout of a published checkpoint;
    the other keys override it. ``long_context`` makes a model of RoPE type "longrope" use its long factors for every
    prompt, short ones too: documents are then exact beyond the original context. ``soft_wrap`` names the file, in the
    same directory, that holds trained embeddings around every document (``models/soft_wrap.py``).
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    name: str | None = None
    preset: str | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    documents_in: DocumentsIn = "user"
    document_template: str = DocumentTemplate().untitled
    titled_document_template: str = DocumentTemplate().titled
    mem_start: tuple[int, ...] = ()
    mem_end: tuple[int, ...] = ()
    link_tokens: _LinkTokensEntry | None = None
    default_linker: str | None = None
    long_context: bool = False
    soft_wrap: Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, keys: Any) -> Any:
        name = keys.get("preset") if isinstance(keys, dict) else None
        if not isinstance(name, str):
            return keys
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return {**PRESETS[name], **keys}

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids that the file names."""
        return (*self.mem_start, *self.mem_end, *(self.link_tokens.ids if self.link_tokens else ()))

    @property
    def linker(self) -> str:
        """The linker that suits the model: the one it names, else the one it was trained for."""
        trained_for = "soft-wrap" if self.soft_wrap else "link-tokens" if self.link_tokens else "reposition"
        return self.default_linker or trained_for


def read_layout_file(directory: Path) -> LayoutFile:
    """Read ``kvlink.json``; all defaults where there is none.

    Raises:
        ConfigError: not JSON, or keys and values that are not those of ``LayoutFile``.
    """
    path = directory / "kvlink.json"
    if not path.is_file():
        return LayoutFile()
    try:
        return LayoutFile.model_validate_json(path.read_text("utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", "; ")
        raise ConfigError(f"{str(path)!r} is not a valid kvlink.json: {reason}") from error


def read_layout(directory: Path, file: LayoutFile) -> PromptLayout:
    """The tokenizer of a directory and the layout that ``file`` describes.

    Raises:
        ModelNotFoundError: there is no fast tokenizer.
        ConfigError: a document template lacks a field or has an unknown one; the soft wrap is missing or is none.
        ModelError: the tokenizer or the soft wrap cannot be loaded, or the chat template cannot hold documents as
            ``file`` says.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{str(directory)!r} has no tokenizer.json; KVLink needs a fast tokenizer.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # what damaged files give
        raise ModelError(f"cannot load the tokenizer of {str(directory)!r}: {first_line(error)}") from error
    links = file.link_tokens
    layout = PromptLayout(
        tokenizer,
        chat_template=file.chat_template,
        documents_in=file.documents_in,
        template=DocumentTemplate(file.document_template, file.titled_document_template),
        mem_start=file.mem_start,
        mem_end=file.mem_end,
        link_tokens=LinkTokens(links.ids, links.k, links.per_place) if links else None,
        wrap=read_soft_wrap(directory, file.soft_wrap).rows if file.soft_wrap else None,
    )
    layout.check()
    return layout


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 of the tokenizer's definition."""
    return hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
