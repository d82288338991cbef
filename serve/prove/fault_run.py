"""Faults under load, each several times: what became of every request, when all was well again, what was left over."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import boto3
import httpx

from serve.prove.clients import Askers, Outcome, judge
from serve.prove.faults import FAULTS, Fault, Scene, Shards, small_file_system
from serve.prove.material import Question, make_documents, make_model, make_questions, store_documents
from serve.prove.service import Held, ProofError, Service, running, s3_server
from serve.prove.wire import Wire, wire

_BUCKET = "proof"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "proof", "AWS_SECRET_ACCESS_KEY": "proof", "AWS_REGION": "us-east-1"}
_ENGINES = 2

#: Before a fault, and after the last one.
_CALM_S = 4.0

#: All is well when so many requests in a row are right and hardly one of them feels anything any more.
_IN_A_ROW, _MAY_FEEL = 10, 2
_RECOVERS_WITHIN_S = 150.0

#: Within this, everything that requests held is free again: a request may take 60 s here, and gauges are 10 s old.
_FREE_WITHIN_S = 100.0

#: Pools of connections breathe; hundreds of requests that were not cleaned up do not hide in this.
_FEW_SOCKETS = 20

_SETTINGS = {
    # A model this small computes faster than anything can be read, and what is read is to be tried.
    "tiers.recompute": "never",
    "tiers.host_bytes": "1MiB",
    "tiers.timeout_s": 5.0,
    "engine.num_cpus": 0.5,
    "engine.torch_threads": 1,
    "engine.max_running": 8,
    "engine.max_waiting": 64,
    "ingress.request_timeout_s": 60.0,
}
_DISK_BYTES, _FILE_SYSTEM_BYTES = 4 * 2**20, 12 * 2**20


@dataclass(slots=True)
class FaultResult:
    """What one kind of fault did.

    Attributes:
        name, what: of the fault.
        times: that it happened.
        requests: that were under way meanwhile.
        right, wrong: of these, answered with the oracle's tokens, or others.
        errors: clear ones, by code.
        lost: without a clear error, by what the client saw.
        felt: requests that noticed, or what else shows that the fault was there.
        gap_s: the longest time without a right answer.
        recovery_s: of each time: from the end of the fault (of a kill: from it) until all was well.
        freed_s: from the end of the load until nothing was held any more.
        before, after: what the service's processes held, idle.
        faults: conditions that do not hold, in words.
        skipped: why it was not tried.
    """

    name: str
    what: str
    times: int = 0
    requests: int = 0
    right: int = 0
    wrong: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    felt: int = 0
    gap_s: float = 0.0
    recovery_s: list[float] = field(default_factory=list)
    freed_s: float = 0.0
    before: Held | None = None
    after: Held | None = None
    faults: list[str] = field(default_factory=list)
    skipped: str | None = None


async def prove_fault(scene: Scene, fault: Fault, *, times: int, rate: float, seed: int) -> FaultResult:
    """Let one kind of fault happen under load.

    Args:
        scene: the service, idle.
        fault: happens.
        times: so often.
        rate: requests a second of the load.
        seed: of the load.
    """
    result = FaultResult(fault.name, fault.what, times)
    result.before = await asyncio.to_thread(scene.service.held)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
    async with httpx.AsyncClient(base_url=scene.service.url, limits=limits, timeout=None) as client:
        askers = Askers(client, scene.model, scene.questions, seed=seed)
        scene.seen, scene.felt = askers.outcomes, 0
        stop = asyncio.Event()
        load = asyncio.create_task(askers.open_loop(rate, stop))
        try:
            for _ in range(times):
                await asyncio.sleep(_CALM_S)
                struck = time.monotonic()
                await fault.strike(scene)
                over = struck if fault.name == "kill" else time.monotonic()
                recovered = await _recovery(scene, fault, over)
                if recovered is None:
                    result.faults.append(f"not well again within {_RECOVERS_WITHIN_S:g} s")
                    break
                result.recovery_s.append(recovered - over)
                result.gap_s = max(result.gap_s, _gap(askers.outcomes, struck, time.monotonic()))
            await asyncio.sleep(_CALM_S)
        finally:
            stop.set()
            await load
    ended = time.monotonic()
    result.after = await asyncio.to_thread(_wait_until_free, scene.service, result.before)
    result.freed_s = time.monotonic() - ended
    _sum_up(result, askers.outcomes, scene, fault)
    return result


async def _recovery(scene: Scene, fault: Fault, over: float) -> float | None:
    """When all was well again, if it was in time."""
    whole: float | None = None
    while time.monotonic() - over < _RECOVERS_WITHIN_S:
        await asyncio.sleep(0.25)
        if whole is None and not await asyncio.to_thread(scene.service.ready, scene.engines):
            continue
        whole = whole or time.monotonic()
        if (began := first_good_run([o for o in scene.seen if o.sent >= over and o.ended], fault.sign)) is not None:
            return max(began, whole) if fault.name == "kill" else began
    return None


def first_good_run(outcomes: Sequence[Outcome], sign: Callable[[Outcome], bool]) -> float | None:
    """When the first of the earliest good requests was sent that are all right and hardly feel anything."""
    for at in range(len(outcomes) - _IN_A_ROW + 1):
        some = outcomes[at : at + _IN_A_ROW]
        if all(o.kind == "right" for o in some) and sum(map(sign, some)) <= _MAY_FEEL and not sign(some[0]):
            return some[0].sent
    return None


def _gap(outcomes: Sequence[Outcome], begins: float, ends: float) -> float:
    """The longest time between two right answers."""
    times = [begins, *sorted(o.ended for o in outcomes if o.kind == "right" and begins < o.ended < ends), ends]
    return max(after - before for before, after in pairwise(times))


def _wait_until_free(service: Service, before: Held) -> Held:
    """What is held as soon as it is no more than before, or at the end of patience."""
    deadline = time.monotonic() + _FREE_WITHIN_S
    while True:
        held = service.held()
        free = not any(held.gauges.values()) and held.sockets <= before.sockets + _FEW_SOCKETS
        if free or time.monotonic() > deadline:
            return held
        time.sleep(1)


def _sum_up(result: FaultResult, outcomes: Sequence[Outcome], scene: Scene, fault: Fault) -> None:
    result.requests = len(outcomes)
    judge(result, outcomes)
    result.felt = scene.felt or sum(map(fault.sign, outcomes))
    assert result.before is not None
    assert result.after is not None
    if not result.felt:
        result.faults.append("nobody felt it, so this proves nothing")
    result.faults += [f"{name} is {value:g} when idle" for name, value in result.after.gauges.items() if value]
    if result.after.sockets > result.before.sockets + _FEW_SOCKETS:
        result.faults.append(f"{result.after.sockets} connections when idle, {result.before.sockets} before")


def prove_faults(
    names: Sequence[str], *, times: int, rate: float, clients: int, seed: int, say: Callable[[str], None]
) -> list[FaultResult]:
    """Make a service over a store on S3, and let faults happen to it.

    Args:
        names: of the faults.
        times: each happens.
        rate: requests a second of the load meanwhile.
        clients: that leave mid-stream, each time.
        seed: of questions and arrivals.
        say: told what is done.

    Raises:
        ProofError: an unknown fault; the service does not start.
    """
    if unknown := [name for name in names if name not in FAULTS]:
        raise ProofError(f"no such fault: {unknown[0]!r}; there are {', '.join(FAULTS)}.")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvlink-proof-")))
        say("the model, the documents, and the oracle's answers")
        model = make_model(folder / "model", small=True)
        documents = make_documents(60, sentences=12)
        questions = make_questions(
            model, documents, 80, per_request=3, zipf=0.7, max_tokens=(8, 24, 64), seed=seed
        )  # fmt: skip
        port = stack.enter_context(s3_server(folder))
        line = stack.enter_context(wire(port))
        options = {**_CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.port}", "AWS_ALLOW_HTTP": "true"}
        direct = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
            aws_access_key_id="proof", aws_secret_access_key="proof",
        )  # fmt: skip
        direct.create_bucket(Bucket=_BUCKET)
        store_documents(model, f"s3://{_BUCKET}/store", documents, options=options, per_shard=4)
        settings = {
            "model": str(folder / "model"), "store": f"s3://{_BUCKET}/store", "storage_options": options, **_SETTINGS
        }  # fmt: skip
        results: list[FaultResult] = []
        for disk in (False, True):
            some = [FAULTS[name] for name in names if FAULTS[name].disk is disk]
            if some:
                results += _on_a_service(
                    folder / ("disk" if disk else "plain"), settings, questions, some, line, Shards(direct, _BUCKET),
                    times=times, rate=rate, clients=clients, seed=seed, say=say, disk=disk,
                )  # fmt: skip
        return results


def _on_a_service(
    folder: Path,
    settings: dict[str, object],
    questions: Sequence[Question],
    faults: Sequence[Fault],
    line: Wire,
    shards: Shards,
    *,
    times: int,
    rate: float,
    clients: int,
    seed: int,
    say: Callable[[str], None],
    disk: bool,
) -> list[FaultResult]:
    """These faults, one after the other, on a service of their own."""
    folder.mkdir()
    with ExitStack() as stack:
        where = None
        if disk:
            where = stack.enter_context(small_file_system(folder / "small", _FILE_SYSTEM_BYTES))
            if where is None:
                return [FaultResult(f.name, f.what, skipped="no file system may be mounted here") for f in faults]
            settings = settings | {"tiers.disk_path": str(where), "tiers.disk_bytes": str(_DISK_BYTES)}
        say(f"a service of {_ENGINES} engine replicas")
        service = stack.enter_context(running(folder, settings, engines=_ENGINES))
        scene = Scene(service, service.model(), questions, _ENGINES, [], line, shards, where, clients)
        asyncio.run(_warm(scene))
        results = []
        for number, fault in enumerate(faults):
            say(f"{fault.name}: {times} x {fault.what}")
            results.append(asyncio.run(prove_fault(scene, fault, times=times, rate=rate, seed=seed + number)))
            say(f"   {'; '.join(results[-1].faults) or 'holds'}")
        return results


async def _warm(scene: Scene) -> None:
    """Every question once. Raises ``ProofError`` if already now an answer is not right."""
    async with httpx.AsyncClient(base_url=scene.service.url, timeout=None) as client:
        askers = Askers(client, scene.model, scene.questions, seed=0)
        await askers.each_once()
    if bad := [o for o in askers.outcomes if o.kind != "right"]:
        raise ProofError(f"without any fault, {len(bad)} of {len(askers.outcomes)} answers were not right: {bad[0]}.")
