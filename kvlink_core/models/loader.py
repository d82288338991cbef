"""Load a model for linking: weights, tokenizer, layout, fingerprint, and the handles that capture and RoPE need."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kvlink_core.errors import ConfigError, ModelError, ModelNotFoundError
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.models.capture import install
from kvlink_core.models.rope import Rotary
from kvlink_core.models.shapes import named_shape
from kvlink_core.models.spec import ModelSpec, spec_from_config
from kvlink_core.prompt import DocumentTemplate, LinkTokens, PromptLayout

EMBEDDED = "embedded"
EMBEDDED_DIRECTORY = Path(__file__).parent.parent / "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _LinkTokensFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    k: int
    ids: tuple[int, ...]
    per_place: bool = False


class LayoutFile(BaseModel):
    """``kvlink.json``, beside a model's ``config.json``: how its prompts are laid out. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    name: str | None = None
    documents_in: str = "user"
    document_template: str = DocumentTemplate().untitled
    titled_document_template: str = DocumentTemplate().titled
    mem_start: tuple[int, ...] = ()
    mem_end: tuple[int, ...] = ()
    link_tokens: _LinkTokensFile | None = None
    default_linker: str | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to encode, link and generate. Shared by threads; its weights are never changed.

    Attributes:
        name: public model id.
        network: the Hugging Face causal language model, in evaluation mode.
        spec: shape and attention.
        rotary: re-positions keys.
        layout: lays prompts out.
        fingerprint: what caches made with this model depend on.
        default_linker: the linker that suits the model: ``link-tokens`` when it was trained with them.
        stop_ids: token ids that end an answer.
    """

    name: str
    network: Any
    spec: ModelSpec
    rotary: Rotary
    layout: PromptLayout
    fingerprint: Fingerprint
    default_linker: str
    stop_ids: frozenset[int]

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return self.spec.context_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.network.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and caches."""
        return self.network.dtype  # type: ignore[no-any-return]


def load_model(source: str = EMBEDDED, *, device: str = "cpu", dtype: str | None = None) -> LoadedModel:
    """Load a model.

    Args:
        source: ``embedded`` (the small model that ships), a Hugging Face directory, or ``random:NAME`` for a named
            shape with random weights (see ``kvlink_core.models.shapes``), of use for measuring speed only.
        device: a torch device.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the default is float32 on CPU and the checkpoint's own
            elsewhere.

    Raises:
        ModelNotFoundError: no such directory, or it lacks a file.
        UnsupportedModelError: the architecture does not link exactly.
        ConfigError: an unknown dtype, device or key of ``kvlink.json``.
        ModelError: the files are there and cannot be loaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.", param="dtype")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # torch has no class of its own for this
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if source.startswith("random:"):
        shape = named_shape(source.removeprefix("random:"))
        torch.manual_seed(0)
        config = shape.config
        spec = spec_from_config(config)
        network = AutoModelForCausalLM.from_config(
            config, attn_implementation=spec.attention, dtype=DTYPES[dtype or "float32"]
        )
        directory, weights = EMBEDDED_DIRECTORY, "random:0"
        layout_file = _layout_file(directory).model_copy(update={"name": source, "default_linker": None})
    else:
        directory = EMBEDDED_DIRECTORY if source == EMBEDDED else Path(source)
        config, network, spec = _load_directory(directory, where, dtype)
        weights = weights_digest(directory)
        layout_file = _layout_file(directory)
    network = network.to(where).eval().requires_grad_(False)
    layout, tokenizer, tokenizer_hash = _layout(directory, layout_file)
    name = layout_file.name or directory.resolve().name
    decoder = network.get_decoder()
    original_apply = install(decoder.layers[0].self_attn)
    end = network.generation_config.eos_token_id
    stop_ids = {end} if isinstance(end, int) else set(end or ())
    if tokenizer.eos_token_id is not None:
        stop_ids.add(int(tokenizer.eos_token_id))
    return LoadedModel(
        name=name,
        network=network,
        spec=spec,
        rotary=Rotary(decoder.rotary_emb, original_apply),
        layout=layout,
        fingerprint=Fingerprint(
            model=f"{spec.model_type}-{spec.layers}x{config.hidden_size}",
            weights=weights,
            tokenizer=tokenizer_hash,
            rope=json.dumps(config.rope_parameters, sort_keys=True),
            dtype=str(network.dtype).removeprefix("torch."),
            template=layout.template.to_json(),
        ),
        default_linker=layout_file.default_linker or ("link-tokens" if layout.link_tokens else "reposition"),
        stop_ids=frozenset(stop_ids),
    )


def _load_directory(directory: Path, device: torch.device, dtype: str | None) -> tuple[Any, Any, ModelSpec]:
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            f"no model at {str(directory)!r}: it has no config.json. Give a Hugging Face directory, or 'embedded'.",
            param="model",
        )
    if not any(directory.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"{str(directory)!r} has no .safetensors file; convert its weights (pickled weights are not read).",
            param="model",
        )
    transformers_logging.disable_progress_bar()  # it writes over ours, and into the logs of every replica
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        spec = spec_from_config(config)
        chosen = DTYPES[dtype] if dtype else (torch.float32 if device.type == "cpu" else "auto")
        network, report = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=spec.attention,
            dtype=chosen,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:  # what damaged files give
        raise ModelError(f"cannot load the model at {str(directory)!r}: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        # transformers would fill these with random numbers and only log it.
        raise ModelError(
            f"the weights at {str(directory)!r} lack {len(report['missing_keys'])} tensors, "
            f"{sorted(report['missing_keys'])[0]!r} among them; the download or the export is incomplete."
        )
    return config, network, spec


def _layout_file(directory: Path) -> LayoutFile:
    path = directory / "kvlink.json"
    if not path.is_file():
        return LayoutFile()
    try:
        return LayoutFile.model_validate_json(path.read_text("utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", "; ")
        raise ConfigError(f"{str(path)!r} is not a valid kvlink.json: {reason}") from error


def _layout(directory: Path, file: LayoutFile) -> tuple[PromptLayout, Any, str]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{str(directory)!r} has no tokenizer.json; KVLink needs a fast tokenizer.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot load the tokenizer of {str(directory)!r}: {error}") from error
    if file.documents_in not in ("user", "system"):
        raise ConfigError(f"documents_in must be 'user' or 'system', not {file.documents_in!r}.")
    links = file.link_tokens
    layout = PromptLayout(
        tokenizer,
        documents_in="system" if file.documents_in == "system" else "user",
        template=DocumentTemplate(file.document_template, file.titled_document_template),
        mem_start=file.mem_start,
        mem_end=file.mem_end,
        link_tokens=LinkTokens(links.ids, links.k, links.per_place) if links else None,
    )
    return layout, tokenizer, hashlib.sha256(path.read_bytes()).hexdigest()


def weights_digest(directory: Path) -> str:
    """SHA-256 over all safetensors files of a directory, in name order, streamed."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
