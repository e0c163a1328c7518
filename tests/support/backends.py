"""The backends that run on every device, for tests that all of them pass."""

from bipolar_jax.ops.dispatch import BACKENDS

# sm90 runs on a GPU, or interpreted: it has tests of its own.
PORTABLE = {name: BACKENDS[name] for name in ("reference", "xla")}
