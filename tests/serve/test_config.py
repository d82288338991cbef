"""Settings: what is refused, and in which words."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvlink_core.errors import KVLinkError
from serve import binding
from serve.binding import check_binding
from serve.check import check_file, main
from serve.config import ServiceConfig, StartupError

CONFIGS = sorted((Path(__file__).parents[2] / "serve" / "configs").glob("*.yaml"))


def test_strings_of_a_command_line_become_numbers_in_their_places() -> None:
    config = ServiceConfig.model_validate(
        {"store": "s3://bucket/caches", "engine.num_cpus": "0.5", "engine.autoscaling.max_replicas": "3"}
    )
    assert config.engine.num_cpus == 0.5
    assert config.engine.autoscaling.max_replicas == 3
    assert config.model == "embedded"


def test_sizes_of_tiers_are_written_as_people_write_them() -> None:
    given = {
        "store": None, "device": "cuda", "tiers.device_bytes": "20GiB", "tiers.host_bytes": "1.5 GiB",
        "tiers.disk_bytes": 2_000_000_000, "tiers.disk_path": "near", "tiers.timeout_s": "2.5",
    }  # fmt: skip
    settings = ServiceConfig.model_validate(given).absolute().tiers.settings()
    assert settings is not None
    assert (settings.device_bytes, settings.host_bytes, settings.disk_bytes) == (20 * 2**30, 3 * 2**29, 2 * 10**9)
    assert settings.disk_path == str(Path("near").absolute())
    assert (settings.timeout_s, settings.recompute) == (2.5, "auto")
    default = ServiceConfig.model_validate({"store": None}).tiers.settings()
    assert default is not None
    assert (default.device_bytes, default.host_bytes, default.disk_bytes) == (0, 2**30, 0)
    assert ServiceConfig.model_validate({"store": None, "tiers.enabled": "false"}).tiers.settings() is None


def test_a_dumped_configuration_is_read_back_the_same() -> None:
    config = ServiceConfig.model_validate({"store": None, "engine": {"torch_threads": 2}})
    assert ServiceConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "setting 'store' is missing"),
        ({"store": "x", "modle": "embedded"}, "unknown setting 'modle'; did you mean 'model'?"),
        ({"store": "x", "engine.num_cpu": "1"}, "unknown setting 'engine.num_cpu'; did you mean 'engine.num_cpus'?"),
        ({"store": "x", "engine": {"autoscaling": {"zzz": 1}}}, "unknown setting 'engine.autoscaling.zzz'; known are"),
        ({"store": "x", "engine.num_cpus": "-1"}, "setting 'engine.num_cpus': Input should be greater"),
        ({"store": "x", "engine.num_cpus": "nan"}, "setting 'engine.num_cpus': Input should be a finite number"),
        ({"store": "x", "engine.autoscaling.min_replicas": "2"}, "min_replicas (2) is larger than max_replicas (1)"),
        ({"store": "x", "keys": "k", "allow_anonymous": "true"}, "keys and allow_anonymous exclude each other"),
        (
            {"store": "x", "ingress.max_tokens": "64"},
            "sampling.max_tokens (128) is larger than ingress.max_tokens (64)",
        ),
        ({"store": "x", "engine": "fast", "engine.num_cpus": "1"}, "'engine' is given a value of its own"),
        ({"store": "x", "sampling.temperature": "3"}, "setting 'sampling.temperature': Input should be less"),
        (
            {"store": "x", "tiers.host_byte": "1GiB"},
            "'tiers.host_byte'; did you mean 'tiers.host_bytes'?",
        ),
        ({"store": "x", "tiers.host_bytes": "a lot"}, "setting 'tiers.host_bytes': could not parse value and unit"),
        ({"store": "x", "tiers.host_bytes": "-1GiB"}, "setting 'tiers.host_bytes'"),
        ({"store": "x", "tiers.disk_bytes": "1GiB"}, "the disk tier needs both disk_path and disk_bytes"),
        ({"store": "x", "tiers.recompute": "maybe"}, "setting 'tiers.recompute': Input should be 'auto' or 'never'"),
        ({"store": "x", "tiers.threads": "0"}, "setting 'tiers.threads': Input should be greater"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(StartupError) as caught:
        ServiceConfig.model_validate(settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_startup_error_survives_the_way_through_ray() -> None:
    error = pickle.loads(pickle.dumps(StartupError("no store there", param="store")))
    assert (str(error), error.param, error.format_message()) == ("no store there", "store", "no store there")


def test_local_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    local = ServiceConfig.model_validate({"store": "caches", "model": "llama"}).absolute()
    assert (local.store, local.model) == (str(tmp_path / "caches"), str(tmp_path / "llama"))
    remote = ServiceConfig.model_validate({"store": "s3://bucket/x", "model": "random:llama-100m"}).absolute()
    assert (remote.store, remote.model) == ("s3://bucket/x", "random:llama-100m")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_are_sound(path: Path, tmp_path: Path) -> None:
    check_file(edited(path, tmp_path, args={"check": False}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"http_option": {}}, "unknown key 'http_option' in the file"),
        ({"http_options": {"host": "127.0.0.1", "prot": 1}}, "unknown key 'prot' in http_options"),
        ({"http_options": {}}, "http_options.host is missing"),
        ({"http_options": None}, "http_options must be a mapping, not empty"),
        ({"http_options": {"host": "127.0.0.1", "port": [1]}}, "http_options.port: Input should be a valid integer"),
        ({"logging_config": [1]}, "logging_config must be a mapping, not list"),
        ({"applications": [{"route": "/"}]}, "unknown key 'route' in an application"),
        ({"applications": None}, "applications must be a list"),
        ({"applications": []}, "applications must be a list"),
        ({"applications": {"name": "kvlink"}}, "applications must be a list"),
        ({"applications": [None]}, "an application must be a mapping, not empty"),
        ({"applications": [["kvlink"]]}, "an application must be a mapping, not list"),
        ({"applications": [{1: 2, "a": 3}]}, "unknown key 1 in an application"),
        ({"applications": [{"name": "kvlink"}]}, "applications.0.import_path: Field required"),
        ({"applications": [{"import_path": "serve.app:build_app", "args": None}]}, "applications.0.args"),
        ({"applications": [{"import_path": "serve.app:build_app", "args": ["x"]}]}, "applications.0.args"),
        ({"args": {"engine": ["x"]}}, "setting 'engine'"),
        ({"args": {"engine": {1: 2}}}, "setting 'engine"),
        ({"args": {"stroe": "x"}}, "unknown setting 'stroe'"),
        ({"args": {"check": False}, "http_options": {"host": "0.0.0.0"}}, "would listen on 0.0.0.0"),
        ({"args": {"keys": "/nonexistent/keys"}}, "cannot read the keys file"),
        ({"args": {"linker": "glue"}}, "unknown linker 'glue'"),
        ({"args": {"store": "/nonexistent/store"}}, "no KVLink store"),
        ({"args": {"model": "/nonexistent/model"}}, "no model at"),
    ],
)
def test_faults_of_a_configuration_file_are_found(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(KVLinkError) as caught:
        check_file(edited(CONFIGS[-1], tmp_path, **changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file must be a mapping, not empty"),
        ("- a list", "the file must be a mapping, not list"),
        ("a: [", "cannot read"),
        ("a: 2024-99-99", "cannot read"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line_and_exit_code_2(
    content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content, "utf-8")
    monkeypatch.setattr("sys.argv", ["serve.check", str(path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")
    assert said in line


def edited(path: Path, tmp_path: Path, *, args: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a configuration file with some keys, or some settings, replaced."""
    content = yaml.safe_load(path.read_text("utf-8")) | changes
    if args:
        content["applications"][0].setdefault("args", {}).update(args)
    copy = tmp_path / "serve.yaml"
    copy.write_text(yaml.safe_dump(content), "utf-8")
    return copy


def test_the_store_comes_from_the_environment_when_the_settings_do_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLINK_STORE", "/from/environment")
    assert ServiceConfig.model_validate({}).store == "/from/environment"
    assert ServiceConfig.model_validate({"store": "/said"}).store == "/said"
    assert ServiceConfig.model_validate({"store": None}).store is None
    monkeypatch.delenv("KVLINK_STORE")
    with pytest.raises(StartupError, match="store"):
        ServiceConfig.model_validate({})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        (None, True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("example.com", False),
    ],
)
def test_beyond_loopback_the_service_wants_keys(host: str | None, loopback: bool) -> None:
    config = ServiceConfig.model_validate({"store": "x"})
    if loopback:
        check_binding(config, host)
    else:
        with pytest.raises(StartupError, match=r"serve\.keys create"):
            check_binding(config, host)
    check_binding(config.model_copy(update={"keys": "k"}), host)
    check_binding(config.model_copy(update={"allow_anonymous": True}), host)


def test_serve_s_own_word_on_the_host_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "DEFAULT_HTTP_HOST", None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert binding.serve_host() == "127.0.0.1"
    monkeypatch.setattr(binding, "DEFAULT_HTTP_HOST", "0.0.0.0")
    assert binding.serve_host() == "0.0.0.0"


def test_a_certificate_that_haproxy_would_not_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"host": "127.0.0.1", "ssl_keyfile": "/k.pem", "ssl_certfile": "/c.pem"}
    path = edited(CONFIGS[-1], tmp_path, args={"check": False}, http_options=options)
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    check_file(path)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(StartupError, match="plain HTTP only") as caught:
        check_file(path)
    assert "\n" not in str(caught.value)
    binding.check_tls(None)


@pytest.mark.parametrize("haproxy", [False, True])
def test_the_check_says_what_makes_first_tokens_faster(
    haproxy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", str(int(haproxy)))
    monkeypatch.setattr("sys.argv", ["serve.check", str(edited(CONFIGS[-1], tmp_path, args={"check": False}))])
    main()
    said = capsys.readouterr()
    assert said.out == "ok\n"
    assert ("RAY_SERVE_ENABLE_HA_PROXY=1" in said.err) is not haproxy
