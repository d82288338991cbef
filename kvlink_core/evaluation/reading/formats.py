"""From one entry of a file to examples: the formats that evaluation data usually has, told apart by their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvlink_core.errors import CorpusError
from kvlink_core.evaluation.examples import Example, gold_kind
from kvlink_core.evaluation.reading.corpus import read_corpus
from kvlink_core.evaluation.reading.fields import Fields
from kvlink_core.types import Document

#: What is asked where the data has no question of its own.
SUMMARIZE = "Summarize the documents."
SUMMARIZE_DIALOGUE = "Summarize the dialogue."


@dataclass(slots=True)
class Source:
    """The file that entries come from, and what it needs beside it.

    Attributes:
        path: the file.
        evidence: TriviaQA's folder of that name.
        corpus: documents that questions name by their ids, read from ``corpus.jsonl`` beside the file when needed.
        left_out: entries that hold no question to be asked, by reason.
    """

    path: Path
    evidence: Path | None = None
    corpus: Mapping[str, Document] | None = None
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Format:
    """A file format.

    Attributes:
        name: for messages and documentation.
        fields: by which an entry is known; alternatives are separated by ``|``.
        read: the examples of one entry.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Fields, Source], Iterator[Example]]

    def fits(self, entry: Fields) -> bool:
        """Whether the entry has the fields."""
        return all(any(entry.has(name) for name in names.split("|")) for names in self.fields)


def _retrieved(entry: Fields, source: Source) -> Iterator[Example]:
    """Passages under ``ctxs``: lost-in-the-middle, DPR, FiD, Contriever."""
    ctxs = entry.objects("ctxs")
    documents = [_document(i, c.text("text", blank=True), c.maybe("title")) for i, c in enumerate(ctxs)]
    gold = [i for i, c in enumerate(ctxs) if c.data.get("isgold") is True]
    yield _example(entry, documents, _answers(entry), gold)


def _own(entry: Fields, source: Source) -> Iterator[Example]:
    """Documents under ``documents``: objects, or ids of the ``corpus.jsonl`` beside the file."""
    items = entry.items("documents")
    if items and all(isinstance(item, str) for item in items):
        documents = [_known(entry, source, item) for item in items]
    else:
        objects = enumerate(entry.objects("documents"))
        documents = [_document(i, d.text("text", blank=True), d.maybe("title")) for i, d in objects]
    gold = entry.places("gold", len(documents))
    yield _example(entry, documents, _answers(entry), gold, entry.maybe("continuation"))


def _hotpot(entry: Fields, source: Source) -> Iterator[Example]:
    """HotpotQA and 2WikiMultiHopQA: ``context`` of titles and sentences, as pairs or as columns."""
    if isinstance(entry.data["context"], dict):
        pairs = entry.inside("context").columns("title", "sentences")
        facts = entry.inside("supporting_facts").columns("title") if entry.has("supporting_facts") else []
    else:
        pairs = [_pair(entry, "context", item) for item in entry.items("context")]
        items = entry.items("supporting_facts") if entry.has("supporting_facts") else []
        facts = [_pair(entry, "supporting_facts", item) for item in items]
    documents = []
    for i, (title, sentences) in enumerate(pairs):
        if (
            not isinstance(title, str)
            or not isinstance(sentences, list)
            or not all(isinstance(s, str) for s in sentences)
        ):
            entry.fail("context", "a list of titles with a list of sentences each")
        row = Fields({"text": " ".join(s.strip() for s in sentences), "title": title}, f"{entry.where}, context[{i}]")
        documents.append(_document(i, row.text("text", blank=True), row.text("title", blank=True)))
    titles = {fact[0] for fact in facts}
    yield _example(entry, documents, _answers(entry), [i for i, d in enumerate(documents) if d.title in titles])


def _musique(entry: Fields, source: Source) -> Iterator[Example]:
    """MuSiQue: ``paragraphs`` with ``paragraph_text``; unanswerable questions are left out."""
    if entry.data.get("answerable") is False:
        source.left_out.append("unanswerable")
        return
    rows = entry.objects("paragraphs")
    documents = [_document(i, r.text("paragraph_text", blank=True), r.maybe("title")) for i, r in enumerate(rows)]
    aliases = entry.texts("answer_aliases") if entry.has("answer_aliases") else ()
    gold = [i for i, row in enumerate(rows) if row.data.get("is_supporting") is True]
    yield _example(entry, documents, (*_answers(entry), *aliases), gold)


def _squad(entry: Fields, source: Source) -> Iterator[Example]:
    """An article of SQuAD: each question over its own paragraph; unanswerable ones (version 2) are left out."""
    title = entry.maybe("title")
    for paragraph in entry.objects("paragraphs"):
        document = _document(0, paragraph.text("context"), title.replace("_", " ") if title else None)
        for qa in paragraph.objects("qas"):
            answers = tuple(a.text("text") for a in qa.objects("answers"))
            if not answers:
                source.left_out.append("unanswerable")
                continue
            yield _example(qa, [document], answers, [0], kind="")


def _trivia(entry: Fields, source: Source) -> Iterator[Example]:
    """TriviaQA: texts are files of its ``evidence`` folder, or the descriptions of search results without it."""
    answer = entry.inside("Answer")
    value = [answer.text("Value")] if answer.has("Value") else []
    answers = (*value, *(answer.texts("Aliases") if answer.has("Aliases") else ()))
    found: list[Document] = []
    for name, folder in (("EntityPages", "wikipedia"), ("SearchResults", "web")):
        for page in entry.objects(name) if entry.has(name) else ():
            text = _evidence(page, source, folder)
            found.append(_document(len(found), text, page.maybe("Title")))
    yield _example(entry, found, answers, ())


def _trivia_columns(entry: Fields, source: Source) -> Iterator[Example]:
    """TriviaQA as columns: ``entity_pages`` and ``search_results`` with their texts."""
    found: list[Document] = []
    for name, column in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        rows = entry.inside(name).columns("title", column) if entry.has(name) else []
        for title, text in rows:
            row = Fields({column: text, "title": title}, f"{entry.where}, {name}")
            found.append(_document(len(found), row.text(column, blank=True), row.maybe("title")))
    answer = entry.inside("answer")
    aliases = answer.texts("aliases") if answer.has("aliases") else ()
    yield _example(entry, found, (answer.text("value"), *aliases), ())


def _news(entry: Fields, source: Source) -> Iterator[Example]:
    """MultiNews: the articles of ``document`` stand one after the other with a mark between them."""
    text = entry.text("document").replace("NEWLINE_CHAR", "\n").replace("story_separator_special_tag", "|||||")
    parts = [part.strip() for part in text.split("|||||")]
    documents = [_document(i, part, None) for i, part in enumerate(parts)]
    summary = entry.text("summary").replace("NEWLINE_CHAR", "\n").strip()
    yield _summary(entry, documents, summary.removeprefix("\u2013").strip(), SUMMARIZE)


def _dialogue(entry: Fields, source: Source) -> Iterator[Example]:
    """SAMSum: a dialogue is one document."""
    documents = [_document(0, entry.text("dialogue", blank=True).replace("\r\n", "\n"), None)]
    yield _summary(entry, documents, entry.text("summary"), SUMMARIZE_DIALOGUE)


#: In the order in which they are tried.
FORMATS: tuple[Format, ...] = (
    Format("passages under `ctxs`", ("question", "ctxs"), _retrieved),
    Format("KVLink's own", ("question", "documents"), _own),
    Format("MuSiQue", ("question", "paragraphs"), _musique),
    Format("SQuAD", ("paragraphs",), _squad),
    Format("HotpotQA, 2WikiMultiHopQA", ("question", "context"), _hotpot),
    Format("TriviaQA", ("Question", "Answer"), _trivia),
    Format("TriviaQA in columns", ("question", "answer", "entity_pages|search_results"), _trivia_columns),
    Format("MultiNews", ("document", "summary"), _news),
    Format("SAMSum", ("dialogue", "summary"), _dialogue),
)


def format_of(entry: Fields) -> Format:
    """The format that an entry has.

    Raises:
        CorpusError: none that is known.
    """
    for each in FORMATS:
        if each.fits(entry):
            return each
    known = "; ".join(f"{each.name} ({', '.join(each.fields)})" for each in FORMATS)
    has = ", ".join(sorted(entry.data)[:12]) or "none"
    raise CorpusError(f"{entry.where}: no known format has these fields ({has}). Known are: {known}; text (text).")


def _document(number: int, text: str, title: str | None) -> Document:
    return Document(str(number), text, title if title and title.strip() else None)


def _example(
    entry: Fields,
    documents: list[Document],
    answers: tuple[str, ...],
    gold: list[int] | tuple[int, ...],
    continuation: str | None = None,
    kind: str | None = None,
) -> Example:
    """Blank documents go, and places with them."""
    kept = [i for i, document in enumerate(documents) if document.text.strip()]
    at = tuple(new for new, old in enumerate(kept) if old in gold)
    name = entry.identity("id", "_id", "question_id", "QuestionId") or ""
    if kind is None:
        kind = entry.identity("kind", "type") or _hops(name) or gold_kind(at)
    question = entry.text("Question" if entry.has("Question") else "question")
    documents_kept = tuple(documents[i] for i in kept)
    return Example(name, question, documents_kept, tuple(dict.fromkeys(answers)), at, kind, "qa", continuation)


def _summary(entry: Fields, documents: list[Document], summary: str, question: str) -> Example:
    kept = tuple(document for document in documents if document.text.strip())
    return Example(entry.identity("id", "_id") or "", question, kept, (summary,), task="summary")


def _answers(entry: Fields) -> tuple[str, ...]:
    """Under ``answers`` or ``answer``; none where neither is there."""
    name = next((n for n in ("answers", "answer") if entry.has(n)), None)
    return entry.texts(name) if name else ()


def _hops(name: str) -> str:
    """MuSiQue's ids begin with the kind of their hops: ``2hop__``, ``3hop1__``, ``4hop3__``."""
    head = name.partition("__")[0]
    return head if len(head) in (4, 5) and head[1:4] == "hop" and head[0].isdecimal() else ""


def _pair(entry: Fields, name: str, item: object) -> tuple[object, object]:
    if not isinstance(item, list) or len(item) != 2:
        entry.fail(name, "a list of pairs")
    return item[0], item[1]


def _known(entry: Fields, source: Source, document_id: str) -> Document:
    if source.corpus is None:
        source.corpus = read_corpus(entry, source.path.parent / "corpus.jsonl")
    if document_id not in source.corpus:
        raise CorpusError(f"{entry.where}: no document {document_id[:60]!r} in {source.path.parent / 'corpus.jsonl'}.")
    return source.corpus[document_id]


def _evidence(page: Fields, source: Source, folder: str) -> str:
    evidence = source.evidence or source.path.parent.parent / "evidence"
    if not page.has("Filename") or not evidence.is_dir():
        if page.has("Description"):
            return page.text("Description", blank=True)
        raise CorpusError(
            f"{page.where}: its text is a file of TriviaQA's folder 'evidence', and {evidence} is not there; "
            "say where it is with --evidence."
        )
    root = (evidence / folder).resolve()
    path = (root / page.text("Filename")).resolve()
    if not path.is_relative_to(root):
        page.fail("Filename", f"a file below {root}")
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise CorpusError(f"{page.where}: cannot read {path}: {error}.") from error
