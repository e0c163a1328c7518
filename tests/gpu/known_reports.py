"""Reports of compute-sanitizer that are false, each with the reason; `make gpu-test` fails on every other report.

An entry matches one kind of report of one kernel: `text` must match the whole report, with addresses and numbers of
hazards left out by `sanitizer.normalized`. Add one only after the code has been read: the reason names the barrier, or
the instruction, that orders the two accesses and that the tool does not follow.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable

from bipolar_jax.kernels.sm90.decode_attention.reduce import store_totals
from bipolar_jax.kernels.sm90.decode_attention.tiles import store_tile_sums


@dataclasses.dataclass(frozen=True)
class KnownReport:
    """A false report.

    Attributes:
      tool: "racecheck" or "memcheck".
      kernel: name of the kernel in `sanitized.KERNELS`.
      text: regular expression for the whole normalized report.
      reason: what orders the accesses.
    """

    tool: str
    kernel: str
    text: str
    reason: str

    def matches(self, tool: str, kernel: str, report: str) -> bool:
        return (self.tool, self.kernel) == (tool, kernel) and re.fullmatch(self.text, report) is not None


def lines_of(function: Callable) -> str:
    """Regular expression for the place in a report of an instruction of a function: "FILE.py:LINE"."""
    lines, first = inspect.getsourcelines(function)
    name = inspect.getmodule(function).__name__.rpartition(".")[2]
    return rf"{name}\.py:(?:{'|'.join(str(first + i) for i in range(len(lines)))})"


_QUANTIZE_ROWS = r"quantize_rows_mosaic_gpu_kernel\+0x\? in launch\.py:\d+"

_DECODE_ATTENTION = r"decode_attention_mosaic_gpu_kernel\+0x\? in"

KNOWN: tuple[KnownReport, ...] = (
    KnownReport(
        "racecheck",
        "decode step",
        rf"Warning: Race reported between Read access at {_QUANTIZE_ROWS}"
        rf"(\s+and Write access at {_QUANTIZE_ROWS} \[\? hazards\])+|"
        r"Warning: \(Warp Level Programming\) Potential (WAR|RAW) hazard detected at "
        r"__shared__ 0x\? in block \(\?\) :\n"
        rf"(Read|Write) Thread \(\?\) at {_QUANTIZE_ROWS}\n(Write|Read) Thread \(\?\) at {_QUANTIZE_ROWS}\n"
        r"Current Value : \?(, Incoming Value : \?)?",
        "Lanes without a block of their own load the row's last block (`RowThreads.over_blocks`), which its owner may "
        "be replacing by the activation's values (`RowThreads.store`). What they load is masked: by `present` from "
        "the extremes, by `RowQuantizer._valid_bits` from the codes.",
    ),
    # The machine code for sm_90a at this size, straight on; no jump leads past a barrier:
    #   3960 to 3a60  STS.64                      all of `store_tile_sums`
    #   3a70          WARPSYNC.ALL                lanes that have no query come here, so that a warp arrives once
    #   3aa0          BAR.SYNC.DEFER_BLOCKING 0x0 all 256 threads; warpgroups use barriers 1 and 2 for themselves
    #   3ae0 to 3c00  LDS                         all of `store_totals`
    # If the tool missed the barrier, it would report all 262144 bytes that warpgroups read of each other; it reported
    # 8456 and 7544 of them in two runs, in other blocks each time. If the barrier let warps through early, some reads
    # would come before the writes; all came after. So the tool loses the barrier of some warps; why is not known. It
    # does with `bar.warp.sync` and `bar.sync 0` too, of which ptxas makes the same. WAR hazards still fail.
    KnownReport(
        "racecheck",
        "attention, tiles",
        r"Error: Potential RAW hazard detected at __shared__ 0x\? in block \(\?\) :\n"
        rf"Write Thread \(\?\) at {_DECODE_ATTENTION} {lines_of(store_tile_sums)}\n"
        rf"Read Thread \(\?\) at {_DECODE_ATTENTION} {lines_of(store_totals)}\n"
        r"Current Value : \?",
        "`meet_block` between them in `launch.py` is `barrier.sync 0` of all threads of the block. Without it the race "
        "detector of interpret mode finds the race: `pytest tests/kernels/sm90/decode_attention -k in_turn`.",
    ),
)
