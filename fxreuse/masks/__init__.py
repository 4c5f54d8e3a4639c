"""Proofs about masks: what an element of an index tensor is, as a function of its position."""
