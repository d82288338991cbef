"""``GET /``: one page, self-contained, that may do nothing but call this service."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi.responses import Response

_FILE = Path(__file__).parent / "static" / "index.html"


async def page() -> Response:
    """The page. Its policy names its own script and style by their hashes and lets in no others."""
    content, policy = _loaded()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
    }
    return Response(content, headers=headers, media_type="text/html; charset=utf-8")


@cache
def _loaded() -> tuple[bytes, str]:
    content = _FILE.read_bytes()

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), content, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(each).digest()).decode()}'" for each in found)

    policy = (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return content, policy
