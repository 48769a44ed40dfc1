"""How a process of this project ends. What each code means for whoever starts it again is in
docs/when_something_fails.md."""

FAILED = 1
"""A defect, with a traceback."""
USER_ERROR = 2
"""The input is wrong; a message on stderr says what."""
DIVERGED = 3
"""Too many steps in a row were not finite, or all of a training."""
LOST = 69
"""Another rank died or hung: sysexits' "unavailable". Starting the run again with --resume auto helps."""
STOPPED = 75
"""Saved and stopped on request: sysexits' "try again later". Starting the run again with --resume auto goes
on."""
INTERRUPTED = 130
"""Ctrl-C."""
