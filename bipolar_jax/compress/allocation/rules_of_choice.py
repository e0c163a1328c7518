"""An assignment as rules that `quantize_model` and `calibrate` take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bipolar_jax.compress.allocation.assignment import Assignment
from bipolar_jax.nn.compressible import Sites, run_name


def rules_of(
    assignment: Assignment, sites: Sequence[Sites], options: Sequence[str], stack: str = "layers"
) -> list[tuple[str, str]]:
    """A rule for each run of layers and each precision in it, such as ("^layers/0-4/(ffn/down_proj)$", "W3A8g64").

    Args:
      assignment: of the options.
      sites: the layers of a block; their order is that of the assignment.
      options: precisions.
      stack: how paths of layers begin.
    """
    rules = []
    for run in assignment.runs:
        chosen = assignment.choices[run.start]
        for option in dict.fromkeys(chosen.tolist()):
            names = [
                name for site, choice in zip(sites, chosen, strict=True) if choice == option for name in site.names
            ]
            rules.append((f"^{stack}/{run_name(run)}/({'|'.join(map(re.escape, names))})$", options[option]))
    return rules
