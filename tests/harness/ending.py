"""The end of the test process: as soon as the exit handlers have run.

The destructors of Ray, gRPC and torch run in no set order then, and rarely one crashes: seen once,
as a segmentation fault after half an hour in which all tests had passed.
"""

from __future__ import annotations

import atexit
import os
import sys

import pytest

_sessions: list[pytest.Session] = []


def note(session: pytest.Session) -> None:
    """The status of the first session becomes that of the process."""
    _sessions.append(session)


@atexit.register  # import this module first, so that the handlers of all others run before
def _end() -> None:
    if _sessions:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(_sessions[0].exitstatus))
