"""``repeat``: what the model looks at when it reads the document again (after KVzip, arXiv 2505.23416).

A token that is needed to say the document once more is one that some question may ask for. So the document is read
twice in one pass, and a token's weight is the most attention that any query of the second reading gives it. KVzip asks
the model to repeat the context and computes that afterwards; here the second reading stands right behind the first,
which leaves the first as it is and needs no prompt. What a token contributes is its weight times the norm of its value,
as in ``expected-attention``. Encoding takes a little more than twice as long.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache


class Repeat:
    """The most attention of a second reading, times the norm of the value."""

    name: ClassVar[str] = "repeat"
    reads: ClassVar[Reads] = "again"

    def score(self, cache: DocumentCache, reading: Reading | None) -> torch.Tensor:
        """See ``Scorer.score``."""
        assert reading is not None
        norms: torch.Tensor = cache.values.float().norm(dim=3)
        return torch.stack(list(reading.attention)) * norms
