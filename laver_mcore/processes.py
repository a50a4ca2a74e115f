"""Processes that end with the one that started them. Imports nothing that takes time: helpers start with it."""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send `signum` to this process when its parent is gone, however that ended (Linux alone)."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
    if os.getppid() != parent:  # gone before it could be asked for
        os.kill(os.getpid(), signum)


def end_with_torchrun() -> None:
    """Have torchrun's end reach this rank: SIGTERM, with which a run saves and stops; at once where it is gone already.

    Called first of all: whoever imports for seconds before is not noticed when the launcher dies meanwhile, and then
    waits half an hour for ranks that never come.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent(signal.SIGTERM)
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            launcher = file.read()
        # What has no Python in it is init or a shell, which takes over whom others have left.
        if b"python" not in launcher and b"torchrun" not in launcher:
            os.kill(os.getpid(), signal.SIGTERM)
