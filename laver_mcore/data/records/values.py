"""Fields of records: null, NaN and an empty list count as absent, whoever wrote the file."""

import math
from collections.abc import Mapping
from typing import Any


def is_absent(value: Any) -> bool:
    """Whether a field says nothing: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def present(record: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these fields that says something; None where none does."""
    for name in names:
        if not is_absent(value := record.get(name)):
            return value
    return None
