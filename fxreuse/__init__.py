"""A compiler for cross-layer redundancy in Transformers."""

from .errors import CaptureError, FxReuseError, InputError, PlanError, UnsupportedError

__all__ = ["CaptureError", "FxReuseError", "InputError", "PlanError", "UnsupportedError"]
