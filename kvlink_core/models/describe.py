"""What a model is, without its weights in memory: enough to tokenize, to plan and to open a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from kvlink_core.errors import ConfigError, ModelError, ModelNotFoundError
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.models.layout_file import LayoutFile, read_layout, read_layout_file, tokenizer_digest
from kvlink_core.models.shapes import named_shape
from kvlink_core.models.soft_wrap import SoftWrap, read_soft_wrap
from kvlink_core.models.spec import ModelSpec, check_architecture, spec_from_config, with_long_rope
from kvlink_core.prompt import PromptLayout
from kvlink_core.text import first_line

EMBEDDED = "embedded"
EMBEDDED_DIRECTORY = Path(__file__).parent.parent / "embedded"
RANDOM = "random:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The parts of a ``LoadedModel`` that need no weights.

    Attributes:
        name: public model id.
        directory: where its files are; random weights borrow the embedded model's tokenizer and layout.
        config: Hugging Face's configuration.
        spec: shape and attention.
        layout: lays prompts out, tokenizes documents.
        fingerprint: what caches made with this model depend on.
        dtype: dtype of weights and caches.
        default_linker: the linker that suits the model.
        soft_wrap: the trained embeddings around every document, if the model has some.
    """

    name: str
    directory: Path
    config: Any
    spec: ModelSpec
    layout: PromptLayout
    fingerprint: Fingerprint
    dtype: torch.dtype
    default_linker: str
    soft_wrap: SoftWrap | None = None

    @property
    def random(self) -> bool:
        """Whether the weights are random rather than read."""
        return self.fingerprint.weights.startswith(RANDOM)

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return self.spec.context_length

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, uncompressed."""
        spec = self.spec
        return spec.layers * spec.kv_heads * (spec.key_dim + spec.value_dim) * self.dtype.itemsize


def describe_model(source: str, *, device: str = "cpu", dtype: str | None = None) -> ModelDescription:
    """Describe what ``load_model`` loads with the same arguments; the device need not exist here.

    Reads the weights once, as bytes, for their digest.

    Raises:
        ModelNotFoundError, UnsupportedModelError, ConfigError, ModelError: as ``load_model``.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.", param="dtype")
    directory = _directory(source)
    if source.startswith(RANDOM):
        # Another kind of device draws other numbers from the same seed.
        config, weights = named_shape(source.removeprefix(RANDOM)), f"{RANDOM}0" + f"@{device}" * (device != "cpu")
        raw = config.to_diff_dict()
        chosen = DTYPES[dtype or ("float32" if device == "cpu" else "bfloat16")]
        file = read_layout_file(directory).model_copy(update={"name": source, "default_linker": None})
    else:
        file = read_layout_file(directory)
        config = _config(directory, file)
        raw = json.loads((directory / "config.json").read_bytes())
        chosen = DTYPES[dtype] if dtype else _default_dtype(config, device, directory)
        weights = ""
    check_architecture(config.model_type)
    rope = {k: v for k, v in raw.items() if "rope" in k or "rotary" in k}
    if file.long_context:
        config, rope["long_context"] = with_long_rope(config), True
    spec = spec_from_config(config)
    if out := [i for i in file.token_ids if not 0 <= i < spec.vocab_size]:
        raise ConfigError(f"kvlink.json names token {out[0]}, and the model's vocabulary has {spec.vocab_size}.")
    layout = read_layout(directory, file)
    soft_wrap = read_soft_wrap(directory, file.soft_wrap) if file.soft_wrap else None
    return ModelDescription(
        name=file.name or directory.resolve().name,
        directory=directory,
        config=config,
        spec=spec,
        layout=layout,
        fingerprint=Fingerprint(
            model=f"{spec.model_type}-{spec.layers}x{config.get_text_config(decoder=True).hidden_size}-{architecture_digest(raw)[:16]}",
            weights=weights or weights_digest(weight_files(directory, file)),
            tokenizer=tokenizer_digest(directory),
            rope=json.dumps(rope, sort_keys=True),
            dtype=str(chosen).removeprefix("torch."),
            template=layout.template.to_json(),
            wrap=soft_wrap.digest if soft_wrap else "",
        ),
        dtype=chosen,
        default_linker=file.linker,
        soft_wrap=soft_wrap,
    )


def load_layout(source: str) -> PromptLayout:
    """The prompt layout (and so the tokenizer) of a model alone; reads no weights.

    Raises:
        ModelNotFoundError, ConfigError, ModelError: as ``load_model``.
    """
    directory = _directory(source)
    file: LayoutFile = read_layout_file(directory)
    return read_layout(directory, file)


#: Keys of ``config.json`` that change no key or value, or are in the fingerprint under a name of their own.
_NOT_ARCHITECTURE = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def architecture_digest(config: dict[str, Any]) -> str:
    """SHA-256 over a ``config.json``: the same weights with another norm, window or activation are another model.

    The file as it is, not what a version of transformers makes of it: upgrading must not orphan a store.
    """
    kept = {k: v for k, v in config.items() if k not in _NOT_ARCHITECTURE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def weight_files(directory: Path, file: LayoutFile) -> list[Path]:
    """The safetensors files of a directory that hold the model's weights, in name order."""
    return sorted(path for path in directory.glob("*.safetensors") if path.name != file.soft_wrap)


def weights_digest(files: Sequence[Path]) -> str:
    """SHA-256 over files and their names, in the order given, streamed."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _directory(source: str) -> Path:
    return EMBEDDED_DIRECTORY if source == EMBEDDED or source.startswith(RANDOM) else Path(source)


def _config(directory: Path, file: LayoutFile) -> Any:
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            f"no model at {str(directory)!r}: it has no config.json. Give a Hugging Face directory, or 'embedded'.",
            param="model",
        )
    if (directory / "adapter_config.json").is_file():
        # transformers loads it where peft is installed and ignores it elsewhere: one directory, two models.
        raise ConfigError(
            f"{str(directory)!r} has an adapter beside the model; merge it into the weights and remove "
            "adapter_config.json.",
            param="model",
        )
    if not weight_files(directory, file):
        raise ModelNotFoundError(
            f"{str(directory)!r} has no .safetensors file; convert its weights (pickled weights are not read).",
            param="model",
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:  # what damaged files give
        raise ModelError(f"cannot load the model at {str(directory)!r}: {first_line(error)}") from error


def _default_dtype(config: Any, device: str, directory: Path) -> torch.dtype:
    """float32 on CPU, where it is fastest and exact; elsewhere what the checkpoint was saved in."""
    if device == "cpu":
        return torch.float32
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    raise ConfigError(f"the model at {str(directory)!r} does not say its dtype; give one.", param="dtype")
