"""Which engine replica gets a request: the one where most of its documents are hot, unless it has too much to do.

Each document has a home among the replicas, by rendezvous hashing (Thaler and Ravishankar, 1998): when a replica comes
or goes, only the documents move that it gains or loses, and all ingress replicas agree without talking. A request goes
to the replica that is home to most of its documents. Which one that is among equals is a hash of the whole set, so that
the same set always goes to the same replica, where it is then hot.

A favourite is passed over while it has more than ``load_factor`` times the mean of requests (consistent hashing with
bounded loads, arXiv 1608.01350). Then, and for requests without documents, two replicas are drawn and the one with
fewer requests is taken (power of two choices).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serve.wire import EngineRequest, NewDocument


def rank_by_documents(names: Iterable[str], replicas: Sequence[str]) -> list[str]:
    """Replicas, the one where most of the documents are at home first. ``replicas`` must not be empty."""
    documents = sorted(set(names))
    homes = Counter(max(replicas, key=lambda replica: _weight(document, replica)) for document in documents)
    together = "\0".join(documents)
    return sorted(replicas, key=lambda replica: (-homes[replica], -_weight(together, replica)))


def within_bound(queues: Mapping[str, int], replica: str, *, load_factor: float) -> bool:
    """Whether a replica may take one more request.

    Args:
        queues: requests of each replica that are known of.
        replica: the one.
        load_factor: how far above the mean it may be.
    """
    mean = (sum(queues.values()) + 1) / max(1, len(queues))
    return queues.get(replica, 0) + 1 <= math.ceil(load_factor * mean)


def _weight(name: str, replica: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), key=replica.encode()[-64:], digest_size=8).digest()
    return int.from_bytes(digest, "big")


class DocumentRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """The router of the engine deployment, in each process that has its handle.

    Requests are fulfilled in their order, so a request may be sent to the replica that was chosen for another one
    while all are busy; while there is room each gets its own.
    """

    def initialize_state(self, *, load_factor: float = 1.25) -> None:
        """Called by Serve with the router's keyword arguments."""
        self._load_factor = load_factor

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The favourite alone, if it may be; then two drawn at random."""
        if pending_request is not None:
            # There is no nearer set to try first: when nobody has room, wait before the next round.
            pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not by_name:
            return []
        drawn = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        names = documents_of(pending_request)
        if not names or len(by_name) == 1:
            return [drawn]
        cached = {name: self.replica_queue_len_cache.get(r.replica_id) for name, r in by_name.items()}
        queues = {name: length or 0 for name, length in cached.items()}
        favourite = rank_by_documents(names, sorted(by_name))[0]
        if not within_bound(queues, favourite, load_factor=self._load_factor):
            return [drawn]
        return [[by_name[favourite]], drawn]


def documents_of(pending_request: Any) -> tuple[str, ...]:
    """Names of the documents that a call of the engine is about, with their namespace; none for other calls."""
    if pending_request is None:
        return ()
    args = (*pending_request.args, *pending_request.kwargs.values())
    if args and isinstance(args[0], EngineRequest):
        return tuple(f"{args[0].namespace}\0{name}" for name in args[0].document_names)
    if len(args) == 2 and isinstance(args[1], tuple):  # add_documents, document_tiers
        return tuple(f"{args[0]}\0{d.id if isinstance(d, NewDocument) else d}" for d in args[1])
    return ()
