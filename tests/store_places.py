"""Where the stores of the tests are, and what is put into them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import boto3
import torch

from kvlink_core.fingerprint import Fingerprint
from kvlink_core.store import DocumentStore
from kvlink_core.types import DocumentCache

FINGERPRINT = Fingerprint(
    model="tiny", weights="abc", tokenizer="def", rope='{"theta":1e4}', dtype="float32", template='{"t":"{text}"}'
)


def make_cache(tokens: int, seed: int, dtype: torch.dtype = torch.float32, layers: int = 3) -> DocumentCache:
    """Random K and V of different width; the token ids are those of the seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2**32, (tokens,), generator=generator)
    keys = torch.randn(layers, 2, tokens, 8, generator=generator).to(dtype)
    values = torch.randn(layers, 2, tokens, 6, generator=generator).to(dtype)
    return DocumentCache(ids, keys, values)


def same(found: object, expected: DocumentCache) -> bool:
    """Whether ``found`` is a cache of the very same numbers."""
    if not isinstance(found, DocumentCache) or (found.kept is None) != (expected.kept is None):
        return False
    names = ["token_ids", "keys", "values"] + ([] if expected.kept is None else ["kept"])
    return all(
        getattr(found, n).dtype == getattr(expected, n).dtype and torch.equal(getattr(found, n), getattr(expected, n))
        for n in names
    )


@dataclass
class Place:
    """Somewhere a store can be, with means to damage what is there."""

    url: str
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], None]
    delete: Callable[[str], None]
    names: Callable[[str], list[str]]
    options: dict[str, str] | None = None
    opened: list[DocumentStore] = field(default_factory=list)

    def open(self, *, create: bool = False, dtype: str = "float32", **arguments: Any) -> DocumentStore:
        """Open it, for the fingerprint of these tests if no other is given."""
        arguments.setdefault("fingerprint", replace(FINGERPRINT, dtype=dtype))
        store = DocumentStore.open(self.url, create=create, storage_options=self.options, **arguments)
        self.opened.append(store)
        return store


def local_place(root: Path) -> Place:
    """A directory that does not exist yet."""

    def write(path: str, data: bytes) -> None:
        # Replaced, not written over: other tests' readers may have it mapped.
        new = root / f"{path}.new"
        new.write_bytes(data)
        new.replace(root / path)

    return Place(
        url=str(root),
        read=lambda path: (root / path).read_bytes(),
        write=write,
        delete=lambda path: (root / path).unlink(),
        names=lambda path: sorted(p.name for p in (root / path).iterdir()),
    )


def s3_place(endpoint: str) -> Place:
    """A prefix in a bucket of its own."""
    options = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
    }
    client: Any = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    bucket, prefix = f"bucket-{uuid.uuid4().hex}", "some where"
    client.create_bucket(Bucket=bucket)

    def names(path: str) -> list[str]:
        found = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/{path}/").get("Contents", [])
        return sorted(item["Key"].removeprefix(f"{prefix}/{path}/") for item in found)

    return Place(
        url=f"s3://{bucket}/{prefix}",
        read=lambda path: client.get_object(Bucket=bucket, Key=f"{prefix}/{path}")["Body"].read(),
        write=lambda path, data: client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=data),
        delete=lambda path: client.delete_object(Bucket=bucket, Key=f"{prefix}/{path}"),
        names=names,
        options=options,
    )
