"""The decode step on prepared weights: interpreted against a twin written from the definitions, and compiled."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm
from bipolar_jax.kernels.sm90.decode_step.api import plan_decode_layers
from tests.kernels.sm90.decode_step.layers_twin import Case, check_layers, compiled, preset_case
from tests.support import sm90_compile

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

PREPARED = Case(1, 128, 128, 1, 1, 4, 8, 64, 32, prepared=True, group_size=64)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        # Parts that are more than one block's, gates that end within a vector, a product of more loads than slots.
        (dataclasses.replace(PREPARED, hidden=256, ffn=384, heads=2, calibration="minmax", group_size=128), 5),
        # Warps that take turns, a K slice of other warpgroups, and no groups, but offsets.
        (Case(1, 128, 1152, 1, 1, 8, 8, 64, 40, "minmax", True, activation=Activation("gelu"), prepared=True), 3),
        # The order of floats, and a token of few bits.
        (dataclasses.replace(PREPARED, w_bits=3, a_bits=4, group_size=16, norm=LayerNorm), 2),
        (dataclasses.replace(PREPARED, w_bits=5, cache_bits=8, length=64), 1),
        (dataclasses.replace(PREPARED, w_bits=1, a_bits=1, gain=0.05), 2),
    ],
    ids=lambda value: f"W{value.w_bits}A{value.a_bits}g{value.group_size}" if isinstance(value, Case) else f"{value}",
)
@pytest.mark.covered("the kernel, by `make gpu-test`; these phases, by test_heads_of_64.py and test_float_groups.py")
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


@pytest.mark.parametrize(
    ("name", "precision", "group_size", "cache_bits"),
    [
        ("llama-3-8b", (4, 8), 128, None),
        ("qwen2.5-7b", (8, 8), None, None),
        ("qwen2.5-7b", (3, 8), 16, None),
        ("opt-6.7b", (6, 8), 32, None),
        ("bloom-7b1", (5, 4), 64, 4),
        # Heads of queries and keys are normalized.
        ("qwen3-8b", (4, 8), 128, None),
        ("qwen3-1.7b", (4, 8), 64, 8),
        ("qwen3-0.6b", (1, 8), 128, 4),
        ("qwen3-4b", (4, None), 128, None),
    ],
)
@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.sample(1)
def test_compiles_without_spills(name, precision, group_size, cache_bits):
    fields = {"cache_bits": cache_bits, "prepared": True, "group_size": group_size}
    assert compiled(preset_case(name, *precision, **fields)).stack_bytes == 0


def planned(case: Case, **changed_kernels: Case) -> str:
    """The kernel that the plan names, some of whose weights are another case's; nothing is computed."""
    plans = []

    def plan():
        operands = case.operands()
        kernels = {name: other.operands()["kernels"][name] for name, other in changed_kernels.items()}
        plans.append(plan_decode_layers(**operands | {"kernels": operands["kernels"] | kernels}).kernel)

    jax.eval_shape(plan)
    return plans[0]


def test_the_plan_says_how_weights_are_stored():
    assert planned(PREPARED).endswith("prepared weights of 4 bits, groups of 64")
    assert planned(dataclasses.replace(PREPARED, group_size=None, w_bits=8)).endswith("prepared weights of 8 bits")


def test_the_plan_says_where_the_input_of_down_is_rotated():
    """The rows of a block are 16 here, of 132 blocks."""

    def rotated(block: int) -> Case:
        return dataclasses.replace(PREPARED, activation=Activation("silu", True, hadamard(128, block=block)))

    assert planned(rotated(16)).endswith("groups of 64, 16 numbers each rotated where gate and up are computed")
    assert planned(rotated(64)).endswith(
        "groups of 64, 64 numbers each rotated, 16 where gate and up are computed, then by every block"
    )


def test_weights_of_several_kinds_are_refused():
    planes = dataclasses.replace(PREPARED, prepared=False)
    other_groups = dataclasses.replace(PREPARED, group_size=32)
    plain = dataclasses.replace(PREPARED, activation=Activation("gelu"))
    for case, changed, message in (
        (PREPARED, {"o": planes}, "either all weights are prepared or none, o is BipolarArray"),
        (planes, {}, "qkv has integer groups in bit planes: prepare_for_inference"),
        (PREPARED, {"down": other_groups}, "integer groups of one size: down is PreparedArray"),
        (PREPARED, {"up": plain}, "up is prepared as not gated"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            planned(case, **changed)
