"""What every entry point does at the terminal: one clear line on bad input, and no noise from libraries."""

import os
import sys
import time
import warnings


def silence_megatron() -> None:
    """Drop Megatron's warnings about each optional library that is missing; runs say once what they use."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")


def refuse(program: str, error: Exception) -> int:
    """Say what is wrong in one line, once for all ranks (every rank finds the same fault); returns exit status 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun stops all ranks when the first one leaves: let rank 0 speak
    return 2
