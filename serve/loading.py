"""From settings to sessions of the core: the model, and the store opened with its fingerprint."""

from __future__ import annotations

import time
from pathlib import Path

from kvlink_core.engine import EngineSettings
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.linking import get_linker, linker_names
from kvlink_core.models import LoadedModel
from kvlink_core.models.describe import describe_model
from kvlink_core.session import Session
from kvlink_core.store import DocumentStore
from kvlink_core.store.lifecycle import StoreKeeper
from kvlink_core.store.resolver import shared_tiers
from serve.config import ServiceConfig
from serve.keys import read_keys
from serve.namespaces import Namespaces, Opened
from serve.payloads import PayloadsOfStores
from serve.wire import ModelCard


def check(settings: ServiceConfig) -> None:
    """Everything about these settings that can be refused without loading the model.

    Raises:
        KVLinkError: an unknown linker; with ``settings.check`` also a missing model or store, or a store that holds
            caches of another model, or a keys file that cannot be used.
    """
    if settings.keys is not None and settings.check:
        read_keys(Path(settings.keys))
    if settings.linker is not None:
        get_linker(settings.linker)
    if settings.check:
        model = describe_model(settings.model, device=settings.device, dtype=settings.dtype)
        open_store(settings, model.fingerprint)


def open_store(settings: ServiceConfig, fingerprint: Fingerprint, namespace: str | None = None) -> DocumentStore | None:
    """The store, if one is configured, in a namespace or that of the settings.

    Raises:
        StoreError: it does not exist, does not answer, or holds caches of another model.
    """
    if settings.store is None:
        return None
    return DocumentStore.open(
        settings.store,
        fingerprint=fingerprint,
        namespace=namespace or settings.namespace,
        codec=settings.codec,
        storage_options=settings.storage_options or None,
    )


def open_keeper(settings: ServiceConfig) -> StoreKeeper:
    """The store as the documents deployment sees it: all namespaces. Raises ``StoreError``."""
    assert settings.store is not None
    return StoreKeeper.open(settings.store, storage_options=settings.storage_options or None)


def open_namespaces(settings: ServiceConfig, model: LoadedModel) -> Namespaces:
    """The namespaces of a replica. Where there are no keys its only one is opened now, to see that it can be.

    Raises:
        KVLinkError: as ``open_store``.
    """

    payloads = PayloadsOfStores()
    sizes = settings.tiers.settings()
    # One for all namespaces, or each would take as much memory as the replica is told to.
    tiers = None if sizes is None else shared_tiers(model, sizes, payloads)

    def open_one(namespace: str) -> Opened:
        store = open_store(settings, model.fingerprint, namespace)
        payloads.add(store)
        return Opened(Session(model, store, tiers), store, close=lambda: payloads.drop(store))

    namespaces = Namespaces(open_one, most=settings.engine.max_namespaces)
    with namespaces.use(settings.namespace) as opened:
        if settings.tiers.recompute == "auto":
            opened.session.calibrate()
        return namespaces


def engine_settings(settings: ServiceConfig) -> EngineSettings:
    """What the engine of a replica takes on."""
    engine = settings.engine
    return EngineSettings(
        kv_bytes=engine.kv_bytes,
        max_running=engine.max_running,
        step_tokens=engine.step_tokens,
        stretch=engine.step_stretch,
    )


def model_card(model: LoadedModel, settings: ServiceConfig) -> ModelCard:
    """What is served."""
    return ModelCard(
        id=model.name,
        created=int(time.time()),
        context_length=model.context_length,
        fingerprint=model.fingerprint.digest,
        linkers=linker_names(),
        default_linker=settings.linker or model.default_linker,
        by_place=model.layout.template.by_place,
    )
