"""Which planted faults name tests that do not exist (any more): `python tests/mutants/selection.py`, about 15 s.

Collects the whole suite once instead of once per fault, and asks pytest's own matching of `-k`.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression
from fault_list import Fault, read_faults

FAULTS = Path(__file__).parent / "faults"


class Collector:
    """Keeps what pytest collects."""

    items: Sequence[pytest.Item] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def selects(fault: Fault, matchers: dict[str, KeywordMatcher]) -> bool:
    """Whether any of the tests, node id -> names it answers to, is one that the fault is to be noticed by."""
    arguments = shlex.split(fault.tests)
    keyword = arguments[arguments.index("-k") + 1] if "-k" in arguments else ""
    expression = Expression.compile(keyword) if keyword else None
    starts = tuple(
        path + end
        for path in arguments
        if path.startswith("tests/")
        for end in (("/",) if "." not in path else ("[", "::"))
    )
    return any(
        (node in arguments or node.startswith(starts))
        and (expression is None or expression.evaluate(matcher))
        for node, matcher in matchers.items()
    )


def main() -> int:
    sys.path.insert(0, str(FAULTS.parents[2]))  # as `python -m pytest` does
    collector = Collector()
    status = pytest.main(["--collect-only", "-qq", "--disable-warnings", "tests"], plugins=[collector])
    if status != 0:
        return int(status)
    matchers = {item.nodeid: KeywordMatcher.from_item(item) for item in collector.items}
    lost = [fault for fault in read_faults(FAULTS) if not selects(fault, matchers)]
    for fault in lost:
        print(f"{fault.place}: {fault.name}: there is no such test: {fault.tests}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
