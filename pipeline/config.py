"""The settings of a precompute job: the same keys in YAML and, with dashes, on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from kvlink_core.errors import ConfigError

Name = Annotated[str, StringConstraints(min_length=1)]


class PrecomputeConfig(BaseModel):
    """Settings of one job. Unknown keys are refused, numbers out of range too."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    # What goes in.
    input: Annotated[list[Name], Field(min_length=1)]
    text_column: Name = "text"
    id_column: Name | None = None
    title_column: Name | None = None
    input_options: dict[str, Any] = {}
    bad_files: Literal["fail", "skip"] = "fail"
    # Where it goes.
    store: Name
    namespace: Name = "default"
    codec: Name = "raw"
    storage_options: dict[str, str] = {}
    replace: bool = False
    # How it is computed.
    model: Name = "embedded"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: Name | None = None
    chunk_tokens: Annotated[int, Field(ge=8)] = 512
    places: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_batch_tokens: Annotated[int, Field(ge=1)] = 4096
    shard_mb: Annotated[float, Field(gt=0, le=2**20)] = 256.0
    # On what.
    actors: Annotated[int, Field(ge=1)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    num_cpus: Annotated[float, Field(gt=0)] = 0.25
    threads: Annotated[int, Field(ge=1)] | None = None
    ray_address: str | None = None
    # How it goes on and what it says.
    commit_interval_s: Annotated[float, Field(ge=0)] = 30.0
    no_progress_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    strict: bool = False
    summary_json: str | None = None

    @property
    def encoder_device(self) -> str:
        """The torch device of the actors: as told, else ``cuda`` for those that hold a GPU."""
        return self.device or ("cuda" if self.num_gpus > 0 else "cpu")


def load_config(path: str | None, overrides: Mapping[str, Any]) -> PrecomputeConfig:
    """Read a YAML file, if given, and put what the command line says over it.

    Args:
        path: the YAML file; ``None`` for none.
        overrides: values by key; ``None`` means "not given". Mappings are merged into the file's, key by key.

    Raises:
        ConfigError: an unreadable file, or keys or values that are not those of ``PrecomputeConfig``.
    """
    values = _read_yaml(path) if path is not None else {}
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            values[key] = {**values[key], **value}
        elif value is not None:
            values[key] = value
    if isinstance(values.get("input"), str):
        values["input"] = [values["input"]]
    try:
        return PrecomputeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from error


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path!r}: {error.strerror}.", param="config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path!r} is not YAML: {error}", param="config") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {path!r} must be a mapping of keys to values.", param="config")
    return values


def _explain(error: ValidationError, path: str | None) -> str:
    """All that is wrong, in one line, in the words of the command line."""
    problems = []
    for each in error.errors():
        key = str(each["loc"][0]) if each["loc"] else "configuration"
        option = f"--{key.replace('_', '-')}"
        if each["type"] == "missing":
            problems.append(f"{option} is missing")
        elif each["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}")
        else:
            problems.append(f"{option}: {each['msg']} (got {each['input']!r})")
    known = ""
    if any(e["type"] == "extra_forbidden" for e in error.errors()):
        known = f" Known keys: {', '.join(PrecomputeConfig.model_fields)}."
    return f"{'; '.join(problems)}{f' (in {path!r} or on the command line)' if path else ''}.{known}"
