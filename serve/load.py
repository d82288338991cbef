"""``python -m serve.load``: load a running service, and say what its clients saw.

Open loop: requests come when they come (Poisson), whether or not earlier ones are answered, as users do; a closed loop
would go easy on a service that slows down. Documents are drawn by Zipf's law. With ``--one-at-a-time`` each request
waits for the last one: then what HTTP adds to the engine's own time to first token can be seen. These go over a plain
connection of the standard library's: httpx takes milliseconds itself, which are the client's and not the service's.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from kvlink_core.errors import ConfigError, KVLinkError

PATH = "/v1/chat/completions"


@dataclass(slots=True)
class Seen:
    """What one client saw. Times in seconds from sending; ``engine_ttft_s`` is what the engine says of itself."""

    status: str = "no answer"
    ttft_s: float | None = None
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    engine_ttft_s: float | None = None
    cached_share: float | None = None


class Load:
    """Sends requests and keeps what was seen.

    Args:
        client: of the service.
        model: its model.
        ids: of documents, the most popular first.
        exponent: of Zipf's law.
        per_request: documents of a request.
        max_tokens: of an answer.
        linker: ``None`` for the service's.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        model: str,
        ids: Sequence[str],
        *,
        exponent: float,
        per_request: int,
        max_tokens: int,
        linker: str | None,
        seed: int,
    ) -> None:
        self._client = client
        self._model = model
        self._ids = ids
        self._weights = [1 / (rank + 1) ** exponent for rank in range(len(ids))]
        self._per_request = per_request
        self._max_tokens = max_tokens
        self._linker = linker
        self._random = random.Random(seed)
        self.seen: list[Seen] = []

    async def open_loop(self, rate: float, seconds: float) -> None:
        """``rate`` requests a second on average, for so long; returns when all are answered."""
        async with asyncio.TaskGroup() as clients:
            ends = time.monotonic() + seconds
            while (wait := self._random.expovariate(rate)) + time.monotonic() < ends:
                await asyncio.sleep(wait)
                clients.create_task(self.one())

    async def one_at_a_time(self, count: int) -> None:
        """``count`` requests, each when the last one is answered."""
        await asyncio.to_thread(self._one_by_one, count)

    def _one_by_one(self, count: int) -> None:
        url = self._client.base_url
        plain = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        with closing(plain(url.host, url.port, timeout=600)) as connection:
            for _ in range(count):
                seen, body = Seen(), json.dumps(self._body())
                self.seen.append(seen)
                headers = {**self._client.headers, "content-type": "application/json"}
                began = time.perf_counter()
                try:
                    connection.request("POST", f"{url.path.rstrip('/')}{PATH}", body, headers)
                    response = connection.getresponse()
                    seen.status = str(response.status) if response.status != 200 else "cut off"
                    last = began
                    for line in response:  # to its end, or the connection could not take the next request
                        last = self._note(line.decode().strip(), seen, began, last)
                except (OSError, http.client.HTTPException) as error:
                    seen.status = type(error).__name__
                    connection.close()
                seen.total_s = time.perf_counter() - began

    async def one(self) -> None:
        """One streamed request."""
        seen = Seen()
        self.seen.append(seen)
        began = time.perf_counter()
        try:
            async with self._client.stream("POST", PATH, json=self._body()) as response:
                seen.status = str(response.status_code)
                if response.status_code == 200:
                    seen.status = "cut off"
                    await self._read(response, seen, began)
                else:
                    await response.aread()
        except httpx.HTTPError as error:
            seen.status = type(error).__name__
        seen.total_s = time.perf_counter() - began

    async def _read(self, response: httpx.Response, seen: Seen, began: float) -> None:
        last = began
        async for line in response.aiter_lines():
            last = self._note(line, seen, began, last)

    def _note(self, line: str, seen: Seen, began: float, last: float) -> float:
        """A line of a stream, or of a refusal; returns when it, or the last one that counts, came."""
        if not line or seen.status != "cut off":
            return last
        now = time.perf_counter()
        if line == "data: [DONE]":
            seen.status = "200"
            return now
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            seen.status = f"error event: {chunk['error']['code']}"
            return now
        if seen.ttft_s is None:
            seen.ttft_s = now - began
        elif chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
            seen.gaps_s.append(now - last)
        if report := chunk.get("kvlink"):
            seen.engine_ttft_s = report["ttft_ms"] / 1000
            asked = sum(d["tokens"] for d in report["documents"])
            hit = sum(d["tokens"] for d in report["documents"] if d["origin"] in ("device", "host", "disk", "store"))
            seen.cached_share = hit / asked if asked else None
        return now

    def _body(self) -> dict[str, Any]:
        picked: list[str] = []
        while len(picked) < min(self._per_request, len(self._ids)):
            (name,) = self._random.choices(self._ids, self._weights)
            if name not in picked:
                picked.append(name)
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": "What do they say?"}],
            "documents": [{"id": name} for name in picked],
            "max_tokens": self._max_tokens,
            "stream": True,
        }
        return body if self._linker is None else body | {"linker": self._linker}


def table(seen: Sequence[Seen], seconds: float) -> Table:
    """Latencies of the requests that were answered, and how many were not."""
    good = [s for s in seen if s.status == "200"]
    result = Table(title=f"{len(seen)} requests in {seconds:.1f} s, {len(good)} answered")
    for name in ("", "p50 ms", "p90 ms", "p99 ms", "max ms"):
        result.add_column(name, justify="right" if name else "left")
    over = [s.ttft_s - s.engine_ttft_s for s in good if s.ttft_s is not None and s.engine_ttft_s is not None]
    for name, values in (
        ("time to first token", [s.ttft_s for s in good if s.ttft_s is not None]),
        ("the engine's own", [s.engine_ttft_s for s in good if s.engine_ttft_s is not None]),
        ("HTTP's share", over),
        ("between tokens", [gap for s in good for gap in s.gaps_s]),
        ("whole answer", [s.total_s for s in good]),
    ):
        if values:
            result.add_row(name, *(f"{1000 * v:.1f}" for v in quantiles(values)))
    shares = [s.cached_share for s in good if s.cached_share is not None]
    said = ", ".join(f"{status}: {count}" for status, count in sorted(Counter(s.status for s in seen).items()))
    hits = f"; token-level hit rate {statistics.mean(shares):.3f}" if shares else ""
    result.caption = f"{said}{hits}"
    return result


def quantiles(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Median, 90th and 99th percentile (nearest rank), largest."""
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.9, 0.99)]
    return at[0], at[1], at[2], ordered[-1]


async def _run(
    url: str, key: str | None, rate: float, seconds: float, count: int, warm_up: int, options: dict[str, Any]
) -> Table:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=600) as client:
        try:
            models = (await client.get("/v1/models")).raise_for_status().json()["data"]
            listed = (await client.get("/v1/documents", params={"limit": 1000})).raise_for_status().json()["data"]
        except httpx.HTTPError as error:
            raise ConfigError(f"no service at {url}: {error}") from error
        if not listed:
            raise ConfigError(f"the service at {url} has no documents; add some, or run precompute.")
        load = Load(client, models[0]["id"], [d["id"] for d in listed], **options)
        await load.one_at_a_time(warm_up)
        load.seen.clear()
        began = time.perf_counter()
        await (load.one_at_a_time(count) if count else load.open_loop(rate, seconds))
        return table(load.seen, time.perf_counter() - began)


def main(
    url: Annotated[str, typer.Option(help="of the service")] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(envvar="KVLINK_API_KEY", help="API key")] = None,
    rate: Annotated[float, typer.Option(min=0.001, help="requests a second, on average")] = 2.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="how long requests come")] = 30.0,
    one_at_a_time: Annotated[int, typer.Option(min=0, help="so many requests, each after the last one")] = 0,
    warm_up: Annotated[int, typer.Option(min=0, help="requests before, that do not count")] = 5,
    per_request: Annotated[int, typer.Option(min=1, help="documents of a request")] = 3,
    zipf: Annotated[float, typer.Option(min=0, help="exponent of the documents' popularity")] = 1.1,
    max_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 16,
    linker: Annotated[str | None, typer.Option(help="instead of the service's")] = None,
    seed: Annotated[int, typer.Option(help="of arrivals and documents")] = 0,
) -> None:
    """Load a running service and print what its clients saw."""
    options = {
        "exponent": zipf, "per_request": per_request, "max_tokens": max_tokens, "linker": linker, "seed": seed,
    }  # fmt: skip
    try:
        result = asyncio.run(_run(url.rstrip("/"), key, rate, seconds, one_at_a_time, warm_up, options))
    except KVLinkError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    Console().print(result)


if __name__ == "__main__":
    typer.run(main)
