"""``/v1/documents`` and ``/v1/jobs``: documents are added behind the request, listed a page at a time, and deleted."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from fastapi import APIRouter, Path, Query, Request
from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.client import DocumentsClient
from serve.fields import Body, Text, refused
from serve.guard import admin_of, caller_of
from serve.settings import IngressSettings
from serve.wire import ApiError, ApiException, DocumentEntry, Job, JobStatus, NewDocument

#: Of an id, in bytes of UTF-8: the store's rule, less what a chunk's and a place's number add.
MAX_ID_BYTES = 1000


def _short(document_id: str) -> str:
    size = len(document_id.encode())
    if size > MAX_ID_BYTES:
        raise PydanticCustomError("invalid_value", f"has {size} bytes, and at most {MAX_ID_BYTES} are allowed")
    return document_id


class NewDocumentParam(Body):
    """A document to be stored."""

    id: Annotated[Text, AfterValidator(_short)] = Field(min_length=1)
    text: Text = Field(min_length=1)
    title: Text | None = Field(default=None, max_length=4096)

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.text.strip():
            raise PydanticCustomError("empty_document", "the document has no text")
        return self


class AddDocuments(Body):
    """The body of ``POST /v1/documents``."""

    documents: list[NewDocumentParam] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        ids = [document.id for document in self.documents]
        if len(set(ids)) < len(ids):
            raise PydanticCustomError("duplicate_document", "an id stands there twice")
        return self


class StoredPartOut(BaseModel):
    """What was stored of a document, by the id to ask for it with."""

    id: str
    tokens: int
    bytes: int


class JobErrorOut(BaseModel):
    """Why a document was not stored."""

    code: str
    message: str


class JobDocumentOut(BaseModel):
    """How far one document is."""

    id: str
    status: JobStatus
    parts: list[StoredPartOut]
    error: JobErrorOut | None


class JobOut(BaseModel):
    """A job. ``status`` is ``failed`` when one of its documents failed and none is left to do."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    created_at: int
    finished_at: int | None
    documents: list[JobDocumentOut]


class StoredDocument(BaseModel):
    """A stored document: what its caches take, and where they are.

    Of a document that was cut, all chunks together: ``chunks`` of them, by the ids ``id#0`` and so on. ``tiers`` is
    null where it is not known.
    """

    id: str
    object: Literal["document"] = "document"
    tokens: int
    bytes: int
    chunks: int
    places: int | None
    created_at: int
    tiers: list[str] | None = None


class StoredDocumentList(BaseModel):
    """A page of documents, sorted by id. ``last_id`` is what to send as ``after`` for the next one."""

    object: Literal["list"] = "list"
    data: list[StoredDocument]
    has_more: bool
    last_id: str | None


class DeletedDocument(BaseModel):
    """A document that is no longer there."""

    id: str
    object: Literal["document.deleted"] = "document.deleted"
    deleted: Literal[True] = True


def add_document_routes(v1: APIRouter, documents: DocumentsClient | None, limits: IngressSettings) -> None:
    """Add the routes; without a store they say so."""

    def store() -> DocumentsClient:
        if documents is None:
            raise ApiException(ApiError(400, "this service has no store: documents cannot be kept.", "no_store"))
        return documents

    @v1.post("/documents", status_code=202, response_model=JobOut)
    async def add(body: AddDocuments, request: Request) -> JobOut:
        """Store documents, behind this request. Needs an admin key. An id that is there already is replaced."""
        caller = admin_of(request)
        if len(body.documents) > limits.max_documents:
            raise refused(
                f"{len(body.documents)} documents, and at most {limits.max_documents} are allowed.", "documents"
            )
        for number, document in enumerate(body.documents):
            if (size := len(document.text.encode())) > limits.max_document_bytes:
                most = limits.max_document_bytes
                raise refused(f"it has {size} bytes, and at most {most} are allowed.", f"documents[{number}].text")
        new = [NewDocument(d.id, d.text, d.title) for d in body.documents]
        return _job(await store().add(caller.namespace, new))

    @v1.get("/jobs/{job_id}", response_model=JobOut)
    async def job(job_id: str, request: Request) -> JobOut:
        """How far a job is. Needs an admin key."""
        return _job(await store().job(admin_of(request).namespace, job_id))

    @v1.get("/documents", response_model=StoredDocumentList)
    async def list_documents(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str, Query(max_length=1024)] = "",
        prefix: Annotated[str, Query(max_length=1024)] = "",
    ) -> StoredDocumentList:
        """The documents that are stored, sorted by id."""
        page = await store().page(caller_of(request).namespace, after=after, prefix=prefix, limit=limit)
        data = [_document(entry) for entry in page.documents]
        return StoredDocumentList(data=data, has_more=page.has_more, last_id=data[-1].id if data else None)

    @v1.get("/documents/{document_id:path}", response_model=StoredDocument)
    async def find(document_id: Annotated[str, Path(min_length=1)], request: Request) -> StoredDocument:
        """One document. Another namespace's is not there."""
        return _document(await store().find(caller_of(request).namespace, document_id))

    @v1.delete("/documents/{document_id:path}", response_model=DeletedDocument)
    async def delete(document_id: Annotated[str, Path(min_length=1)], request: Request) -> DeletedDocument:
        """Drop a document with all its chunks. Needs an admin key. Its bytes go when the store is collected."""
        return DeletedDocument(id=(await store().delete(admin_of(request).namespace, document_id)).id)


def _job(job: Job) -> JobOut:
    return JobOut(
        id=job.id,
        status=job.status,
        created_at=job.created_at,
        finished_at=job.finished_at,
        documents=[
            JobDocumentOut(
                id=each.id,
                status=each.status,
                parts=[StoredPartOut(id=p.id, tokens=p.tokens, bytes=p.nbytes) for p in each.parts],
                error=JobErrorOut(code=each.error.code, message=each.error.message) if each.error else None,
            )
            for each in job.documents
        ],
    )


def _document(entry: DocumentEntry) -> StoredDocument:
    return StoredDocument(
        id=entry.id,
        tokens=entry.tokens,
        bytes=entry.nbytes,
        chunks=entry.chunks,
        places=entry.places,
        created_at=entry.created_at,
        tiers=None if entry.tiers is None else list(entry.tiers),
    )
