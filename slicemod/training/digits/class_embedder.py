"""Turns a digit into the context of cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassEmbedder(nn.Module):
    """One learned context token for each class and one for "no class".

    The null class is what classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) extrapolates from; its
    number is ``num_classes``.

    Args:
        num_classes: number of real classes.
        dim: width of the token, the UNet's ``cross_attention_dim``.
    """

    def __init__(self, num_classes: int = 10, dim: int = 64) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dim = dim
        self.embedding = nn.Embedding(num_classes + 1, dim)

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.num_classes

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embeds labels.

        Args:
            labels: (B,) int64, 0 to ``num_classes`` inclusive.
            drop: (B,) bool; True replaces the label by the null class.

        Returns:
            (B, 1, dim): a context of one token.
        """
        if drop is not None:
            labels = torch.where(drop, self.null_class, labels)
        tokens: Tensor = self.embedding(labels)  # (B, dim)
        return tokens.unsqueeze(1)
