"""The faults: what is done to a running service, how one sees that it was felt, and when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from serve.prove.clients import Outcome, leave_mid_stream, never_reading
from serve.prove.material import Question
from serve.prove.service import Service
from serve.prove.wire import Wire

#: How long the store is away, as the issue of these proofs has it; and what each of its requests takes when it is slow.
AWAY_S, SLOW_S = 20.0, 0.5

_DAMAGED_S = 20.0
_FULL_S = 15.0
_UNREAD_S = 15.0
_UNREAD_TOKENS = 3000
_AT_A_TIME = 50


@dataclass(slots=True)
class Scene:
    """A service under load and what can be done to it.

    Attributes:
        service: is asked.
        model: its name.
        questions: to ask.
        engines: replicas of the engine.
        seen: what the load has seen so far.
        objects: reads and writes the store's shards behind the wire's back; ``None`` where nothing is damaged.
        wire: to the store.
        disk: where the disk tier is; ``None`` where there is none.
        clients: how many leave.
        unread: how many clients never read, at a time.
    """

    service: Service
    model: str
    questions: Sequence[Question]
    engines: int
    seen: list[Outcome]
    wire: Wire
    objects: Shards | None = None
    disk: Path | None = None
    clients: int = 1000
    unread: int = 24
    felt: int = 0


class Shards:
    """The shards of a store on S3.

    Args:
        client: boto3's.
        bucket: of the store.
    """

    def __init__(self, client: Any, bucket: str) -> None:
        self._client = client
        self._bucket = bucket

    def names(self) -> list[str]:
        """Their keys."""
        listed = self._client.list_objects_v2(Bucket=self._bucket).get("Contents", ())
        return sorted(entry["Key"] for entry in listed if "/shards/" in entry["Key"])

    def read(self, name: str) -> bytes:
        """All of one."""
        return bytes(self._client.get_object(Bucket=self._bucket, Key=name)["Body"].read())

    def write(self, name: str, content: bytes) -> None:
        """Put another content in its place."""
        self._client.put_object(Bucket=self._bucket, Key=name, Body=content)


Signs = Callable[[Outcome], bool]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which things go wrong.

    Attributes:
        name: as users select it.
        what: in the table.
        strike: does it, and returns when it is over; sets ``Scene.felt`` if that is not seen by the load.
        sign: whether a request of the load felt it.
        disk: whether it needs a disk tier of its own file system.
        must_be_felt: whether a fault that nobody noticed proves nothing.
    """

    name: str
    what: str
    strike: Callable[[Scene], Awaitable[None]]
    sign: Signs = field(default=lambda outcome: outcome.kind != "right")
    disk: bool = False
    must_be_felt: bool = True


async def _kill(scene: Scene) -> None:
    pids = await asyncio.to_thread(scene.service.engine_pids)
    psutil.Process(pids[len(scene.seen) % len(pids)]).kill()
    scene.felt += 1


def _away(state: str) -> Callable[[Scene], Awaitable[None]]:
    async def strike(scene: Scene) -> None:
        scene.wire.be(state)  # type: ignore[arg-type]  # one of its states, below
        try:
            await asyncio.sleep(AWAY_S)
        finally:
            scene.wire.be("sound")

    return strike


async def _slow(scene: Scene) -> None:
    scene.wire.be("sound", delay_s=SLOW_S)
    try:
        await asyncio.sleep(AWAY_S)
    finally:
        scene.wire.be("sound")


async def _damage(scene: Scene) -> None:
    """Flip bytes in every third shard until answers have met it, then put back what was there."""
    shards = scene.objects
    assert shards is not None
    sound = {name: await asyncio.to_thread(shards.read, name) for name in (await asyncio.to_thread(shards.names))[::3]}
    first = len(scene.seen)
    try:
        for name, content in sound.items():
            damaged = bytearray(content)
            # Not in the last part, where the footer is: that is another fault, and sooner seen.
            damaged[: 3 * len(damaged) // 4 : 997] = bytes(b ^ 0xFF for b in damaged[: 3 * len(damaged) // 4 : 997])
            await asyncio.to_thread(shards.write, name, bytes(damaged))
        ends = time.monotonic() + _DAMAGED_S
        while time.monotonic() < ends and sum(map(_damaged, scene.seen[first:])) < 5:
            await asyncio.sleep(0.2)
    finally:
        for name, content in sound.items():
            await asyncio.to_thread(shards.write, name, content)


def _damaged(outcome: Outcome) -> bool:
    return "reencoded-corrupt" in outcome.origins


def _computed(outcome: Outcome) -> bool:
    return outcome.kind != "right" or "encoded" in outcome.origins


async def _fill(scene: Scene) -> None:
    """Take every byte of the disk tier's file system as soon as it is free."""
    assert scene.disk is not None
    before = await asyncio.to_thread(scene.service.counter, "tier_refused_total", tier="disk")
    with _filled(scene.disk / "filler"):
        await asyncio.sleep(_FULL_S)
    await asyncio.sleep(12)  # Ray exports every 10 s
    scene.felt += int(await asyncio.to_thread(scene.service.counter, "tier_refused_total", tier="disk") - before)


@contextmanager
def _filled(path: Path) -> Iterator[None]:
    stop = threading.Event()

    def fill() -> None:
        with path.open("wb", buffering=0) as file:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    while file.write(bytes(16 * 1024)):
                        pass
                stop.wait(0.002)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink()


async def _never_read(scene: Scene) -> None:
    """More clients than there are places ask for long answers and read nothing of them."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(scene.unread):
            question = scene.questions[number % len(scene.questions)]
            client = never_reading(scene.service.url, question, scene.model, tokens=_UNREAD_TOKENS)
            await stack.enter_async_context(client)
        await asyncio.sleep(_UNREAD_S)
    scene.felt += scene.unread


async def _leave(scene: Scene) -> None:
    """Each of so many clients gets its stream, sooner or later, and leaves in the middle of it."""
    left = 0

    async def be_one(places: asyncio.Semaphore, number: int) -> None:
        nonlocal left
        question = scene.questions[number % len(scene.questions)]
        async with places:
            while True:
                with contextlib.suppress(OSError):
                    if await leave_mid_stream(scene.service.url, question, scene.model):
                        left += 1
                        return
                await asyncio.sleep(0.2)

    places = asyncio.Semaphore(_AT_A_TIME)
    async with asyncio.timeout(300), asyncio.TaskGroup() as clients:
        for number in range(scene.clients):
            clients.create_task(be_one(places, number))
    scene.felt += left


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("kill", "`kill -9` of one of two engine replicas", _kill),
        Fault("store-refuses", f"store unreachable for {AWAY_S:g} s (refused)", _away("refusing"), _computed),
        Fault("store-silent", f"store unreachable for {AWAY_S:g} s (silent)", _away("silent"), _computed),
        Fault("store-slow", f"store slow for {AWAY_S:g} s ({1000 * SLOW_S:g} ms a request)", _slow,
              lambda outcome: (outcome.ttft_s or 0) > SLOW_S),
        Fault("corrupt", "every third shard damaged", _damage, _damaged),
        Fault("disk-full", f"disk tier's file system full for {_FULL_S:g} s", _fill, lambda outcome: False, disk=True),
        Fault("never-reads", f"clients that never read, for {_UNREAD_S:g} s", _never_read),
        Fault("leave", "clients that leave mid-stream", _leave),
    )
}  # fmt: skip


@contextmanager
def small_file_system(folder: Path, nbytes: int) -> Iterator[Path | None]:
    """A file system of its own below ``folder``, until the block ends; ``None`` where none may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False)
