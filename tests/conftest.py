"""What holds for every test: two CPU devices to shard over, and reproducible hypothesis runs; and fixtures."""

import os

# Read by XLA when its first backend starts, so it must be set before jax is used.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
# Threads of XLA on CPUs: an interpreted warpgroup that waits at a barrier holds one, and with as few as there
# are cores the others may never get to run.
os.environ.setdefault("NPROC", "16")

import hypothesis
import pytest

from tests.optimizations import optimizations

# The first example of a shape compiles, which no deadline allows for.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def clean_interpreter():
    """For tests that interpret GPU kernels: an error leaves the interpreter's state behind."""
    yield
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # takes a while, and few tests need it

    interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.fixture
def quick_compilation():
    """For the same tests: most of their time is compilation, of what runs once."""
    with optimizations(False):
        yield
