"""scaling4d: pretraining of 4DS-style video masked auto-encoders in JAX.

Importing this package loads nothing heavy; the README gives a reading order of the modules.
"""

__version__ = "0.1.0"
