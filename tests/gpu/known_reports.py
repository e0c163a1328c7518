"""Reports of compute-sanitizer that are false, each with the reason; `make gpu-test` fails on every other report.

An entry matches one kind of report of one kernel: `text` must match the whole report, with addresses and numbers of
hazards left out by `sanitizer.normalized`. Add one only after the code has been read: the reason names the barrier, or
the instruction, that orders the two accesses and that the tool does not follow.
"""

from __future__ import annotations

import dataclasses
import re


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


_QUANTIZE_ROWS = r"quantize_rows_mosaic_gpu_kernel\+0x\? in launch\.py:\d+"

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
)
