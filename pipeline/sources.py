"""Which files a corpus is: from ``--input`` (a file, folder or glob; a path or any fsspec URL) to a list."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from kvlink_core.errors import ConfigError, CorpusError

FileKind = Literal["jsonl", "parquet", "text"]

#: Ending, lower case, to what is inside. The longest ending wins.
ENDINGS: dict[str, FileKind] = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus.

    Attributes:
        url: what fsspec opens, protocol included.
        name: its path inside the folder or glob that was asked for (its own name when asked for alone). Ids
            are made of it where rows bring none, so that moving a corpus as a whole changes no id.
        kind: what its ending says it is.
        compressed: whether it is gzip.
    """

    url: str
    name: str
    kind: FileKind
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files to read, in a stable order, and those of the folders that are left out for their ending."""

    files: tuple[SourceFile, ...]
    ignored: tuple[str, ...]


def find_files(inputs: Sequence[str], options: Mapping[str, Any] | None = None) -> Corpus:
    """List the files of a corpus; reads none of them.

    Hidden files (a name that begins with ``.`` or ``_``, as markers of other tools do) are not part of a
    corpus. Other files of a folder or glob whose ending is unknown are returned as ignored. A file that is named
    twice, or found through two inputs, is taken once.

    Args:
        inputs: files, folders, globs; local paths or fsspec URLs.
        options: storage options for fsspec.

    Raises:
        ConfigError: a protocol that fsspec does not know or lacks a package for.
        CorpusError: nothing there, nothing readable there, or a file named outright has an unknown ending.
    """
    files: dict[str, SourceFile] = {}
    ignored: dict[str, None] = {}
    for each in inputs:
        found, left_out = _find(each, dict(options or {}))
        files.update({f.url: f for f in found if f.url not in files})
        ignored.update(dict.fromkeys(left_out))
    return Corpus(tuple(files.values()), tuple(ignored))


def open_file(file: SourceFile, options: Mapping[str, Any] | None = None) -> Any:
    """Open a file of the corpus for reading bytes, decompressed. A context manager."""
    return fsspec.open(file.url, "rb", compression="gzip" if file.compressed else None, **dict(options or {}))


def _find(source: str, options: dict[str, Any]) -> tuple[list[SourceFile], list[str]]:
    try:
        fs, path = url_to_fs(source, **options)
        if isinstance(fs, LocalFileSystem):
            path = re.sub("/{2,}", "/", path)  # as the system reads it; fsspec's glob finds nothing otherwise
        if fs.isfile(path):
            file = _source_file(fs, path, path.rsplit("/", 1)[-1])
            if file is None:
                raise CorpusError(f"{source!r}: unknown ending; readable are {', '.join(ENDINGS)}.", param="input")
            return [file], []
        if fs.isdir(path):
            paths = fs.find(path)
            base = path.rstrip("/") + "/"
        else:
            paths = [p for p in fs.glob(path) if fs.isfile(p)]
            head = path.split("*", 1)[0].split("?", 1)[0].split("[", 1)[0]
            base = head.rsplit("/", 1)[0] + "/" if "/" in head else ""
    except CorpusError:
        raise
    except (ImportError, ValueError) as error:  # what fsspec raises for protocols
        raise ConfigError(f"cannot read {source!r}: {error}", param="input") from error
    except Exception as error:  # each file system has errors of its own
        raise CorpusError(f"cannot read {source!r}: {error}", param="input") from error
    names = {p: p.removeprefix(base) for p in sorted(paths)}
    names = {p: n for p, n in names.items() if not any(part.startswith((".", "_")) for part in n.split("/"))}
    found = {p: _source_file(fs, p, n) for p, n in names.items()}
    files = [f for f in found.values() if f is not None]
    if not files:
        what = f"none of its {len(names)} files ends in" if names else "there is no file that ends in"
        raise CorpusError(f"no corpus at {source!r}: {what} {', '.join(ENDINGS)}.", param="input")
    return files, [str(fs.unstrip_protocol(p)) for p, f in found.items() if f is None]


def _source_file(fs: Any, path: str, name: str) -> SourceFile | None:
    lower = name.lower()
    ending = max((e for e in ENDINGS if lower.endswith(e)), key=len, default=None)
    if ending is None:
        return None
    return SourceFile(fs.unstrip_protocol(path), name, ENDINGS[ending], compressed=ending.endswith(".gz"))
