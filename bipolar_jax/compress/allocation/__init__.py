"""Which layers get how many bits: what each width loses and costs at each site, and the best choice under a budget."""

from bipolar_jax.compress.allocation.assignment import Assignment, Frontier, frontier
from bipolar_jax.compress.allocation.costs import site_bits, stored_bits
from bipolar_jax.compress.allocation.rules_of_choice import rules_of
from bipolar_jax.compress.allocation.site_losses import site_losses

__all__ = ["Assignment", "Frontier", "frontier", "rules_of", "site_bits", "site_losses", "stored_bits"]
