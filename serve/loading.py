"""From settings to a session of the core: the model, and the store opened with its fingerprint."""

from __future__ import annotations

import time

from kvlink_core.engine import EngineSettings
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.linking import get_linker, linker_names
from kvlink_core.models import load_model
from kvlink_core.models.describe import describe_model
from kvlink_core.session import Session
from kvlink_core.store import DocumentStore
from serve.config import ServiceConfig
from serve.wire import ModelCard


def check(settings: ServiceConfig) -> None:
    """Everything about these settings that can be refused without loading the model.

    Raises:
        KVLinkError: an unknown linker; with ``settings.check`` also a missing model or store, or a store that holds
            caches of another model.
    """
    if settings.linker is not None:
        get_linker(settings.linker)
    if settings.check:
        model = describe_model(settings.model, device=settings.device, dtype=settings.dtype)
        open_store(settings, model.fingerprint)


def open_store(settings: ServiceConfig, fingerprint: Fingerprint) -> DocumentStore | None:
    """The store, if one is configured.

    Raises:
        StoreError: it does not exist, does not answer, or holds caches of another model.
    """
    if settings.store is None:
        return None
    return DocumentStore.open(
        settings.store,
        fingerprint=fingerprint,
        namespace=settings.namespace,
        codec=settings.codec,
        storage_options=settings.storage_options or None,
    )


def open_session(settings: ServiceConfig) -> Session:
    """Load the model, open the store, and make room for the tiers.

    Raises:
        KVLinkError: as ``check``, and whatever only loading shows.
    """
    model = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    session = Session(model, open_store(settings, model.fingerprint), settings.tiers.settings())
    if settings.tiers.recompute == "auto":
        session.calibrate()
    return session


def engine_settings(settings: ServiceConfig) -> EngineSettings:
    """What the engine of a replica takes on."""
    engine = settings.engine
    return EngineSettings(
        kv_bytes=engine.kv_bytes,
        max_running=engine.max_running,
        step_tokens=engine.step_tokens,
        stretch=engine.step_stretch,
    )


def model_card(session: Session, settings: ServiceConfig) -> ModelCard:
    """What this session serves."""
    model = session.model
    return ModelCard(
        id=model.name,
        created=int(time.time()),
        context_length=model.context_length,
        fingerprint=model.fingerprint.digest,
        linkers=linker_names(),
        default_linker=settings.linker or model.default_linker,
    )
