"""What the devices of a compiled program exchange."""

from __future__ import annotations

import re
from typing import Any

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
_OPERATION = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(-start)?\(")


def collectives(program: Any) -> list[tuple[str, str]]:
    """Kind and shapes of each collective operation of a compiled program, such as ("all-reduce", "s32[4] s32[4,12]").

    One in a loop, such as that over layers, counts once. Programs that differ in order alone give the same list.
    """
    found = []
    for line in program.as_text().splitlines():
        if match := _OPERATION.search(line):
            shapes = re.findall(r"\w+\[[\d,]*\]", re.sub(r"\{[^}]*\}", "", match["result"]))
            found.append((match["kind"], " ".join(shapes)))
    return sorted(found)
