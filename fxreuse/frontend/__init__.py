"""From a model and example inputs to a normalised program."""
