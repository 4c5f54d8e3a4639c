"""What inspection and the cost model found, as data, text and pictures."""
