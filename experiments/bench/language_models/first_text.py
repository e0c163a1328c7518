"""One fresh process: from `import bipolar_jax` to a model's first text, stage by stage; run by bench/first_call.py.

    python -m experiments.bench.language_models.first_text SETTINGS

SETTINGS is a JSON object with the fields of `Settings`. The last line of standard output is "record: " and the record,
a JSON object. JAX is not imported before the clock runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections import Counter
from typing import Any

# What XLA and JAX report, by the end of the event's name; a moment counts for the first of these that covers it.
EVENTS = {
    "cache": "compilation_cache/cache_retrieval_time_sec",
    "compile": "backend_compile_duration",
    "lower": "jaxpr_to_mlir_module_duration",
    "trace": "jaxpr_trace_duration",
}
_LONGEST = 12  # programs that the record names


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the process runs.

    Attributes:
      model: name of a preset.
      replaced: fields of its config and their values, such as {"num_layers": 2}.
      precision: of its packed layers.
      prompt_tokens: length of the prompt.
      new_tokens: length of the text.
      cache_folder: of JAX's persistent compilation cache; None leaves it off.
    """

    model: str
    replaced: dict[str, Any]
    precision: str
    prompt_tokens: int
    new_tokens: int
    cache_folder: str | None


class Stages:
    """Seconds of consecutive stages, and what JAX did within them."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spans: list[tuple[str, str, float, float]] = []
        self._events: Counter[str] = Counter()
        self.rows: dict[str, dict[str, Any]] = {}

    def listen(self) -> None:
        """Counts from now on; JAX has been imported."""
        import jax.monitoring

        def took(event: str, seconds: float, fun_name: str = "", **_: Any) -> None:
            kind = next((kind for kind, end in EVENTS.items() if event.endswith(end)), None)
            if kind is not None:
                now = time.perf_counter()
                self._spans.append((kind, fun_name, now - seconds, now))

        def happened(event: str, **_: Any) -> None:
            self._events[event.rpartition("/")[2]] += 1

        jax.monitoring.register_event_duration_secs_listener(took)
        jax.monitoring.register_event_listener(happened)
        self._listeners = took, happened

    def stop(self) -> None:
        """Counts no longer."""
        import jax.monitoring

        took, happened = self._listeners
        jax.monitoring.unregister_event_duration_listener(took)
        jax.monitoring.unregister_event_listener(happened)

    def end(self, name: str) -> None:
        """Ends a stage, which began where the one before it ended."""
        now = time.perf_counter()
        by_kind = exclusive_seconds(self._spans)
        compiled = sorted(((end - start, name) for kind, name, start, end in self._spans if kind == "compile"))
        self.rows[name] = {
            "seconds": round(now - self._started, 3),
            "rest": round(now - self._started - sum(by_kind.values()), 3),
            **{kind: round(seconds, 3) for kind, seconds in by_kind.items()},
            "programs": len(compiled),
            "cache_hits": self._events["cache_hits"],
            "longest": {
                f"{name} {at}": round(seconds, 3) for at, (seconds, name) in enumerate(compiled[: -_LONGEST - 1 : -1])
            },
        }
        self._spans.clear()
        self._events.clear()
        self._started = time.perf_counter()


def exclusive_seconds(spans: list[tuple[str, str, float, float]]) -> dict[str, float]:
    """Seconds that each kind of EVENTS covers; what several cover counts for the first. Spans nest and overlap."""
    moments = sorted({moment for _, _, start, end in spans for moment in (start, end)})
    totals = dict.fromkeys(EVENTS, 0.0)
    for start, end in itertools.pairwise(moments):
        covering = {kind for kind, _, begin, finish in spans if begin <= start and end <= finish}
        kind = next((kind for kind in EVENTS if kind in covering), None)
        if kind is not None:
            totals[kind] += end - start
    return totals


def measure(settings: Settings) -> dict[str, Any]:
    """Runs the stages; what they return is the record."""
    stages = Stages()
    import jax

    if settings.cache_folder is not None:
        jax.config.update("jax_compilation_cache_dir", settings.cache_folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    import bipolar_jax as bj
    from bipolar_jax.models.inference.xla_flags import enable_command_buffers
    from bipolar_jax.models.presets import preset
    from bipolar_jax.models.random_weights import random_packed

    stages.listen()
    stages.end("import")
    enable_command_buffers()
    device = jax.devices()[0]
    stages.end("start of the device")
    config = dataclasses.replace(preset(settings.model), **settings.replaced)
    model = random_packed(config, bj.Precision.parse(settings.precision), key=jax.random.key(0))
    jax.block_until_ready(jax.tree.leaves(model))
    stages.end("random weights")
    model = bj.models.prepare_for_inference(model)
    jax.block_until_ready(jax.tree.leaves(model))
    stages.end("prepare_for_inference")
    prompt = [1 + at % (config.vocab_size - 1) for at in range(settings.prompt_tokens)]
    (text,) = bj.models.generate(model, [prompt], settings.new_tokens, end_ids=())
    stages.end("first text")
    (again,) = bj.models.generate(model, [prompt], settings.new_tokens, end_ids=())
    stages.end("second text")
    stages.stop()
    if again != text or len(text) != settings.new_tokens:
        raise ValueError(f"the same prompt was continued by {text}, then by {again}")
    return {"device": f"{device.platform}: {device.device_kind}", "stages": stages.rows}


if __name__ == "__main__":
    print("record:", json.dumps(measure(Settings(**json.loads(sys.argv[1])))), flush=True)
