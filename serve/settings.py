"""Settings of the deployments beside the engine. What they mean together is ``serve.config``'s."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Unknown keys are refused, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class IngressSettings(Settings):
    """The HTTP side."""

    num_cpus: float = Field(default=0.25, ge=0)
    replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=256, ge=1)
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    max_documents: int = Field(default=64, ge=1, description="documents of one request")
    max_document_bytes: int = Field(default=2**20, ge=1, description="UTF-8 of one document's text")
    max_messages: int = Field(default=256, ge=1)
    # An answer holds memory for as long as it takes, so its length must not be the client's to choose.
    max_tokens: int = Field(default=4096, ge=1, description="longest answer that a request may ask for")
    max_ongoing_per_key: int = Field(
        default=64, ge=1, description="requests of one key at a time, in each ingress replica; more get 429"
    )
    request_timeout_s: float = Field(default=300.0, gt=0, description="a request that is not answered by then is ended")
    cors_origins: tuple[str, ...] = Field(
        default=(), description="origins whose pages may call the API; none: only the service's own"
    )


class RouterSettings(Settings):
    """Which engine replica gets a request; serve/router.py says how."""

    load_factor: float = Field(
        default=1.25, ge=1, description="a replica is passed over that has more than this times the mean of requests"
    )


class DocumentSettings(Settings):
    """The documents deployment: adding, listing and deleting documents at run time."""

    num_cpus: float = Field(default=0.1, ge=0)
    max_pending_bytes: int = Field(
        default=256 * 2**20, ge=1024, description="UTF-8 of all texts that wait to be stored; more get 503"
    )
    give_up_after_s: float = Field(
        default=3600.0, ge=0, description="how long engine or store may be away before what waits for them fails"
    )
    max_jobs: int = Field(default=1000, ge=1, description="finished jobs that are kept of a namespace, the newest")
    job_days: float = Field(default=7.0, gt=0, description="how long finished jobs are kept")


class TracingSettings(Settings):
    """OpenTelemetry traces; needs the extra `otel`."""

    endpoint: str | None = Field(default=None, description="OTLP over HTTP, e.g. http://collector:4318/v1/traces")
    sample: float = Field(default=1.0, ge=0, le=1, description="share of requests traced that bring no trace context")
