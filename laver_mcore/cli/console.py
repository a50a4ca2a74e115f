"""What every entry point does at the terminal: one clear line on bad input, no noise from libraries, an end at once."""

import atexit
import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from laver_mcore.processes import end_with_torchrun


def silence_libraries() -> None:
    """Drop what libraries warn of, unless Python was told otherwise (`python -W default`): none of it is a user's.

    Before they are imported, here and in the processes that are started from here.
    """
    if not sys.warnoptions:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of loading weights as well
        logging.getLogger("laver_kernels").setLevel(logging.ERROR)  # a run says itself which kernels it uses


def program() -> str:
    """The name that the running program was called by: `laver chat`, `chat.py`."""
    return Path(sys.argv[0]).name


def refuse(error: Exception | str, status: int = 2) -> int:
    """Say what is wrong in one line, once for all ranks (every rank finds the same fault); returns the exit status."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{program()}: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun stops all ranks when the first one leaves: let rank 0 speak
    return status


def run_and_leave(main: Callable[[list[str]], int]) -> NoReturn:
    """End the process with the exit status of `main(arguments)`: 1 if it raised, 130 if it was interrupted.

    A rank that stops early leaves collectives behind in which it and others wait for each other, and the destructor
    of a process group waits for those: the interpreter's own end would never come.
    """
    end_with_torchrun()
    try:
        status = main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            status = 130
        else:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # whoever read it may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
