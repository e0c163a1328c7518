"""What holds for every test: two CPU devices to shard over, and reproducible hypothesis runs; and fixtures."""

import gc
import os
from pathlib import Path

# Read by XLA when its first backend starts, so it must be set before jax is used.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
# Threads of XLA on CPUs: an interpreted warpgroup that waits at a barrier holds one, and with as few as there
# are cores the others may never get to run.
os.environ.setdefault("NPROC", "16")

import hypothesis
import jax
import pytest

from tests.support.optimizations import optimizations

_MAPPINGS = Path("/proc/self/maps")
_MANY_MAPPINGS = 35_000

# The first example of a shape compiles, which no deadline allows for.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs():
    """Each keeps some mappings of memory, of which Linux gives a process 65530: beyond, XLA crashes as it compiles."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def clean_interpreter():
    """Resets the GPU interpreter after a test: a kernel that raised leaves buffers and barriers behind."""
    yield
    from tests.support import interpreter  # slow to import, and few tests need it

    interpreter.reset()


@pytest.fixture
def quick_compilation():
    """For the same tests: most of their time is compilation, of what runs once."""
    with optimizations(False):
        yield


@pytest.fixture(scope="module")
def compiled_programs(tmp_path_factory):
    """For tests that train: programs are compiled once for all of a file."""
    from tests.support.tiny_training import compiled_once  # with what else trains, which few tests need

    with compiled_once(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory):
    """A text to train on."""
    from tests.support.tiny_training import write_text

    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tiny_run(tiny_text, compiled_programs, tmp_path_factory):
    """Folder of a whole run."""
    from experiments import train
    from tests.support.tiny_training import whole_config

    folder = tmp_path_factory.mktemp("run")
    train.main(whole_config(tiny_text), folder)
    return folder
