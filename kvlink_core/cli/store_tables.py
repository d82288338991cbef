"""The tables of ``kvlink store``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from kvlink_core.cli.common import wide
from kvlink_core.cli.store_common import age, count, say, size

if TYPE_CHECKING:
    from kvlink_core.store import CatalogRow
    from kvlink_core.store.lifecycle import DocumentInfo, Problem, ShardInfo, Stats
    from kvlink_core.store.lifecycle.stats import Amount

#: Of names that are hashes.
_DIGITS = 12

_NUMBERS = ("documents", "payloads", "tokens", "size", "shards", "row group")


def show(table: Table) -> None:
    """Print a table, as wide as the terminal, or as a pipe may have it."""
    wide().print(table)


def text(value: str) -> str:
    """Text as it is, neither markup nor commands to the terminal: an id may hold anything."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
    return table


def show_documents(rows: Sequence[CatalogRow], namespace: str) -> None:
    """One line for each row."""
    table = _table(f"documents of namespace {namespace}", "id", "tokens", "size", "codec", "model", "written", "shard")
    for r in rows:
        cells = (f"{r.tokens:,}", size(r.nbytes), r.codec, r.fingerprint[:_DIGITS], age(r.created_at))
        table.add_row(text(r.document_id), *cells, r.shard[:_DIGITS])
    show(table)


def show_problems(problems: Sequence[Problem]) -> None:
    """One line for each, the bad ones in red."""
    table = _table("problems", "kind", "namespace", "shard", "concerns", "what")
    for p in problems:
        table.add_row(
            p.code, p.namespace, p.shard[:_DIGITS], text(", ".join(p.documents)), text(p.message),
            style="red" if p.bad else "yellow",
        )  # fmt: skip
    show(table)


def show_document(item: DocumentInfo) -> None:
    """Everything about a document of one model and codec."""
    row = item.row
    table = Table(show_header=False, title=f"document {text(row.document_id)}", title_justify="left")
    fields = {
        "namespace": row.namespace,
        "tokens": f"{row.tokens:,} (digest {row.token_digest})",
        "size": f"{size(row.nbytes)}, {row.nbytes / max(1, row.tokens):,.0f} bytes a token",
        "codec": row.codec,
        "written": f"{row.created_at:%Y-%m-%d %H:%M:%S} UTC, {age(row.created_at)}",
        "shard": f"shards/{row.shard}, row group {row.row_group}",
        "earlier versions": f"{len(item.superseded)}, not yet collected" if item.superseded else "none",
        "other ids": ", ".join(item.same_tokens) or "none",
        "fingerprint": row.fingerprint,
    }
    if item.manifest:
        m = item.manifest
        fields["shape"] = (
            f"{m.layers} layers, {m.kv_heads} KV heads, keys {m.head_dim} and values {m.value_dim} wide, {m.dtype}"
        )
    if item.fingerprint:
        fields["model"] = item.fingerprint.model
    fields["state"] = f"{item.problem.code}: {item.problem}" if item.problem else "sound: read and checked"
    for name, value in fields.items():
        table.add_row(name, text(value))
    show(table)


def show_shard(info: ShardInfo) -> None:
    """What a shard is, and one line for each of its documents."""
    m = info.manifest
    living = sum(bool(i) for i in info.ids.values())
    say(f"shards/{info.name}: {size(info.size)}, written {age(info.modified)}")
    say(f"namespace {m.namespace}, fingerprint {m.fingerprint}")
    say(f"codec {m.codec.name} {dict(m.codec.params) or ''}, {m.dtype}, {m.layers} layers, {m.kv_heads} KV heads")
    title = f"{count(len(m.documents), 'document')}, {living:,} named by the catalog"
    table = _table(title, "row group", "tokens", "size", "ids in the catalog", "ids when written")
    for group, document in enumerate(m.documents):
        now = info.ids.get(group, [])
        cells = (str(group), f"{document.tokens:,}", size(document.nbytes))
        style = "" if now else "dim"
        table.add_row(*cells, text(", ".join(now)) or "none", text(", ".join(document.ids)), style=style)
    show(table)


def show_stats(found: Stats) -> None:
    """Amounts by group and by age, then what lies in the directory."""

    def cells(a: Amount) -> tuple[str, ...]:
        return (f"{a.documents:,}", f"{a.payloads:,}", f"{a.tokens:,}", size(a.nbytes), f"{a.shards:,}")

    amounts = ("documents", "payloads", "tokens", "size", "shards")
    groups = _table("by namespace, model and codec", "namespace", "model", "fingerprint", "codec", *amounts)
    ages = _table("by time since written", "age", *amounts)
    for g in found.groups:
        fields = found.fingerprints[g.fingerprint]
        model = fields.model if fields else "?"
        groups.add_row(g.namespace, text(model), g.fingerprint[:_DIGITS], text(g.codec), *cells(g.amount))
    groups.add_section()
    groups.add_row("all", "", "", "", *cells(found.total))
    for name, amount in found.ages.items():
        ages.add_row(name, *cells(amount))
    show(groups)
    show(ages)
    if f := found.files:
        unnamed = f"nothing names {f.unnamed:,}, {size(f.unnamed_nbytes)}"
        say(f"{count(f.shards, 'shard')} in all, {size(f.nbytes)}; {unnamed}")
        say(f"catalog: version {f.catalog_version}, {count(f.catalog_files, 'file')}, {size(f.catalog_nbytes)}")
    say(f"{count(found.superseded, 'superseded row')}, {found.damaged:,} damaged")
