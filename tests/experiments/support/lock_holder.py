"""What a process of test_concurrent_runs.py does; by itself, so that the process imports little."""

from __future__ import annotations

import tempfile
import time

from experiments.support import device_lock


def hold_lock(folder, name, log, release):
    """Holds the device lock of a folder and logs when; with `release` another process may have it in between."""
    tempfile.tempdir = str(folder)
    with device_lock.device_lock():
        log.append((name, "in"))
        if release:
            with device_lock.device_unlocked():
                while (name, "in") == log[-1]:  # until the other process holds the lock
                    time.sleep(0.01)
            log.append((name, "back"))
        else:
            time.sleep(0.2)
        log.append((name, "out"))
