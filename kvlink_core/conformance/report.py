"""The table of architectures for people: ``docs/architectures.md``."""

from __future__ import annotations

from collections.abc import Sequence

from kvlink_core.conformance.check import TOLERANCE
from kvlink_core.conformance.walk import EXACT, REFUSED, Row

_HEAD = """\
# Which architectures link exactly

<!-- Written by `kvlink architectures --write`; CI compares it with what the installed transformers gives. -->

Every causal language model class of transformers {version} is built with a tiny random configuration (windows and
chunks smaller than a document) and linked by `reposition` and by `link-tokens`: four documents, one of them a single
token and one of them twice, then {steps} decoding steps. *Exact* means: float32, every logit within
{tolerance:.0e} x max |logit| of the oracle (one plain forward pass over the whole prompt, documents hidden from each
other, nothing cached), and the same greedy tokens. Everything else is *refused* when it is loaded, with the reason.

**{exact} of {total} are exact, {refused} are refused.** `kvlink architectures --check` judges them again.

Documents are encoded at positions 0..n-1; a window or a chunk inside a document is counted from its start. Where
frequencies or attention scales change with the length of the prompt (RoPE types `dynamic` and `longrope`, the attention
temperature of Llama 4 and Ministral 3), prompts are exact up to the original context and refused beyond it.

How keys are found: no family is described in code. When a model is loaded, a probe watches it compute a few tokens
and finds, for each layer, which call rotated what the layer caches (`kvlink_core/models/probe.py`).
"""


def render(rows: Sequence[Row], version: str, steps: int) -> str:
    """The whole document, in Markdown."""
    exact = [r for r in rows if r.status == EXACT]
    refused = [r for r in rows if r.status == REFUSED]
    lines = [
        _HEAD.format(
            version=version, steps=steps, tolerance=TOLERANCE, exact=len(exact), total=len(rows), refused=len(refused)
        ),
        "## Exact\n",
        "| model type | class | of note |",
        "| --- | --- | --- |",
        *(f"| `{r.model_type}` | {r.class_name} | {r.remark} |" for r in exact),
        "\n## Refused\n",
        "| model type | class | why |",
        "| --- | --- | --- |",
        *(f"| `{r.model_type}` | {r.class_name} | {r.remark.replace('|', '/')} |" for r in refused),
    ]
    return "\n".join(lines) + "\n"
