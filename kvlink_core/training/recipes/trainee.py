"""What is trained: a network, or rows of embeddings beside a frozen one."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlink_core.errors import UnsupportedModelError
from kvlink_core.training.recipes.masks import attention_masks
from kvlink_core.training.recipes.rows import IGNORED


class Rows(nn.Module):
    """Embeddings in place of the model's own for some token ids, and where output and input share weights, there too.

    Args:
        token_ids: which; of the vocabulary, or rows of a wrap.
        start: ``[len(token_ids), hidden]``, their first values, as the network's layers are given them.
    """

    def __init__(self, token_ids: tuple[int, ...], start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.detach().float().clone())
        order = sorted(range(len(token_ids)), key=token_ids.__getitem__)
        self.register_buffer("ids", torch.tensor(sorted(token_ids)), persistent=False)
        self.register_buffer("places", torch.tensor(order), persistent=False)

    def embed(self, embedding: nn.Module, token_ids: Tensor) -> Tensor:
        """What the layers are given for ``token_ids [rows, tokens]``: ``[rows, tokens, hidden]``."""
        ids = self.get_buffer("ids")
        found = torch.searchsorted(ids, token_ids).clamp(max=len(ids) - 1)
        ours = ids[found] == token_ids
        embedded: Tensor = embedding(token_ids.masked_fill(ours, 0))
        rows = self.weight.to(embedded.dtype)[self.get_buffer("places")[found]]
        return torch.where(ours[..., None], rows, embedded)


class Trainee(nn.Module):
    """Gives the loss of a batch of packed rows; the teacher's loss where the batch has teachers' rows.

    Args:
        network: the Hugging Face model; which of its parameters require a gradient is the caller's choice.
        rows: embeddings beside it, or ``None``.
        tied: output embeddings that share the input's weights: they follow ``rows``. ``None`` if they do not.
        attention: ``sdpa`` or ``flex``.
        dtype: of the mask: that of the arithmetic.
    """

    def __init__(
        self,
        network: Any,
        rows: Rows | None,
        *,
        tied: nn.Module | None,
        attention: Literal["sdpa", "flex"],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.network, self.rows = network, rows
        self.attention, self.mask_dtype = attention, dtype
        self.config = network.config
        if rows is not None and tied is not None:
            tied.register_forward_hook(self._outputs)

    def _outputs(self, module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """Shared weights: the logits of the rows' own tokens are theirs."""
        assert self.rows is not None
        ids, places = self.rows.get_buffer("ids"), self.rows.get_buffer("places")
        rows = self.rows.weight[places].to(logits.dtype)
        return logits.index_copy(-1, ids, inputs[0].to(logits.dtype) @ rows.T)

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """The mean loss per predicted token; with ``num_items_in_batch`` the sum over that number.

        Cross entropy with the labels; for a wrap the Kullback-Leibler divergence from the model's own distribution
        under full attention (arXiv 2604.13226), at the same tokens.
        """
        labels = batch["labels"]
        used = labels != IGNORED
        logits = self._logits(batch["input_ids"], batch["positions"], batch["context"], batch["document"], used)
        if "teacher_labels" in batch:
            with torch.no_grad():
                teacher = self._logits(
                    batch["teacher_input_ids"], batch["teacher_positions"], batch["teacher_context"],
                    batch["teacher_document"], batch["teacher_labels"] != IGNORED,
                )  # fmt: skip
            loss = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        else:
            loss = F.cross_entropy(logits, labels[used], reduction="sum")
        return {"loss": loss / (used.sum() if num_items_in_batch is None else num_items_in_batch)}

    def _logits(self, ids: Tensor, positions: Tensor, context: Tensor, document: Tensor, used: Tensor) -> Tensor:
        """Float32 logits ``[predicting tokens, vocabulary]``, row by row."""
        masks = attention_masks(self.config, context, document, self.mask_dtype, self.attention)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.rows is not None:
            inputs = {"inputs_embeds": self.rows.embed(self.network.get_input_embeddings(), ids)}
        # The head is run where some row predicts: over all places of a long row it would take the most memory of all.
        columns = torch.nonzero(used.any(0)).flatten()
        output = self.network(
            **inputs, attention_mask=masks, position_ids=positions, use_cache=False, logits_to_keep=columns
        )
        logits: Tensor = output.logits[used[:, columns]].float()
        return logits


def start_of_rows(network: Any, token_ids: tuple[int, ...], like: list[int], seed: int) -> Tensor:
    """First values of rows: the mean embedding of ``like``, with noise that tells them apart.

    Raises:
        UnsupportedModelError: the network's input embeddings cannot be read.
    """
    embedding = network.get_input_embeddings()
    device = next(network.parameters()).device
    with torch.no_grad():
        near: Tensor = embedding(torch.tensor([like], device=device))[0].float()
    if near.ndim != 2:
        raise UnsupportedModelError("this model's input embeddings are not one row for each token.")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(token_ids), near.shape[1], generator=generator).to(near.device)
    return near.mean(0) + 0.3 * near.std() * noise
