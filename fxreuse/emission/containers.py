"""The modules of a rewritten model that only hold others: parameters at their original paths, and lists of layers."""

from __future__ import annotations

import torch


class Container(torch.nn.Module):
    """Holds parameters and submodules at the path of an original module; it has no code of its own.

    Its name when printed is the original class's.
    """

    def __init__(self, original: str = "") -> None:
        super().__init__()
        self.original = original

    def _get_name(self) -> str:
        return self.original or "Container"

    def extra_repr(self) -> str:
        """The shapes of the parameters that it holds."""
        held = [
            f"{name}: {'×'.join(map(str, p.shape)) or 'scalar'}"
            for name, p in self._parameters.items()
            if p is not None
        ]
        return ", ".join(held)


def container_for(original: torch.nn.Module | None, plain: bool = False) -> torch.nn.Module:
    """An empty container that stands for a module; lists stay lists, so that they can be indexed, unless ``plain``."""
    if plain:
        return Container(class_name(original))
    if isinstance(original, (torch.nn.ModuleList, torch.nn.Sequential)):
        return torch.nn.ModuleList()
    if isinstance(original, torch.nn.ModuleDict):
        return torch.nn.ModuleDict()
    return Container("" if original is None else class_name(original))


def class_name(original: torch.nn.Module | None) -> str:
    """The name of a module's class; of one that stands for another, that of the other's.

    >>> class_name(torch.nn.ReLU()), class_name(Container("ReLU"))
    ('ReLU', 'ReLU')
    """
    known = getattr(original, "original", None)
    return known if isinstance(known, str) else type(original).__name__
