"""Settings of the service. Unknown keys are refused, with one line that names them.

From a command line they are strings with dotted names (``engine.num_cpus=2``), from YAML nested mappings.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import click
from pydantic import (
    BaseModel,
    ByteSize,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from kvlink_core.errors import ConfigError
from serve.settings import DocumentSettings, IngressSettings, RouterSettings, TracingSettings
from serve.settings import Settings as _Settings

__all__ = ["IngressSettings", "SamplingDefaults", "ServiceConfig", "StartupError"]

if TYPE_CHECKING:
    from kvlink_core.store.tiers import TierSettings

#: Where the store is when the settings do not say: the same configuration then runs on a laptop and on a cluster.
STORE_VARIABLE = "KVLINK_STORE"

#: Where the keys are when the settings do not say: a secret is mounted where the platform puts it.
KEYS_VARIABLE = "KVLINK_KEYS"


class StartupError(ConfigError, click.ClickException):
    """The service cannot start as configured.

    A ``ClickException`` too, so that ``serve run`` prints its one line and exits with 2, without a traceback.
    """

    exit_code = 2


class AutoscalingSettings(_Settings):
    """How many engine replicas; the reasoning for each value is in ``configs/cluster.yaml``."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=4.0, gt=0)
    look_back_period_s: float = Field(default=30.0, gt=10, description="more than Serve's metrics interval, 10 s")
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is larger than max_replicas ({self.max_replicas})")
        return self


class EngineSettings(_Settings):
    """One engine replica: what it reserves and how much it takes on."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    torch_threads: int | None = Field(default=None, ge=1, description="threads of torch; default: num_cpus, at least 1")
    max_running: int = Field(default=8, ge=1, description="requests that generate at the same time in one replica")
    max_ahead: int = Field(
        default=4, ge=0, description="further ones that it takes, to fetch their documents while they wait their turn"
    )
    kv_bytes: int | None = Field(
        default=None,
        ge=2**20,
        description="memory for keys and values; default: 1 GiB on a CPU, 80 % of what is free on a GPU",
    )
    step_tokens: int = Field(default=512, ge=1, description="most tokens of one step: bounds what it takes")
    step_stretch: float = Field(
        default=2.0, ge=1, description="a step that prefills takes at most this many times one that only decodes"
    )
    # Serve counts a request as waiting until it is assigned: a burst larger than this is refused even by idle replicas.
    max_waiting: int = Field(default=32, ge=1, description="requests that wait for a replica; more get 503")
    retry_after_s: float = Field(default=1.0, ge=0, description="what a refused client is told to wait")
    max_namespaces: int = Field(default=64, ge=1, description="namespaces that one replica holds open")
    chunk_tokens: int = Field(default=512, ge=16, description="longer documents that are added are cut, as precompute")
    places: int = Field(
        default=10,
        ge=1,
        description="places of a prompt to store for, where the model's template names them",
    )
    stuck_after_s: float = Field(
        default=120.0, gt=0, description="a step running longer than this is a failed health check"
    )
    shutdown_timeout_s: float = Field(
        default=30.0, ge=0, description="how long a stopping replica finishes its requests"
    )
    autoscaling: AutoscalingSettings = AutoscalingSettings()


class SamplingDefaults(_Settings):
    """What a request gets that does not say."""

    temperature: float = Field(default=0.0, ge=0, le=2, description="0 is greedy: the same question, the same answer")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=128, ge=1)


class TierConfig(_Settings):
    """Where each engine replica keeps caches between requests. Sizes as in ``2GiB``; reasons in ``configs/``."""

    enabled: bool = Field(default=True, description="false: keep nothing, load everything from the store")
    device_bytes: ByteSize = Field(default=ByteSize(0), description="GPU memory; needs device=cuda")
    host_bytes: ByteSize = Field(default=ByteSize(2**30), description="host memory; pinned with device=cuda")
    disk_bytes: ByteSize = Field(default=ByteSize(0), description="local disk, for copies of a remote store")
    disk_path: str | None = Field(default=None, min_length=1, description="a local directory for them")
    threads: int = Field(default=4, ge=1, le=16, description="reads of the store at the same time")
    timeout_s: float = Field(default=10.0, gt=0, description="a store that takes longer to answer has failed")
    failures: int = Field(default=3, ge=1, description="failures in a row after which the store is left alone...")
    retry_after_s: float = Field(default=5.0, ge=0, description="...for so long; doubled with each failed trial")
    recompute: Literal["auto", "never"] = Field(
        default="auto", description="auto: compute a document where that is faster than loading it"
    )
    probe_every_s: float = Field(default=10.0, ge=0, description="how often the slower way is tried again")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if bool(self.disk_bytes) != (self.disk_path is not None):
            raise ValueError("the disk tier needs both disk_path and disk_bytes")
        return self

    def settings(self) -> TierSettings | None:
        """For the core; ``None`` if there are to be no tiers."""
        # Here, because the ingress reads settings too, and has no need of torch.
        from kvlink_core.store.tiers import TierSettings

        if not self.enabled:
            return None
        values: dict[str, Any] = self.model_dump(exclude={"enabled"})
        values |= {name: int(values[name]) for name in ("device_bytes", "host_bytes", "disk_bytes")}
        return TierSettings(**values)


class ServiceConfig(_Settings):
    """Everything that ``serve.app:build_app`` takes."""

    model: str = Field(
        default="embedded", min_length=1, description="embedded, a Hugging Face directory, or random:NAME"
    )
    store: str | None = Field(description="path or URL of the store; null: encode every document in place")
    namespace: str = Field(default="default", min_length=1)
    codec: str = Field(default="raw", min_length=1, description="of the store's caches, as precompute was told")
    storage_options: dict[str, str] = Field(default_factory=dict)
    keys: str | None = Field(default=None, description="file of python -m serve.keys; null: anybody may ask")
    allow_anonymous: bool = Field(default=False, description="listen beyond loopback without keys")
    device: str = "cpu"
    dtype: str | None = None
    check: bool = Field(
        default=True, description="look at model and store before deploying; false where only replicas see them"
    )
    linker: str | None = Field(default=None, description="for requests that name none; default: the model's own")
    fast_path: bool = Field(
        default=True, description="gRPC and no extra threads between ingress and engine; false: as the cluster's Serve"
    )
    sampling: SamplingDefaults = SamplingDefaults()
    tiers: TierConfig = TierConfig()
    engine: EngineSettings = EngineSettings()
    ingress: IngressSettings = IngressSettings()
    router: RouterSettings = RouterSettings()
    documents: DocumentSettings = DocumentSettings()
    tracing: TracingSettings = TracingSettings()

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        if self.sampling.max_tokens > self.ingress.max_tokens:
            raise ValueError(
                f"sampling.max_tokens ({self.sampling.max_tokens}) is larger than "
                f"ingress.max_tokens ({self.ingress.max_tokens})"
            )
        if self.keys is not None and self.allow_anonymous:
            raise ValueError("keys and allow_anonymous exclude each other; give one of them")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _readable(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Expand dotted names, and turn pydantic's report into one line.

        Raises:
            StartupError: a setting is unknown, missing or impossible.
        """
        if isinstance(data, Mapping):
            data = _nested(data)
            for name, variable in (("store", STORE_VARIABLE), ("keys", KEYS_VARIABLE)):
                if name not in data and os.environ.get(variable):
                    data[name] = os.environ[variable]
        try:
            return handler(data)
        except ValidationError as error:
            raise StartupError(_one_line(cls, error)) from None

    def absolute(self) -> ServiceConfig:
        """The same with local paths made absolute: a replica's working directory is not the caller's."""
        changes: dict[str, Any] = {}
        if self.tiers.disk_path is not None:
            path = str(Path(self.tiers.disk_path).expanduser().absolute())
            changes["tiers"] = self.tiers.model_copy(update={"disk_path": path})
        if self.store is not None and "://" not in self.store:
            changes["store"] = str(Path(self.store).expanduser().absolute())
        if self.keys is not None:
            changes["keys"] = str(Path(self.keys).expanduser().absolute())
        model = Path(self.model).expanduser()
        if self.model != "embedded" and not self.model.startswith("random:") and model.exists():
            changes["model"] = str(model.absolute())
        return self.model_copy(update=changes)


def _nested(data: Mapping[str, Any]) -> dict[str, Any]:
    """``{"engine.num_cpus": 2}`` as ``{"engine": {"num_cpus": 2}}``."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        *parents, last = str(key).split(".")
        place = result
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise StartupError(f"setting {key!r}: {parent!r} is given a value of its own as well.")
            place = inner
        place[last] = dict(value) if isinstance(value, Mapping) else value
    return result


def _one_line(model: type[BaseModel], error: ValidationError) -> str:
    """All faults of a configuration in one line."""
    faults = []
    for fault in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _names(model)
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}."
            faults.append(f"unknown setting {name!r}; {hint}")
        elif fault["type"] == "missing":
            faults.append(f"setting {name!r} is missing; give {name}=...")
        else:
            faults.append(f"setting {name!r}: {fault['msg']}" if name else fault["msg"])
    return "configuration: " + "; ".join(faults)


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += _names(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
