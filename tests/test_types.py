"""The rule for document ids."""

from __future__ import annotations

import pytest

from kvlink_core.errors import InputError
from kvlink_core.types import check_document_id


@pytest.mark.parametrize("document_id", ["a", " ", "a/../b", "\n", "x" * 1024, "ü" * 512])
def test_an_id_is_any_text_of_up_to_1024_bytes(document_id: str) -> None:
    check_document_id(document_id)


@pytest.mark.parametrize(
    ("document_id", "says"),
    [
        ("", "'' has 0 bytes; 1 to 1024 are allowed"),
        ("x" * 1025, r"^document id 'x{60}\.\.\.' has 1025 bytes"),
        ("ü" * 513, "has 1026 bytes"),
        ("a\ud800", r"'a\\ud800' is not valid Unicode"),
    ],
)
def test_what_is_no_id(document_id: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_document_id(document_id)
