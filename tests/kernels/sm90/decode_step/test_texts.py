"""The decode step of several texts: interpreted against the twin of each, its threads simulated, and compiled."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_step import part_sums, text_products, token_bytes
from bipolar_jax.kernels.sm90.decode_step.cooperative import teams
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import TEXT_SLICE_WORDS, LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.prepared_layout import PreparedLayout
from bipolar_jax.kernels.sm90.prepared_weights.expansion import Expansion
from bipolar_jax.packing.fields import expand_part
from tests.kernels.sm90.decode_step.layers_twin import SWIGLU, Case, check_layers, compiled, preset_case
from tests.support import sm90_compile, warpgroup_simulator

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

SHAPE = LayersShape(
    num_layers=1, hidden=128, ffn=128, heads=1, kv_heads=1, head_dim=128, a_format=BipolarFormat(8),
    w_format=BipolarFormat(4), norm="rms", norm_eps=1e-5, activation=SWIGLU, blocks=4, texts=2,
    prepared=PreparedLayout(0, False),
)  # fmt: skip
ROTATED = dataclasses.replace(SWIGLU, rotation=hadamard(192, block=64))
TEXTS = Case(1, 128, 128, 1, 1, 4, 8, 64, 40, prepared=True, group_size=64, texts=2)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (TEXTS, 2),
        # Three columns of four; one block of a pair quantizes one text. The last block has no rows of some products.
        (dataclasses.replace(TEXTS, texts=3, norm=LayerNorm), 3),
        # Heads of 64, sizes that end within a tile, a cache that is full, teams with more warpgroups than K slices.
        (dataclasses.replace(TEXTS, hidden=192, ffn=192, heads=2, head_dim=64, length=64, activation=ROTATED), 5),
        # A team of two warpgroups has two K slices.
        (dataclasses.replace(TEXTS, texts=4, ffn=2112, activation=Activation("relu")), 4),
    ],
    ids=["two", "three", "heads of 64", "four"],
)
@pytest.mark.covered("the phases, by test_heads_of_64.py; threads, below; the kernel, by `make gpu-test`")
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


@pytest.mark.parametrize("texts", [2, 3, 4])
def test_blocks_of_a_pair_send_each_other_their_tokens(texts, monkeypatch):
    """Each slice, sum and grid of a text once, and as many bytes as are expected; nothing to a block without rows."""
    shape, sent, expected = dataclasses.replace(SHAPE, texts=texts, hidden=576, ffn=2112, blocks=5), [], []
    monkeypatch.setattr(teams, "when", lambda condition: lambda body: body() if condition else None)
    monkeypatch.setattr(teams, "mailbox_of", lambda shape, token_sums: None)
    monkeypatch.setattr(teams, "expect_mail", lambda mailbox, size: expected.append(int(size)))
    monkeypatch.setattr(teams, "await_mail", lambda mailbox, phase: None)
    monkeypatch.setattr(
        teams, "send_mail", lambda mailbox, arrays, sections, wanted: sent.extend(sections if wanted else [])
    )
    slices, sums_shape = shape.products["down"].all_k_slices, teams.token_sums_shape(shape)
    sums = SimpleNamespace(shape=sums_shape)

    def exchange(block: int) -> tuple[int, list[tuple]]:
        """Bytes that a block expects, and the sections that it sends: array, start and size."""
        sent.clear(), expected.clear()
        for warpgroup in range(4):
            team = teams.team_of(shape, block % 2, warpgroup)
            teams.exchange_tokens(shape, "down", 0, team, None, sums, np.int32(block), lambda: None)
        return sum(expected), [(array, int(start), size) for array, start, size, wanted in sent if wanted]

    (expected_by_0, sent_by_0), (expected_by_1, sent_by_1) = exchange(0), exchange(1)
    assert [expected_by_1, expected_by_0] == [sum(size for *_, size in found) for found in (sent_by_0, sent_by_1)]
    row, both = 4 * TEXT_SLICE_WORDS, [*sent_by_0, *sent_by_1]
    assert sorted(start for array, start, _ in both if array == 0) == [row * i for i in range(slices * texts)]
    assert {start // row % texts % 2 for array, start, _ in sent_by_1 if array == 0} == {1}
    sums_and_grids = [start + i for array, start, size in both if array == 1 for i in range(0, size, 16)]
    of_text = 4 * sums_shape[1]
    for text in range(texts):
        found = {start % of_text for start in sums_and_grids if start // of_text == text}
        assert found == {16 * (text // 2 * shape.warpgroups_of_text + i) for i in range(shape.warpgroups_of_text)} | {
            64
        }
    assert len(sums_and_grids) == texts * (shape.warpgroups_of_text + 1)
    # Five blocks have rows: the last one's other sends to it, and gets nothing.
    (expected_by_4, sent_by_4), (expected_by_5, sent_by_5) = exchange(4), exchange(5)
    assert (expected_by_4, sent_by_4) == (sum(size for *_, size in sent_by_5), [])
    assert expected_by_5 == 0


@pytest.mark.parametrize("texts", [2, 3, 4])
def test_threads_multiply_the_tokens_of_texts(texts, monkeypatch):
    """One load of a slice, and the sums of a part at the place of each text."""
    warpgroup_simulator.install(monkeypatch)
    shape = dataclasses.replace(SHAPE, texts=texts)
    rng, (bits, max_rows) = np.random.default_rng(texts), (4, shape.max_rows)
    words = rng.integers(0, 2**32, (4, bits, 128), np.uint32)
    tokens = rng.integers(0, 2**32, (texts, TEXT_SLICE_WORDS), np.uint32)
    expansion = Expansion(bits, 0)
    token = text_products.token_of_lane(ptx.pointer(tokens, ptx.SHARED), shape)
    total, pointers = [np.zeros(128, np.int32)] * 8, [ptx.pointer(words, ptx.SHARED), token]
    warpgroup_simulator.bank_conflicts[0] = 0
    total = part_sums.add_stages_of_warp(total, pointers, ptx.int32(1), [], 4, expansion)
    assert warpgroup_simulator.bank_conflicts[0] == 0
    sums = np.zeros(texts * max_rows, np.int32)
    text_products.add_sums_of_warp(ptx.pointer(sums, ptx.SHARED), total, ptx.int32(3), 48, shape)
    weights = np.asarray(expand_part(jnp.asarray(words), None), np.int64)
    for text, found in enumerate(sums.reshape(texts, max_rows)):
        numbers = np.asarray(token_bytes.positions_of(jnp.asarray(tokens[text, :-4])), np.int64)[4:]
        expected, wanted = np.einsum("srk,sk->r", weights, numbers), np.zeros(max_rows, np.int64)
        wanted[3:19], wanted[51:67] = expected[:16], expected[16:]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "precision", "group_size", "cache_bits", "texts"),
    [
        ("llama-3-8b", (4, 8), 128, None, 4),
        ("llama-3-8b", (8, 8), None, None, 3),
        ("llama-3-8b", (3, 8), 128, None, 4),
        ("llama-3-8b", (4, 8), 128, 8, 4),
        ("qwen3-8b", (4, 8), 128, 4, 4),
    ],
)
@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.covered("spills of prepared steps, by test_prepared_step.py; numbers of all kinds, by `make gpu-test`")
def test_compiles_without_spills(name, precision, group_size, cache_bits, texts):
    fields = {"cache_bits": cache_bits, "prepared": True, "group_size": group_size, "texts": texts}
    assert compiled(preset_case(name, *precision, **fields)).stack_bytes == 0
