"""Builds the application: ``serve run serve.app:build_app store=... model=...``, or from YAML with the same names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from kvlink_core.errors import KVLinkError
from kvlink_core.linking import get_linker
from kvlink_core.models.loader import EMBEDDED, EMBEDDED_DIRECTORY
from kvlink_core.store import DocumentStore
from serve.client import RayEngine
from serve.config import ServiceConfig, StartupError
from serve.ingress import create_app
from serve.server import EngineReplica, open_session

ENGINE = "engine"
INGRESS = "ingress"

#: Up to this size a model is loaded once more, for the check before deployment.
SMALL_MODEL_BYTES = 128 * 2**20


def build_app(config: ServiceConfig) -> Application:
    """The ingress over the engine, as a Serve application.

    Raises:
        StartupError: what is configured cannot work; one line that says why.
    """
    config = config.absolute()
    check(config)
    engine, autoscaling = config.engine, config.engine.autoscaling
    replica = serve.deployment(
        EngineReplica,
        name=ENGINE,
        ray_actor_options={"num_cpus": engine.num_cpus, "num_gpus": engine.num_gpus},
        max_ongoing_requests=engine.max_running,
        max_queued_requests=engine.max_waiting,
        autoscaling_config=autoscaling.model_dump(),
        graceful_shutdown_timeout_s=engine.shutdown_timeout_s,
    )
    ingress = serve.deployment(
        serve.ingress(_ingress_builder(config))(),
        name=INGRESS,
        num_replicas=config.ingress.replicas,
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        max_ongoing_requests=config.ingress.max_ongoing_requests,
        graceful_shutdown_timeout_s=engine.shutdown_timeout_s,
    )
    return ingress.bind(replica.bind(config.model_dump()))


def check(config: ServiceConfig) -> None:
    """Refuse before anything is deployed: ``serve run`` can only exit with a plain error until then.

    The fingerprint is compared here when the model is small enough to be loaded for that alone; each replica compares
    it in any case.

    Raises:
        StartupError: an unknown linker; with ``config.check``, a missing model or store, or one that does not fit.
    """
    try:
        if config.linker is not None:
            get_linker(config.linker)
        if not config.check:
            return
        if config.device == "cpu" and _is_small(config.model):
            open_session(config)
        elif config.store is not None:
            options = config.storage_options or None
            DocumentStore.open(config.store, namespace=config.namespace, storage_options=options)
    except KVLinkError as error:
        raise StartupError(str(error)) from None


def _is_small(model: str) -> bool:
    if model.startswith("random:"):
        return False
    directory = EMBEDDED_DIRECTORY if model == EMBEDDED else Path(model)
    return sum(f.stat().st_size for f in directory.glob("*.safetensors")) <= SMALL_MODEL_BYTES


def _ingress_builder(config: ServiceConfig) -> Callable[[], FastAPI]:
    """Builds the HTTP application inside the ingress replica, where the engine's handle can be had."""

    def build() -> FastAPI:
        engine = RayEngine(serve.get_deployment_handle(ENGINE), retry_after_s=config.engine.retry_after_s)
        return create_app(engine, config.ingress, config.sampling)

    return build
