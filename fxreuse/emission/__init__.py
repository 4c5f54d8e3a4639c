"""From a program back to a module with the original's tree."""
