"""Builds the application: ``serve run serve.app:build_app store=... model=...``, or from YAML with the same names.

No ``from __future__ import annotations`` here: Serve looks at the annotation of ``build_app`` itself to know that the
arguments are a ``ServiceConfig``, and a string would make it pass a plain dictionary.
"""

from collections.abc import Callable

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from kvlink_core.errors import KVLinkError
from serve.client import RayEngine
from serve.config import ServiceConfig, StartupError
from serve.ingress import create_app
from serve.loading import check
from serve.server import EngineReplica

ENGINE = "engine"
INGRESS = "ingress"


def build_app(config: ServiceConfig) -> Application:
    """The ingress over the engine, as a Serve application.

    Raises:
        StartupError: what is configured cannot work; one line that says why.
    """
    config = config.absolute()
    try:
        # `serve run` can exit with a plain error only until something is deployed.
        check(config)
    except KVLinkError as error:
        raise StartupError(str(error)) from None
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


def _ingress_builder(config: ServiceConfig) -> Callable[[], FastAPI]:
    """Builds the HTTP application inside the ingress replica, where the engine's handle can be had."""

    def build() -> FastAPI:
        engine = RayEngine(serve.get_deployment_handle(ENGINE), retry_after_s=config.engine.retry_after_s)
        return create_app(engine, config.ingress, config.sampling)

    return build
