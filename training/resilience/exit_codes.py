"""What the exit code of a training job tells the script that started it."""

from __future__ import annotations

BAD_USAGE = 2
"""The command line or a file it names is wrong: nothing was started."""
DO_NOT_REQUEUE = 93
"""Starting again would end the same way: no usable checkpoint, rewinds without progress."""
BAD_DATA = 94
"""Too much of the data cannot be used."""
NODE_SUSPECTED = 95
"""A rank hung, or its parameters differ from the others': start again without its node."""
