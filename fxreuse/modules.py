"""Small modules that rewritten graphs call."""

from __future__ import annotations

import torch


class DropoutProbability(torch.nn.Module):
    """The dropout probability in force: ``p`` in training mode, 0 in evaluation mode.

    It feeds the ``dropout_p`` of a fused attention, which takes a number and not a module.

    >>> probability = DropoutProbability(0.1)
    >>> probability(), probability.eval()()
    (0.1, 0.0)
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self) -> float:
        """The probability in force."""
        return self.p if self.training else 0.0

    def extra_repr(self) -> str:
        """The probability in training mode."""
        return f"p={self.p}"
