"""Every error that fxreuse raises on purpose.

A message names the thing at fault (model, site, plan term, input), what was expected against what was found, and
what to do next. Nothing is changed by a call that raises one of these.
"""

from __future__ import annotations


class FxReuseError(Exception):
    """Base class of all errors of this package.

    >>> import fxreuse
    >>> issubclass(fxreuse.PlanError, fxreuse.FxReuseError)
    True
    """


class PlanError(FxReuseError, ValueError):
    """A plan that cannot be read, or that does not fit the model it is laid over."""


class CaptureError(FxReuseError, RuntimeError):
    """A model that could not be captured as a graph."""


class InputError(FxReuseError, TypeError):
    """Example inputs, or arguments of a call, that do not fit the model or what was captured of it."""


class UnsupportedError(FxReuseError, NotImplementedError):
    """A model or a request that is understood, but cannot be rewritten soundly."""
