"""Jobs as files of the store, so that one that was accepted outlives whoever accepted it: FORMAT.md section 9.

The texts of a job stand in one file until all of it is done, how far it is in another. Their names are made of ids that
this service made up; an id of a request is only ever compared with the names that are there.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kvlink_core.store.manifest import check_namespace
from kvlink_core.store.records import JOB_FILE, JOBS
from kvlink_core.store.storage import Entry, Storage
from serve.wire import Job, JobDocument, NewDocument

logger = logging.getLogger("ray.serve")

_PREFIX = "job_"
_DAY_S = 86400.0


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1


R = TypeVar("R", bound=_Record)


class JobTexts(_Record):
    """What a job is to store, for caches of this fingerprint and codec. ``created_at`` is in seconds since 1970."""

    fingerprint: str
    codec: str
    created_at: float
    documents: tuple[NewDocument, ...]


class JobState(_Record):
    """How far a job is. It is over when it says when."""

    created_at: float
    finished_at: float | None
    documents: tuple[JobDocument, ...]

    @property
    def failed(self) -> bool:
        """Whether one of its documents was not stored."""
        return any(document.status == "failed" for document in self.documents)

    def view(self, job_id: str, *, running: bool) -> Job:
        """As clients see it; ``running`` counts while it is not over."""
        if self.finished_at is None:
            return Job(job_id, "running" if running else "queued", int(self.created_at), None, self.documents)
        status: Literal["failed", "done"] = "failed" if self.failed else "done"
        return Job(job_id, status, int(self.created_at), int(self.finished_at), self.documents)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A job that nobody has ended yet; ``state`` is ``None`` where nobody has begun."""

    namespace: str
    id: str
    texts: JobTexts
    state: JobState | None


class JobFiles:
    """The jobs of a store. Safe to use from several threads.

    All methods raise ``StoreUnavailableError`` when the store does not answer.

    Args:
        storage: the store's files.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def accept(self, namespace: str, job_id: str, texts: JobTexts) -> None:
        """Keep a job: from now on it is there whatever happens to this process."""
        self._publish(namespace, f"{_stem(job_id)}.texts.json", texts)

    def note(self, namespace: str, job_id: str, state: JobState) -> None:
        """Keep how far a job is."""
        self._publish(namespace, f"{_stem(job_id)}.state.json", state)

    def finish(self, namespace: str, job_id: str, state: JobState) -> None:
        """Keep how a job ended, and let go of its texts."""
        self.note(namespace, job_id, state)
        self._storage.remove(f"{_folder(namespace)}/{_stem(job_id)}.texts.json")

    def state(self, namespace: str, job_id: str) -> JobState | None:
        """How far a job of this service's is, as far as anybody has written it down."""
        return self._read(f"{_folder(namespace)}/{_stem(job_id)}.state.json", JobState)

    def find(self, namespace: str, job_id: str) -> Job | None:
        """A job by an id that a client sent, which may be anything.

        One that is another namespace's and one that nobody has are looked for in the same way.
        """
        folder = _folder(namespace)
        known = {_PREFIX + name.partition(".")[0]: name.partition(".")[0] for name in self._storage.names(folder)}
        stem = known.get(job_id)
        if stem is None:
            return None
        state = self._read(f"{folder}/{stem}.state.json", JobState)
        if state is not None:
            return state.view(job_id, running=True)
        texts = self._read(f"{folder}/{stem}.texts.json", JobTexts)
        if texts is not None:
            return _untouched(texts).view(job_id, running=False)
        state = self._read(f"{folder}/{stem}.state.json", JobState)  # it ended just now
        return None if state is None else state.view(job_id, running=True)

    def unfinished(self, fingerprint: str, codec: str) -> list[Unfinished]:
        """Jobs of this model and codec that are not over, the oldest first; others are not ours to carry on."""
        found: list[Unfinished] = []
        for namespace, stem in self._stems(".texts.json"):
            texts = self._read(f"{_folder(namespace)}/{stem}.texts.json", JobTexts)
            if texts is None or (texts.fingerprint, texts.codec) != (fingerprint, codec):
                continue
            job = Unfinished(namespace, _PREFIX + stem, texts, self.state(namespace, _PREFIX + stem))
            if job.state is not None and job.state.finished_at is not None:  # killed before its texts were gone
                self._storage.remove(f"{_folder(namespace)}/{stem}.texts.json")
                continue
            found.append(job)
        return sorted(found, key=lambda job: (job.texts.created_at, job.id))

    def clean(self, *, days: float, most: int) -> int:
        """Drop jobs that ended more than ``days`` ago, and all but a namespace's newest ``most``; returns how many."""
        waiting = set(self._stems(".texts.json"))
        ended: defaultdict[str, list[Entry]] = defaultdict(list)
        for namespace, stem, entry in self._files(".state.json"):
            if (namespace, stem) not in waiting:
                ended[namespace].append(entry)
        before = self._storage.now() - days * _DAY_S if ended else 0.0
        dropped = 0
        for entries in ended.values():
            entries.sort(key=lambda entry: entry.modified, reverse=True)
            for number, entry in enumerate(entries):
                if number >= most or entry.modified < before:
                    self._storage.remove(entry.path)
                    dropped += 1
        return dropped

    def _files(self, ending: str) -> list[tuple[str, str, Entry]]:
        """Namespace, stem and entry of each file with this ending."""
        found = []
        for entry in self._storage.entries(JOBS):
            if JOB_FILE.fullmatch(entry.path) and entry.path.endswith(ending):
                _, namespace, name = entry.path.split("/")
                found.append((namespace, name.removesuffix(ending), entry))
        return found

    def _stems(self, ending: str) -> list[tuple[str, str]]:
        return [(namespace, stem) for namespace, stem, _ in self._files(ending)]

    def _publish(self, namespace: str, name: str, record: _Record) -> None:
        data = record.model_dump_json().encode()

        def write(file: IO[bytes]) -> str:
            file.write(data)
            return name

        self._storage.publish(_folder(namespace), write)

    def _read(self, path: str, kind: type[R]) -> R | None:
        try:
            return kind.model_validate_json(self._storage.read(path))
        except FileNotFoundError:
            return None
        except ValidationError:  # files appear whole or not at all, so this is of another version, or nobody's
            logger.warning("%s/%s is not a job of this version; ignored", self._storage.url, path)
            return None


def _folder(namespace: str) -> str:
    check_namespace(namespace)
    return f"{JOBS}/{namespace}"


def _stem(job_id: str) -> str:
    return job_id.removeprefix(_PREFIX)


def _untouched(texts: JobTexts) -> JobState:
    queued = tuple(JobDocument(document.id, "queued") for document in texts.documents)
    return JobState(created_at=texts.created_at, finished_at=None, documents=queued)


def outcomes(job: Unfinished) -> Mapping[str, JobDocument]:
    """How each document of a job fared so far, in the order in which they came."""
    return {document.id: document for document in (job.state or _untouched(job.texts)).documents}
