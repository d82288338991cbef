"""What OpenAPI says is what happens: requests made from it never break the service, and replies are of their schema."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from local_service import local_app, served
from running_service import TEXTS, add_document

from kvlink_core.models import LoadedModel
from kvlink_core.store import DocumentStore

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies deprecate is not ours
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/documents"),
    ("GET", "/v1/documents"),
    ("GET", "/v1/documents/{document_id}"),
    ("DELETE", "/v1/documents/{document_id}"),
    ("GET", "/v1/jobs/{job_id}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/healthz"),
]


@pytest.fixture(scope="module")
def url(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    where = tmp_path_factory.mktemp("openapi") / "store"
    store = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, create=True)
    add_document(tiny_model, store, "harbour", TEXTS["harbour"])
    store.close()
    settings = {"ingress.max_tokens": 4, "sampling.max_tokens": 4}
    with served(local_app(tiny_model, where, **settings)) as address:
        yield address


@pytest.fixture(scope="module")
def schema(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_operation_is_tried(schema: Any) -> None:
    found = [(r.ok().method.upper(), r.ok().path) for r in schema.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
#: Nothing can be wrong with a request that has nothing in it.
EMPTY = {"/healthz", "/v1/models"}


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*each, mode) for each in OPERATIONS for mode in (POSITIVE, NEGATIVE) if mode is POSITIVE or each[1] not in EMPTY],
)
def test_no_request_breaks_the_service(schema: Any, method: str, path: str, mode: Any) -> None:
    operation = schema[path][method]
    statuses = set()

    @hypothesis.settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def tried(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and isinstance(case.body["model"], str):
            case.body["model"] = "tiny"  # or few requests would come further
        checks = [not_a_server_error, response_schema_conformance, content_type_conformance]
        statuses.add(case.call_and_validate(checks=checks).status_code)

    tried()
    if mode is POSITIVE and "completions" in path:
        assert 200 in statuses
