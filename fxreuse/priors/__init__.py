"""Attention with priors: which scores and keys are pruned by them, and how the rest is computed."""
