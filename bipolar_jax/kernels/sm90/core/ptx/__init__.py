"""Instructions of one thread: a thin layer over MLIR and PTX, imported as one namespace (`ptx.add`, `ptx.load`).

Values are MLIR values of type i32 or f32; conditions are i1. A "word" is an i32 used as 32 bits.

Tests replace every public function by one that computes the same for the 128 threads of a warpgroup in numpy
(tests/support/warpgroup_simulator/): code that is written in these functions alone runs there without a GPU. A new
function needs such a twin there.
"""

from bipolar_jax.kernels.sm90.core.ptx.control import *  # noqa: F403
from bipolar_jax.kernels.sm90.core.ptx.floats import *  # noqa: F403
from bipolar_jax.kernels.sm90.core.ptx.integers import *  # noqa: F403
from bipolar_jax.kernels.sm90.core.ptx.memory import *  # noqa: F403
from bipolar_jax.kernels.sm90.core.ptx.types import *  # noqa: F403
