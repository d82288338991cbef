"""Builds the application: ``serve run serve.app:build_app store=... model=...``, or from YAML with the same names.

No ``from __future__ import annotations`` here: Serve looks at the annotation of ``build_app`` itself to know that the
arguments are a ``ServiceConfig``, and a string would make it pass a plain dictionary.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from kvlink_core.compress import codec_spec, get_codec
from kvlink_core.errors import KVLinkError
from serve import logs
from serve.binding import check_binding, check_tls, serve_host, serve_keyfile
from serve.client import RayDocuments, RayEngine
from serve.config import ServiceConfig, StartupError
from serve.documents import DocumentService
from serve.http_metrics import PrometheusHttpMetrics
from serve.ingress import create_app
from serve.keys import KeyRing
from serve.loading import check, open_keeper
from serve.router import DocumentRouter
from serve.server import EngineReplica

ENGINE = "engine"
DOCUMENTS = "documents"
INGRESS = "ingress"

#: How Serve runs the replicas of the request path: they talk gRPC instead of Ray's object store, and no threads stand
#: between, which do nothing but pass messages on. Ours alone: it reads these in each replica's process.
FAST_PATH = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


def build_app(config: ServiceConfig) -> Application:
    """The ingress over the engine and the documents, as a Serve application.

    Raises:
        StartupError: what is configured cannot work; one line that says why.
    """
    config = config.absolute()
    try:
        # `serve run` can exit with a plain error only until something is deployed.
        check(config)
        check_binding(config, serve_host())
        check_tls(serve_keyfile())
    except KVLinkError as error:
        raise StartupError(str(error)) from None
    engine, autoscaling = config.engine, config.engine.autoscaling
    replica = serve.deployment(
        EngineReplica,
        name=ENGINE,
        ray_actor_options={"num_cpus": engine.num_cpus, "num_gpus": engine.num_gpus, **_environment(config)},
        # Those beyond what the engine computes wait in it: their documents are fetched from here on.
        max_ongoing_requests=engine.max_running + engine.max_ahead,
        max_queued_requests=engine.max_waiting,
        autoscaling_config=autoscaling.model_dump(),
        graceful_shutdown_timeout_s=engine.shutdown_timeout_s,
        # As a class: a path in YAML would be imported by the command line and the dashboard too.
        request_router_config=RequestRouterConfig(
            request_router_class=DocumentRouter, request_router_kwargs=config.router.model_dump()
        ),
    )
    documents = serve.deployment(
        DocumentsReplica,
        name=DOCUMENTS,
        num_replicas=1,
        ray_actor_options={"num_cpus": config.documents.num_cpus},
        max_ongoing_requests=256,
        graceful_shutdown_timeout_s=engine.shutdown_timeout_s,
    )
    ingress = serve.deployment(
        serve.ingress(_ingress_builder(config))(),
        name=INGRESS,
        num_replicas=config.ingress.replicas,
        ray_actor_options={"num_cpus": config.ingress.num_cpus, **_environment(config)},
        max_ongoing_requests=config.ingress.max_ongoing_requests,
        graceful_shutdown_timeout_s=engine.shutdown_timeout_s,
    )
    bound = replica.bind(config.model_dump())
    if config.store is None:
        return ingress.bind(bound)
    return ingress.bind(bound, documents.bind(config.model_dump()))


def _environment(config: ServiceConfig) -> dict[str, Any]:
    """Options of an actor on the request path. What whoever starts the service has set is left as it is."""
    if not config.fast_path:
        return {}
    return {"runtime_env": {"env_vars": {name: os.environ.get(name, value) for name, value in FAST_PATH.items()}}}


class DocumentsReplica(DocumentService):
    """The deployment: ``DocumentService`` over the store and the engine deployment.

    Args:
        config: the service's settings, as ``ServiceConfig`` dumps them.
    """

    def __init__(self, config: dict[str, object]) -> None:
        settings = ServiceConfig.model_validate(config)
        logs.install()
        retry_after_s = settings.engine.retry_after_s
        super().__init__(
            RayEngine(serve.get_deployment_handle(ENGINE), retry_after_s=retry_after_s),
            lambda: open_keeper(settings),
            settings.documents,
            codec=codec_spec(get_codec(settings.codec)),
        )
        self.start()


def _ingress_builder(config: ServiceConfig) -> Callable[[], FastAPI]:
    """Builds the HTTP application inside the ingress replica, where the engine's handle can be had."""

    def build() -> FastAPI:
        # Again, where Serve's own word on it can be had.
        check_binding(config, serve_host())
        check_tls(serve_keyfile())
        logs.install()
        wait = config.engine.retry_after_s
        return create_app(
            RayEngine(serve.get_deployment_handle(ENGINE), retry_after_s=wait),
            config.ingress,
            config.sampling,
            documents=RayDocuments(serve.get_deployment_handle(DOCUMENTS), retry_after_s=wait)
            if config.store
            else None,
            keys=KeyRing(Path(config.keys)) if config.keys else None,
            namespace=config.namespace,
            metrics=PrometheusHttpMetrics(),
            echo_ids=False,
        )

    return build
