"""The exit-code contract between the trainer and whatever starts it.

Responsible for: the numbers. Not responsible for: deciding when to stop (see ``train.py``) or restarting (the
scheduler's work). A preempted run must never exit 0, because schedulers then count it as finished.
"""

DONE = 0
"""The work is complete; do not start it again."""

ERROR = 1
"""A program or user error (1..126 except 42): starting again would only repeat it."""

RUN_AGAIN = 42
"""Saved and stopped on request; the same command goes on from there."""

INTERRUPTED = 130
"""Ended at once by a second Ctrl-C (128 + SIGINT); codes of 127 and above may be run again within a budget."""

STORAGE = 153
"""The disk is full or a save failed, which may pass; 128 + SIGXFSZ. What was saved before stays."""

LOST = 134
"""Another process of the run is gone; JAX aborts with the same (128 + SIGABRT), where it notices first."""

STUCK = 142
"""Ended by its watchdog, because it stood still; 128 + SIGALRM, which ends a process that Python no longer can."""
