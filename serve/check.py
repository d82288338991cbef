"""``python -m serve.check FILE``: whether a Serve configuration file would start, in seconds and in one line.

``serve run FILE`` builds the application inside the cluster: a fault shows up in its log, after three attempts, and
the command keeps waiting. Serve also ignores keys of its own that are misspelled. Both are caught here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from kvlink_core.errors import ConfigError, KVLinkError
from serve.binding import check_binding, check_tls, with_haproxy
from serve.config import ServiceConfig
from serve.loading import check

IMPORT_PATH = "serve.app:build_app"
HINT = (
    "Hint: export RAY_SERVE_ENABLE_HA_PROXY=1 before Serve starts, and first tokens come sooner; "
    "serve/README.md, `What HTTP adds`, says by how much, and what else it changes."
)


def check_file(path: Path) -> None:
    """Check a configuration file as far as it can be without a cluster.

    Raises:
        KVLinkError: naming the first fault.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date that is none
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from error
    _known(content, ServeDeploySchema, "the file")
    _known(content.get("http_options", {}), HTTPOptionsSchema, "http_options")
    _known(content.get("logging_config", {}), LoggingConfig, "logging_config")
    if "host" not in content.get("http_options", {}):
        raise ConfigError("http_options.host is missing, and Serve would listen on 0.0.0.0; give 127.0.0.1.")
    applications = content.get("applications")
    if not isinstance(applications, list) or not applications:
        raise ConfigError("applications must be a list of at least one application.")
    for application in applications:
        _known(application, ServeApplicationSchema, "an application")
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"]) or "the file"
        raise ConfigError(f"{place}: {fault['msg']}") from error
    check_tls(content["http_options"].get("ssl_keyfile"))
    for application in applications:
        if application["import_path"] == IMPORT_PATH:
            config = ServiceConfig.model_validate(application.get("args", {})).absolute()
            check(config)
            check_binding(config, content["http_options"]["host"])


def _known(content: Any, schema: Any, where: str) -> None:
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping, not {'empty' if content is None else type(content).__name__}.")
    unknown = sorted(set(content) - set(schema.model_fields), key=str)
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r} in {where}; Serve knows {', '.join(schema.model_fields)}.")


def main() -> None:
    """Exit with 0, or with 2 after one line on standard error."""
    try:
        if len(sys.argv) != 2:
            raise ConfigError("usage: python -m serve.check FILE")
        check_file(Path(sys.argv[1]))
    except KVLinkError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    print("ok")
    if not with_haproxy():
        print(HINT, file=sys.stderr)


if __name__ == "__main__":
    main()
