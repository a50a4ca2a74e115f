"""What a run of the tests left out, a line for each group with the command that runs it; and which tests are slow."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import pytest

# What `make test-fast` leaves out, besides everything that starts process groups (tests/integration): by measured
# time, until the rest answers within two minutes on two cores.
SLOW = (
    "tests/kernels/test_kernel_aot.py::",
    "tests/kernels/test_kernel_order.py::",
    "tests/kernels/test_kernel_operators.py::",
    "tests/kernels/test_kernel_api.py::test_triton_on_cpu_tensors_says_what_it_needs",
    "tests/kernels/test_kernel_api.py::test_without_triton_the_reference_runs",
    "tests/kernels/test_kernel_api.py::test_the_decision_for_a_gpu_breaks_no_graph",
    "tests/kernels/test_kernel_benchmarks.py::test_every_workload_runs_through_the_timing",
    "tests/kernels/test_kernel_gram.py::test_twenty_runs_are_bitwise_equal",
    "tests/kernels/test_kernel_gram.py::test_16_bit[triton",
    "tests/kernels/test_kernel_gram.py::test_lengths[triton-mixed lengths",
    "tests/kernels/test_kernel_gram.py::test_waves_through_a_bounded_workspace",
    "tests/kernels/test_kernel_linear_cross_entropy.py::test_tensor_parallel_ranks_agree_with_one",
    "tests/kernels/test_kernel_linear_cross_entropy.py::test_twenty_runs_are_bitwise_equal",
    "tests/kernels/test_kernel_mixed_attention.py::test_heads_and_dimensions",
    "tests/kernels/test_kernel_mixed_attention.py::test_16_bit[triton",
    "tests/kernels/test_kernel_mixed_attention.py::test_masks[triton-adjacent images",
    "tests/kernels/test_kernel_mixed_attention.py::test_masks[triton-documents of every size",
    "tests/kernels/test_kernel_mixed_attention.py::test_masks[triton-padding tail",
    "tests/kernels/test_kernel_mixed_attention.py::test_masks[triton-reconstruction",
    "tests/kernels/test_kernel_mixed_attention.py::test_strided_views_of_a_fused_projection[triton",
    "tests/kernels/test_kernel_mixed_attention.py::test_twenty_runs_are_bitwise_equal",
    "tests/unit/convert/test_hf_directories.py::test_command_line",
    "tests/unit/data/test_backends.py::test_pixels_agree_with_hugging_face[clip-torch_uint8",
    "tests/unit/data/test_backends.py::test_pixels_agree_with_hugging_face[siglip-torch_uint8",
    "tests/unit/data/test_balance.py::test_ranks_are_even_to_five_percent",
    "tests/unit/data/test_prepare.py::test_killed_in_the_middle_it_ends_with_the_same_manifest",
    "tests/unit/model/test_teacher.py::test_two_hundred_moves_follow_an_average_in_fp64",
    "tests/unit/plan/test_plan.py::test_page_shows_what_its_commands_print",
    "tests/unit/plan/test_plan.py::test_nothing_fits",
    "tests/unit/plan/test_plan.py::test_what_is_ranked_is_what_the_run_accepts",
    "tests/unit/tools/test_mutants.py::test_verdicts",
    "tests/unit/tools/test_mutants.py::test_all_caught",
)
GROUPS_OF_PROCESSES = "tests/integration/"
FAST = "not slow"
"""The `-m` of `make test-fast`."""

# Import name -> name, of what `make test-all` installs.
INSTALLABLE = {
    "nvidia.dali": "DALI",
    "pyarrow": "pyarrow",
    "webdataset": "webdataset",
    "megatron.energon": "Energon",
    "lmms_eval": "lmms-eval",
    "peft": "peft",
}
MISSING = re.compile(
    r"could not import '(?P<module>[\w.]+)'|(?P<name>[\w-]+) is not installed|^no (?P<what>Triton)$"
)


def slow(nodeid: str) -> bool:
    return nodeid.startswith((GROUPS_OF_PROCESSES, *SLOW))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    _, _, reason = cast(tuple[str, int, str], report.longrepr)
    return reason


def _missing(reason: str) -> str | None:
    """The package whose absence a skip gives as its reason."""
    found = MISSING.search(reason)
    if found is None:
        return None
    name: str = found["module"] or found["name"] or found["what"]
    return INSTALLABLE.get(name, name)


def _listed(names: Iterable[str]) -> str:
    *most, last = sorted(names, key=str.lower)
    return f"{', '.join(most)} or {last}" if most else last


def _needing(number: int, what: str) -> str:
    return f"{number:,} test that needs {what}" if number == 1 else f"{number:,} tests that need {what}"


def lines(skips: Iterable[tuple[str, bool]]) -> list[str]:
    """One line for each group of tests that did not run; a skip is its reason and whether the test is for a GPU."""
    installable: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    others: Counter[str] = Counter()
    on_gpu = 0
    for reason, for_gpu in skips:
        reason = reason.removeprefix("Skipped: ")
        package = _missing(reason)
        if package is not None and package in INSTALLABLE.values():
            installable[package] += 1
        elif package is not None:
            missing[package] += 1
        elif for_gpu:
            on_gpu += 1
        else:
            others[reason] += 1
    found = []
    if installable:
        needing = _needing(installable.total(), _listed(installable))
        found.append(f"{needing}; `make test-all` installs and runs them")
    if on_gpu:
        found.append(f"{_needing(on_gpu, 'a CUDA GPU')}; `make gpu-test`")
    found += [f"{_needing(count, name)}; `python -m pip install` it" for name, count in missing.items()]
    found += [f"{count:,} test{'s' * (count > 1)}: {reason}" for reason, count in others.items()]
    return [f"not run: {line}" for line in found]


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if slow(item.nodeid):
            item.add_marker("slow")
        if item.get_closest_marker("long") and "LAVER_LONG" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="minutes of them; `make test-long`"))


# A file that cannot run at all is skipped while it is collected. Under pytest-xdist only the workers see that, and
# all of them do: the first one tells.
_files: list[str] = []


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _files.append(_reason(report))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None and output["workerid"] == "gw0":
        output["skipped_files"] = _files


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _files.extend(getattr(node, "workeroutput", {}).get("skipped_files", ()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = terminalreporter.stats.get("skipped", ())
    tests = [r for r in reports if isinstance(r, pytest.TestReport)]
    said = lines((_reason(r), "gpu" in r.keywords) for r in tests)
    said += [line.replace(" test", " file", 1) for line in lines((reason, False) for reason in _files)]
    if config.option.markexpr == FAST:
        said.append("not run: tests that start process groups or are slow; `make test`")
    for line in said:
        terminalreporter.write_line(line, yellow=True)
