"""Runs that share a device and a folder: turns on the one, and nothing lost in the other."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time

from experiments import turns
from experiments.workdir import RESULT_NAME, save_result


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


def test_programs_on_different_devices_do_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths = set()
    for devices in ("0", "1", "0,1", "GPU-4cf8/b1", None):
        if devices is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        with turns.device_turn():
            paths.add(turns.lock_path())
    assert len(paths) == 5
    assert {path.parent for path in paths} == {tmp_path}


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
