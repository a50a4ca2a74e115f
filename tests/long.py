"""The mark of tests that take minutes: `make test` leaves them out (`not_run.py`), `make test-long` runs them alone."""

import pytest

LONG = pytest.mark.long
