"""What holds for every test: two CPU devices, quick compilation, strict dtypes and ranks, bounded memory; fixtures."""

import gc
import os
from pathlib import Path

from tests.quick_compilation import quick_compilation

# Read by XLA when its first backend starts, so these must be set before jax is used.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ.update(quick_compilation(os.environ))
# Threads of XLA on CPUs: an interpreted warpgroup that waits at a barrier holds one, and with as few as there
# are cores the others may never get to run.
os.environ.setdefault("NPROC", "16")
# Everything works under JAX's strict settings. Programs that tests start inherit these too.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

import hypothesis
import jax
import pytest

from tests.sampling import leave_out_unsampled
from tests.support.annotations import check_arrays_of_package, checking
from tests.support.memory import forget_programs_beyond_the_limit

pytest_plugins = ["pytester"]

_TESTS = Path(__file__).parent
_SHORT_FILES = {"checkpoint", "format", "packing", "quantize", "tuning"}  # folders whose files take seconds

check_arrays_of_package()

# The first example of a shape compiles, which no deadline allows for.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run every case of the tests marked `sample`")
    parser.addoption("--fast", action="store_true", help="run one case of each test marked `sample`")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("exhaustive"):
        leave_out_unsampled(config, items, fast=config.getoption("fast"))
    # The workers of one run take file after file; they finish together if the last files are short.
    items.sort(key=lambda item: item.path.relative_to(_TESTS).parts[0] in _SHORT_FILES)


def pytest_collection_finish():
    gc.freeze()  # imported modules stay: no later collection looks through them
    # JAX makes so many objects as it traces that a collection every 700 of them, the default, takes 3% of all CPU time.
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def bounded_memory():
    yield
    forget_programs_beyond_the_limit()


@pytest.fixture(autouse=True)
def checked_arrays(request):
    """Checks arrays against annotations, except in tests that make wrong ones on purpose."""
    checking(request.node.get_closest_marker("wrong_arrays") is None)
    yield
    checking(False)


@pytest.fixture
def standard_promotion():
    """For tests of mixed dtypes, which Flax and JAX promote: strict promotion refuses them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def clean_interpreter():
    """Resets the GPU interpreter after a test: a kernel that raised leaves buffers and barriers behind."""
    yield
    from tests.support import interpreter  # slow to import, and few tests need it

    interpreter.reset()


@pytest.fixture(scope="session")
def folder_of_programs(tmp_path_factory):
    """Of one worker: JAX writes its files in place, so that another process could read half a program."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def compiled_programs(folder_of_programs):
    """Keeps compiled programs on disk for files of tests that train or run the same model again and again."""
    from tests.support.tiny_training import compiled_once  # slow to import, and few tests need it

    with compiled_once(folder_of_programs):
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
