"""Whether the service may listen as it is told to: beyond loopback only with keys, or if told to do without them."""

from __future__ import annotations

import ipaddress
import os

import ray
from ray.serve._private.constants import DEFAULT_HTTP_HOST
from ray.serve.context import _get_global_client

from serve.config import ServiceConfig, StartupError


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches ``host``. ``None`` is no HTTP at all."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows what it resolves to elsewhere
        return False


def serve_host() -> str | None:
    """Where Serve's proxies listen: those of the Serve that runs, else of one started without a word on it."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is not None:
        host: str | None = client.http_config.host
        return host
    return DEFAULT_HTTP_HOST or "127.0.0.1"


def with_haproxy() -> bool:
    """Whether a Serve that is started with this process's environment takes requests with HAProxy."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def serve_keyfile() -> str | None:
    """The key of the certificate that the Serve that runs was given; ``None`` without TLS, or if none runs."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    keyfile: str | None = None if client is None else client.http_config.ssl_keyfile
    return keyfile


def check_tls(ssl_keyfile: str | None) -> None:
    """Refuse a certificate that would not be used: HAProxy would speak plain HTTP, and reach no replica behind it.

    Raises:
        StartupError: names the remedies.
    """
    if ssl_keyfile is not None and with_haproxy():
        raise StartupError(
            "http_options.ssl_keyfile is set, and Serve's HAProxy speaks plain HTTP only. End TLS in front of it and "
            "drop the option, or start Serve without RAY_SERVE_ENABLE_HA_PROXY=1."
        )


def check_binding(config: ServiceConfig, host: str | None) -> None:
    """Refuse to listen on ``host`` without keys, unless it is loopback or the settings allow it.

    Raises:
        StartupError: names the remedies.
    """
    if config.keys is None and not config.allow_anonymous and not is_loopback(host):
        raise StartupError(
            f"the service would listen on {host}, where others reach it, and has no keys. Make some with "
            "`python -m serve.keys create` and set keys=FILE; or listen on 127.0.0.1; or, behind a gateway that "
            "authenticates, set allow_anonymous=true."
        )
