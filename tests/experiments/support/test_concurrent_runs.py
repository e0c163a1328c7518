"""Concurrent runs: the device lock, and results merged in a shared workdir."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import tempfile
import time

import pytest

from experiments.support import device_lock
from experiments.support.workdir import RESULT_NAME, save_result
from tests.experiments.support.lock_holder import hold_lock


def test_one_process_holds_the_lock_unless_it_is_released(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        log = manager.list()
        first = context.Process(target=hold_lock, args=(tmp_path, "first", log, True))
        first.start()
        while not list(log):
            time.sleep(0.01)
        second = context.Process(target=hold_lock, args=(tmp_path, "second", log, False))
        second.start()
        first.join(60), second.join(60)
        assert list(log) == [("first", "in"), ("second", "in"), ("second", "out"), ("first", "back"), ("first", "out")]


@pytest.mark.parametrize(
    ("mine", "others", "waits"),
    [
        ("0", "1", False),
        ("0", "0", True),
        ("0,1", "1", True),
        ("1,0", "0, 1", True),
        (None, "0", True),
        ("0", None, True),
        ("0", "GPU-4cf8", True),
        (None, None, True),
    ],
)
def test_processes_wait_for_those_that_see_the_same_devices(tmp_path, monkeypatch, mine, others, waits):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def see(devices):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if devices is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)

    see(mine)
    with device_lock.device_lock():
        see(others)
        with contextlib.ExitStack() as stack:
            refused = False
            for path, mode in device_lock._locks():
                try:  # a file opened again locks as in another process
                    fcntl.flock(stack.enter_context(path.open("w")), mode | fcntl.LOCK_NB)
                except BlockingIOError:
                    refused = True
    assert refused == waits


@pytest.mark.parametrize("devices", [None, "0,1"])
def test_shared_locks_exclude_only_those_that_measure(tmp_path, monkeypatch, devices):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)

    def others_wait(mode):
        with device_lock._locks()[-1][0].open("w") as file:
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with device_lock.device_lock(shared=True):
        assert not others_wait(fcntl.LOCK_SH)
        assert others_wait(fcntl.LOCK_EX)
    with device_lock.device_lock():
        assert others_wait(fcntl.LOCK_SH)
        with device_lock.device_shared():
            assert not others_wait(fcntl.LOCK_SH)
            assert others_wait(fcntl.LOCK_EX)
        assert others_wait(fcntl.LOCK_SH)
        with device_lock.device_unlocked():
            with device_lock.device_alone():
                assert others_wait(fcntl.LOCK_SH)
            assert not others_wait(fcntl.LOCK_EX)
        assert others_wait(fcntl.LOCK_SH)


def test_seconds_of_a_phase_exclude_those_in_which_it_waits(monkeypatch):
    seconds = {"compile": 1.0}
    clock = iter([10.0, 17.0])
    monkeypatch.setattr(device_lock.time, "perf_counter", lambda: next(clock))
    with device_lock.phase(seconds, "compile"):
        monkeypatch.setattr(device_lock, "_waited", device_lock._waited + 4.0)
    assert seconds == {"compile": 4.0, "wait": 4.0}


def test_unlocking_without_the_lock_does_nothing():
    with device_lock.device_unlocked(), device_lock.device_shared():
        pass


def test_results_of_concurrent_runs_are_merged(tmp_path):
    def result(**shapes):
        return {"settings": {"seed": 0}, "shapes": dict(shapes)}

    first, second = result(a=1), result(b=1)
    save_result(tmp_path, first, shapes=["a"])
    save_result(tmp_path, second, shapes=["b"])
    first["shapes"]["a"] = 2
    first["extra"] = "whole"
    save_result(tmp_path, first, shapes=["a"])
    second["shapes"]["b"] = 2
    save_result(tmp_path, second, shapes=["b"])
    assert json.loads((tmp_path / RESULT_NAME).read_text()) == result(a=2, b=2) | {"extra": "whole"} == second
