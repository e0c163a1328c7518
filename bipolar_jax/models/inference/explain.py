"""Which kernels a model runs, step by step, and why the fused ones are not taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.attention import explain_attention_to_cache, explain_causal, prompts_alibi
from bipolar_jax.models.blocks.fused_decode import explain_fused_layers
from bipolar_jax.models.blocks.prompt_heads import explain_prompt_heads, prompt_tables
from bipolar_jax.models.blocks.rope import Tables, TablesByKind, tables_of_layer
from bipolar_jax.models.blocks.scoring import Scoring
from bipolar_jax.models.blocks.step import Step, post_norm_step, product_step
from bipolar_jax.models.inference.prompts import round_up_length
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.transformer import DecoderLayer, Transformer, check_transformer
from bipolar_jax.nn.compressible import run_name


@runtime_checkable
class SharedModel(Protocol):
    """A model whose parts run on several devices; `models.sharding` has it."""

    def trace(self, function: Callable[..., None], ids: Int[Array, "batch length"], lengths: Any) -> Any:
        """Traces function(model of one device, its ids, its lengths, what makes that model cut prompts)."""


@dataclasses.dataclass(frozen=True)
class RunExplanation:
    """The kernels of equal layers, which are one scanned stack.

    Attributes:
      layers: their indices in the model.
      prefill, decode: steps of one layer, in order; or in decode the one step of all of them.
      not_one_kernel: why they do not run as one kernel in a decode step; None if they do.
    """

    layers: range
    prefill: tuple[Step, ...]
    decode: tuple[Step, ...]
    not_one_kernel: str | None

    def rows(self, phase: str, steps: tuple[Step, ...]) -> list[tuple[tuple[str, ...], list[str]]]:
        """Cells and notes of one phase's steps."""
        where = f"layer{'s' if len(self.layers) > 1 else ''} {run_name(self.layers)}"
        rows = [((phase, where, *_cells(step)), _notes(step)) for step in steps]
        if phase == "decode" and self.not_one_kernel is not None:
            rows[0][1].insert(0, f"not one kernel for all layers: {self.not_one_kernel}")
        return rows


@dataclasses.dataclass(frozen=True)
class ModelExplanation:
    """The kernels of a model; its `str` is a table.

    Attributes:
      workload: model, batch, lengths, cache and device in words.
      runs: the layers, those that are equal together.
      output: the output layer of both phases, which make logits of one position of each sequence.
    """

    workload: str
    runs: tuple[RunExplanation, ...]
    output: Step

    @property
    def prefill(self) -> tuple[Step, ...]:
        """The steps of a layer of the first run, then of the next."""
        return tuple(step for run in self.runs for step in run.prefill)

    @property
    def decode(self) -> tuple[Step, ...]:
        """Likewise of a decode step."""
        return tuple(step for run in self.runs for step in run.decode)

    @property
    def not_one_kernel(self) -> str | None:
        """Why the layers of a run are not one kernel in a decode step; None if they are in every run."""
        return next((run.not_one_kernel for run in self.runs if run.not_one_kernel is not None), None)

    def __str__(self) -> str:
        rows = []
        for phase in ("prefill", "decode"):
            for run in self.runs:
                rows += run.rows(phase, run.prefill if phase == "prefill" else run.decode)
            rows.append(((phase, "output", *_cells(self.output)), _notes(self.output)))
        return "\n".join([self.workload, *_table([cells for cells, _ in rows], [notes for _, notes in rows])])


def _cells(step: Step) -> tuple[str, str, str]:
    return step.name, step.runs.implementation, f"{step.runs.kernel} ({step.runs.reason})"


def _notes(step: Step) -> list[str]:
    notes = [] if step.not_fused is None else [f"not fused: {step.not_fused}"]
    return notes + [f"not {name}: {why}" for name, why in step.runs.passed_over.items()]


def _table(rows: list[tuple[str, ...]], notes: list[list[str]]) -> Iterator[str]:
    """Aligned rows, each followed by its notes, which are indented; a note that repeats the one before is left out."""
    header = ("phase", "where", "step", "backend", "kernel (reason)")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    previous: list[str] = []
    yield "  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip()
    for row, row_notes in zip(rows, notes, strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield from (f"      {note}" for note in row_notes if note not in previous)
        previous = row_notes


def explain_model(
    model: Transformer | SharedModel,
    batch: int,
    length: int,
    *,
    capacity: int | None = None,
    cache_bits: int | None = None,
) -> ModelExplanation:
    """Which kernels would read prompts and write text on the default device; compiles and computes nothing.

    The functions that plan each step are those that run it; see `explain` for a single product.

    Args:
      model: the model, or its shapes alone (`nnx.eval_shape`); of one that is cut (`shard_model`), those of a device.
      batch: sequences.
      length: tokens that the prompts are padded to; `generate` rounds them up to a multiple of 64.
      capacity: positions of the cache; None takes the next multiple of 64 above `length`, within the model's context.
      cache_bits: bits of the cached keys and values, 8 or 4; None keeps the model's dtype.

    Raises:
      ValueError: no Transformer; operands that do not fit, such as other cache_bits or prompts beyond the capacity.
      Unsupported: a layer names a backend that does not serve its product.
    """
    check_transformer(model)
    if batch < 1 or length < 1:
        raise ValueError(f"needs at least 1 sequence of 1 token, got {batch=} and {length=}")
    config = model.config
    if capacity is None:
        capacity = max(length, min(round_up_length(length + 1), config.context_length))
    found: list[ModelExplanation] = []

    is_shared = isinstance(model, SharedModel)

    def trace(model, ids, lengths, for_prompts=lambda model: model):
        config, (batch, _) = model.config, ids.shape
        hidden, tables = model.enter_prompts(ids, capacity)
        cache = model.empty_cache(hidden.dtype, lengths, capacity, cache_bits)
        token, token_tables = model.enter_tokens(ids[:, 0], cache)
        runs = []
        for run, stack in model.stacks:
            layer, not_one_kernel = jax.tree.map(lambda leaf: leaf[0], stack), None
            try:
                operands = (stack, config, token, token_tables, cache, run.start)
                decode = (explain_fused_layers(*operands, most_sequences=model.fused_sequences),)
            except Unsupported as reason:
                decode, not_one_kernel = tuple(_decode_steps(model, layer, token, token_tables, cache)), str(reason)
            runs.append(RunExplanation(run, (), decode, not_one_kernel))
        output = product_step("logits", model.output_layer, token[:, 0])
        model = for_prompts(model)
        for index, (_, stack) in enumerate(model.stacks):
            layer = jax.tree.map(lambda leaf: leaf[0], stack)
            prefill = tuple(_prefill_steps(model, layer, hidden, tables, cache))
            runs[index] = dataclasses.replace(runs[index], prefill=prefill)
        numbers = hidden.dtype.name if cache_bits is None else f"{cache_bits}-bit numbers"
        found.append(
            ModelExplanation(
                f"{config.num_layers} layers, batch {batch}, prompts of {length} tokens, cache of {capacity} positions "
                f"in {numbers}, {default_device().device_kind}",
                tuple(runs),
                output,
            )
        )

    operands = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    jax.eval_shape((lambda model, *operands: model.trace(trace, *operands)) if is_shared else trace, model, *operands)
    return found[0]


def _prefill_steps(
    model: Transformer,
    layer: DecoderLayer,
    hidden: Float[Array, "batch length hidden"],
    tables: Tables | TablesByKind[Tables] | None,
    cache: KVCache,
) -> Iterable[Step]:
    """The steps of one layer in `Transformer.prefill`."""
    alibi = model.config.positions == "alibi"
    queries = model.queries(hidden)
    projections = layer.attention.projections(model.own_tokens(hidden), layer.attention_norm)
    prompt, scoring = None if tables is None else prompt_tables(model.config, tables), _first_scoring(model)
    prompt = tables_of_layer(prompt, scoring.windowed)
    yield from explain_prompt_heads(projections, prompt, cache, jnp.int32(0))
    yield explain_causal(queries, prompts_alibi(queries) if alibi else None, scoring)
    hidden = model.own_tokens(hidden)
    yield from _steps_after_attention(layer, hidden)


def _decode_steps(
    model: Transformer,
    layer: DecoderLayer,
    hidden: Float[Array, "batch 1 hidden"],
    tables: Tables | TablesByKind[Tables] | None,
    cache: KVCache,
) -> Iterable[Step]:
    """The steps of one layer in `Transformer.decode`, where the layers are not one kernel."""
    projections = layer.attention.projections(hidden, layer.attention_norm)
    yield from projections.explain()
    options = dict(alibi=model.config.positions == "alibi", scoring=_first_scoring(model))
    tables = tables_of_layer(tables, options["scoring"].windowed)
    yield explain_attention_to_cache(projections.empty_heads(), cache, jnp.int32(0), tables, **options)
    yield from _steps_after_attention(layer, hidden)


def _first_scoring(model: Transformer) -> Scoring:
    """That of the first layer: what runs does not depend on which layers have windows, only on whether some do."""
    return Scoring.of(model.config).at(jnp.int32(0))


def _steps_after_attention(layer: DecoderLayer, hidden: Float[Array, "batch length hidden"]) -> Iterable[Step]:
    after_attention, after_ffn = layer.post_norms
    yield product_step("o", layer.attention.o_proj, hidden)
    if after_attention is not None:
        yield post_norm_step("o")
    yield from layer.ffn.explain(hidden, layer.ffn_norm, after_ffn)
