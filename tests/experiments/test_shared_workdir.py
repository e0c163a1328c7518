"""Runs that share a device and a folder: turns on the one, and nothing lost in the other."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import tempfile
import time

import pytest

from experiments.support import turns
from experiments.support.workdir import RESULT_NAME, save_result


def _take_turn(folder, name, log, lend):
    tempfile.tempdir = str(folder)
    with turns.device_turn():
        log.append((name, "in"))
        if lend:
            with turns.others_turn():
                while (name, "in") == log[-1]:  # until the other has come in
                    time.sleep(0.01)
            log.append((name, "back"))
        else:
            time.sleep(0.2)
        log.append((name, "out"))


def test_one_process_at_a_time_but_while_a_turn_is_lent(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        log = manager.list()
        lender = context.Process(target=_take_turn, args=(tmp_path, "lender", log, True))
        lender.start()
        while not list(log):
            time.sleep(0.01)
        other = context.Process(target=_take_turn, args=(tmp_path, "other", log, False))
        other.start()
        lender.join(60), other.join(60)
        assert list(log) == [("lender", "in"), ("other", "in"), ("other", "out"), ("lender", "back"), ("lender", "out")]


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
def test_programs_wait_for_those_that_see_the_same_devices(tmp_path, monkeypatch, mine, others, waits):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def see(devices):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if devices is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)

    see(mine)
    with turns.device_turn():
        see(others)
        with contextlib.ExitStack() as stack:
            refused = False
            for path, mode in turns._locks():
                try:  # files opened once more are locked as by another process
                    fcntl.flock(stack.enter_context(path.open("w")), mode | fcntl.LOCK_NB)
                except BlockingIOError:
                    refused = True
    assert refused == waits


def test_nothing_is_lent_outside_a_turn():
    with turns.others_turn():
        pass


def test_results_of_runs_beside_each_other_are_joined(tmp_path):
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
