"""The backends that one suite runs over."""

from bipolar_jax.ops.dispatch import BACKENDS

# Run everywhere; sm90 is a GPU's, and has suites of its own in interpret mode.
PORTABLE = {name: BACKENDS[name] for name in ("reference", "xla")}
