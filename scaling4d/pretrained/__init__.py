"""Weights that exist already: where they come from, how they are read, and the models they make."""
