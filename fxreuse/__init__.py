"""A compiler for cross-layer redundancy in Transformers.

`apply` captures any Transformer as one `torch.fx` graph, finds its attentions by data flow, and lets groups of layers
share one attention map or one set of weights, or gives attention priors that `prune` cuts by. `find_attention` shows
what was found, `report` what a plan saves, `describe` what was done, `verify` whether it is right and what it gains.
"""

from .apply import apply, describe, find_attention
from .attention import AttentionSite, AttentionSites
from .checking.verify import Verification, verify
from .errors import CaptureError, FxReuseError, InputError, PlanError, UnsupportedError
from .frontend.warn import TrainingWarning
from .map_workspace import release_workspaces
from .plans.plan import Plan
from .priors.pruning import SitePruning
from .prune import PruneStep, prune, prune_schedule
from .record import Decision, FitError, Note, Record, SharedMatrix
from .report import report
from .reports.cost_report import CostReport

__version__ = "0.1.0"

__all__ = [
    "AttentionSite",
    "AttentionSites",
    "CaptureError",
    "CostReport",
    "Decision",
    "FitError",
    "FxReuseError",
    "InputError",
    "Note",
    "Plan",
    "PlanError",
    "PruneStep",
    "Record",
    "SharedMatrix",
    "SitePruning",
    "TrainingWarning",
    "UnsupportedError",
    "Verification",
    "apply",
    "describe",
    "find_attention",
    "prune",
    "prune_schedule",
    "release_workspaces",
    "report",
    "verify",
]
