"""Timing of parts: nested parts, a GPU's events that must not be waited for, and the metrics columns."""

import pytest
import torch

from laver_mcore.accounting import timers as module
from laver_mcore.accounting.devices import peak_tflops
from laver_mcore.accounting.timers import Timers, time_columns


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def advance(ms):
        now[0] += ms / 1000

    return advance


def test_a_part_has_its_own_time_alone(clock):
    timers = Timers()
    for _ in range(2):
        with timers.part("student"):
            clock(5)
            with timers.part("teacher"):
                clock(3)
                with timers.part("vision"):
                    clock(1)
            clock(2)
    assert timers.take() == pytest.approx({"student": 14, "teacher": 6, "vision": 2})
    assert timers.take() == {}


def test_disabled_measures_nothing(clock):
    timers = Timers(enabled=False)
    with timers.part("student"):
        clock(5)
    assert timers.take() == {}


class Event:
    """A CUDA event whose work is finished when `device` says so."""

    waits = 0
    clock = 0.0
    finished = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.clock += 1.0
        self.at = Event.clock

    def synchronize(self):
        Event.waits += 1

    def query(self):
        return Event.finished

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.mark.parametrize("finished", [False, True], ids=["device_behind", "device_done"])
def test_events_are_waited_for_only_when_taken(monkeypatch, finished):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.waits, Event.clock, Event.finished = 0, 0.0, finished
    timers = Timers("cuda:0")
    rounds = 2 * module._PENDING
    for _ in range(rounds):
        with timers.part("student"):
            pass
    assert Event.waits == 0
    assert len(timers._pending) == (rounds if not finished else len(timers._pending))
    assert len(timers._pending) <= (rounds if not finished else module._PENDING)
    assert timers.take() == {"student": rounds}


def test_columns_add_up_to_the_step():
    columns = time_columns({"student": 30.0, "ema": 2.0}, data_wait_ms=1.0, seconds=0.02, steps=2)
    assert columns["time_student_ms"] == 15.0
    assert columns["time_other_ms"] == pytest.approx(20 - 15 - 1 - 1)
    assert sum(columns.values()) == pytest.approx(20)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A10", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
    ],
)
def test_peak_by_name(name, peak):
    assert peak_tflops(name) == peak
