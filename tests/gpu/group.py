"""Runs the cases of one group in this process: `python -m tests.gpu.group NAME --log PATH [--threads N]`.

The log has one JSON object a line, written at once, so that the runner knows which case hung: {"cases": number} first,
then {"started": name} before a case and {"case", "error", "seconds", "kernels"} after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Callable

from tests.gpu.trial import Case, run_cases

# Module under tests.gpu.cases and the function that makes the group's cases, with its arguments.
GROUPS: dict[str, tuple[str, str, tuple]] = {
    **{
        f"integer products, {kernel}, {weights}": ("products", "cases", (kernel, weights))
        for kernel in ("gemm", "few tokens")
        for weights in ("W1 to W4", "W5 to W8 and ternary")
    },
    "integer products of prepared weights": ("expanded_products", "cases", ()),
    "integer products of prepared weights, few tokens": ("prepared_few_tokens", "cases", ()),
    **{
        f"scaled products, {kind}, {tokens} tokens": ("scaled_products", "cases", (weights, tokens))
        for kind, weights in (("planes", "planes"), ("expanded weights", "expanded"))
        for tokens in ("few", "many")
    },
    "products of prepared weights, float groups": ("float_groups", "cases", ()),
    "weight-only products": ("weight_only", "cases", ()),
    "float activations and prepared weights": ("float_products", "cases", ()),
    "quantizer": ("quantizer", "cases", ()),
    "packing and expansion of weights": ("weights", "cases", ()),
    "heads of prompts": ("heads", "cases", ()),
    "signs": ("signs", "cases", ()),
    "attention to the cache": ("attention", "cases", ()),
    **{
        f"decode step, {model}": ("decode_step", "cases", (model,))
        for model in ("llama-2-7b", "llama-3-8b", "opt-6.7b", "bloom-7b1", "qwen2.5-7b", "smollm2-135m", "smollm2-1.7b")
    },
    **{
        f"decode step of prepared weights, {model}": ("decode_step", "prepared_cases", (model,))
        for model in ("llama-3-8b", "qwen2.5-7b", "smollm2-135m", "smollm2-1.7b", "qwen3-1.7b")
    },
}


def cases_of(group: str) -> list[Case]:
    """Raises KeyError for a group that does not exist."""
    module, function, arguments = GROUPS[group]
    make: Callable[..., list[Case]] = getattr(importlib.import_module(f"tests.gpu.cases.{module}"), function)
    return make(*arguments)


def part_of(cases: list[Case], part: str) -> list[Case]:
    """Of a part "2/3" every third case, from the second on. Raises ValueError for another text."""
    first, _, count = part.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ValueError(f'a part is "1/3", "2/3" or "3/3", for another number of parts likewise; got "{part}"')
    return cases[int(first) - 1 :: int(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--log", required=True)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--part", default="1/1", help="see tests.gpu.run")
    options = parser.parse_args()
    with open(options.log, "a", buffering=1) as log:
        cases = part_of(cases_of(options.group), options.part)
        log.write(json.dumps({"cases": len(cases)}) + "\n")
        for outcome in run_cases(
            cases,
            options.threads,
            started=lambda name: log.write(json.dumps({"started": name}) + "\n"),
        ):
            record = dataclasses.asdict(outcome)
            log.write(json.dumps({"case": record.pop("name"), **record}) + "\n")


if __name__ == "__main__":
    main()
