"""experiments/bench/llm.py on a tiny model and XLA."""

from __future__ import annotations

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import bipolar_jax as bj
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer
from configs.bench import llm as llm_config
from experiments.bench import llm
from experiments.bench.language_models import peers, report
from experiments.bench.language_models.report import add_speedups, print_tables
from experiments.bench.language_models.workload import CompiledWorkload, Workload, parse_workloads, read_bytes
from experiments.support import device_lock, kernel_times
from experiments.support.workdir import RESULT_NAME

pytestmark = pytest.mark.usefixtures("compiled_programs")
CONFIG = TransformerConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48, context_length=64
)
PARTS = ("prefill", "decode")
MAKE_MODEL = llm.make_model


def make_model(config, shape, precision):
    """Replaces `llm.make_model`, whose layers are prepared for inference."""
    model = Transformer(shape, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(config.seed))
    if precision is None:
        return model
    return bj.quantize_model(model, [("^layers/", precision)], implementation=config.implementation)


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    monkeypatch.setattr(llm, "preset", lambda name: CONFIG)
    monkeypatch.setattr(llm, "make_model", make_model)


def bench(**fields):
    config = llm_config.get_config()
    small = {"model": "tiny", "implementation": "xla", "iterations": 2, "precisions": "W2A2", "workloads": "2x5+3"}
    for name, value in (small | {"profile": ""} | fields).items():
        config[name] = value
    return config


def read(folder):
    return json.loads((folder / RESULT_NAME).read_text())


@pytest.fixture(scope="module")
def run(compiled_programs, tmp_path_factory):
    """A run with an 8-bit cache, a profile, and a peer that is not installed: its folder, how it had the lock."""
    folder = tmp_path_factory.mktemp("bench_llm")
    states = []

    def noting(name, function):
        def noted(*args, **options):
            states.append((name, device_lock._state))
            return function(*args, **options)

        return noted

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(llm, "preset", lambda name: CONFIG)
        monkeypatch.setattr(llm, "make_model", noting("make", make_model))
        monkeypatch.setattr(jax.stages.Lowered, "compile", noting("compile", jax.stages.Lowered.compile))
        for name in ("check", "time_prefill", "time_decode"):
            monkeypatch.setattr(CompiledWorkload, name, noting(name, getattr(CompiledWorkload, name)))
        monkeypatch.setattr(llm, "save_result", noting("save", llm.save_result))
        monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
        config = bench(precisions="W2A8", cache_bits=8, profile="W2A8", peers="transformers")
        llm.main(config, folder)
    return folder, states


@pytest.fixture(scope="module")
def folder(run):
    return run[0]


def test_models_are_made_and_compiled_beside_others_and_timed_alone(run):
    folder, states = run
    alone = {(name, "alone") for name in ("check", "time_prefill", "time_decode", "save")}
    compiled = {("compile", "shared"), ("compile", "alone")}  # of the packed model, and of bf16, which XLA autotunes
    assert set(states) == alone | compiled | {("make", "shared")}
    for rows in read(folder)["models"].values():
        assert rows["make_seconds"] > 0
        assert set(rows["workloads"]["2x5+3"]["seconds"]) == {"compile", "check", "time", "wait"}


def test_prefill_and_decoding_are_timed_against_bf16(folder):
    models = read(folder)["models"]
    assert list(models) == ["W2A8", "bf16"]
    for rows in models.values():
        ((name, measured),) = rows["workloads"].items()
        assert name == "2x5+3"
        baseline = models["bf16"]["workloads"][name]
        for part in PARTS:
            microseconds = measured[part]["microseconds"]
            assert microseconds > 0
            assert (measured[part]["clock"], measured[part]["iterations"]) == ("wall", 2)
            assert measured[part]["speedup"] == pytest.approx(baseline[part]["microseconds"] / microseconds, abs=1e-3)
        decode, memory = measured["decode"], measured["memory"]
        assert decode["tokens_per_second"] == pytest.approx(1e6 * 2 / decode["microseconds"], rel=1e-3, abs=0.1)
        moved = memory["read_bytes"] + memory["cache_bytes"]
        assert decode["bandwidth_share"] == pytest.approx(moved / decode["microseconds"] / 4.1e6, rel=0.01)
        assert memory["peak_bytes"] is None, "not reported by CPUs"
        vectors = 2 * CONFIG.num_layers * 2 * CONFIG.num_kv_heads * 64  # positions, rounded up
        assert memory["cache_bytes"] == vectors * (CONFIG.head_dim + 4 + 1) + 4 * 2
    # Decode steps read an 8-bit cache; in a small float model bfloat16 may round its error away.
    errors = {name: models[name]["workloads"]["2x5+3"]["check_error"] for name in ("bf16", "W2A8")}
    assert errors["bf16"] < 0.05
    assert 0 < errors["W2A8"] < 0.05


def test_the_result_has_settings_peers_and_profiles(folder):
    result = read(folder)
    assert "xla_flags" in result["environment"]
    assert result["settings"]["cache_bits"] == 8
    error = {"error": "ModuleNotFoundError: torch is not installed"}
    assert result["peers"] == {"transformers": {"workloads": {"2x5+3": error}}}
    nothing = {"microseconds": 0, "kernels": []}  # no GPU
    assert result["profiles"] == {"W2A8": {"workload": "2x5+3", "prefill": nothing, "decode": nothing}}
    assert (folder / "speedup.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.covered("resuming, by test_bench_matmul.py")
def test_a_stopped_run_resumes_and_retries_failures(tmp_path, monkeypatch):
    original = CompiledWorkload.check

    def broken(self):
        if self.workload.batch == 2:
            raise ValueError("planted\nfailure")
        return original(self)

    monkeypatch.setattr(CompiledWorkload, "check", broken)
    llm.main(bench(workloads="1x4+2,2x5+3"), tmp_path)
    before = read(tmp_path)["models"]["W2A2"]["workloads"]
    assert before["2x5+3"] == {"error": "ValueError: planted"}
    checked = []
    monkeypatch.setattr(CompiledWorkload, "check", lambda self: checked.append(self.workload.name) or original(self))
    llm.main(bench(workloads="1x4+2,2x5+3"), tmp_path)
    assert checked == ["2x5+3", "2x5+3"], "of W2A2 and of bf16"
    after = read(tmp_path)["models"]["W2A2"]["workloads"]
    assert after["1x4+2"]["prefill"]["microseconds"] == before["1x4+2"]["prefill"]["microseconds"]
    assert "decode" in after["2x5+3"]
    with pytest.raises(ValueError, match="seed: stored 0, now 1"):
        llm.main(bench(seed=1), tmp_path)


def test_a_model_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def failing(config, shape, precision):
        if precision is not None:
            raise MemoryError("planted")
        return make_model(config, shape, precision)

    monkeypatch.setattr(llm, "make_model", failing)
    llm.main(bench(precisions="W2A2,W1A1"), tmp_path)
    models = read(tmp_path)["models"]
    assert list(models) == ["W1A1", "W2A2", "bf16"], "fewest weight bits first"
    assert models["W2A2"]["workloads"] == {"2x5+3": {"error": "MemoryError: planted"}}
    assert "decode" in models["bf16"]["workloads"]["2x5+3"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workloads": "8x512"}, "workload '8x512' is not of the form 8x512\\+128"),
        ({"workloads": "1x1+1"}, "a prompt of 2"),
        ({"workloads": "1x60+5"}, "exceeds the model's context of 64"),
        ({"precisions": "W9A8"}, "from 1 to 8"),
        ({"cache_bits": 3}, "cache_bits must be 8 or 4"),
        ({"baselines": "fp16"}, "config.baselines names fp16: choose from bf16, bf16 cuBLAS"),
        ({"profile": "W4A4"}, "config.profile names W4A4: choose from W2A2, bf16"),
        ({"peers": "llama"}, "config.peers names llama: choose from transformers"),
        ({"implementation": "cuda"}, "implementation"),
    ],
)
def test_wrong_configs_are_rejected_before_a_model_is_made(tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(llm, "make_model", lambda *_: pytest.fail("made a model"))
    with pytest.raises(ValueError, match=message):
        llm.main(bench(**fields), tmp_path)


def test_the_loop_decodes_greedily_from_the_prompts():
    model = make_model(bench(), CONFIG, None)
    compiled = CompiledWorkload(model, Workload(2, 5, 4))
    _, cache = compiled._prefill(model, compiled.ids, compiled.lengths)
    largest, cache = compiled._decode(model, compiled.ids[:, -1], compiled._rewound(cache))
    text = np.pad(compiled.ids, ((0, 0), (0, 4)))
    of_text = jax.jit(lambda model, ids: model(ids))
    for step, position in enumerate(range(4, 8)):
        logits = of_text(model, jnp.asarray(text))[:, position]
        # bfloat16 keeps 8 bits.
        np.testing.assert_allclose(largest[step], jnp.max(logits, axis=-1), rtol=0.03)
        text[:, position + 1] = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(cache.lengths, [8, 8])


def test_packed_models_may_rotate_at_run_time():
    for block, ffn in ((0, bj.ops.Hadamard((12, 4))), (16, bj.ops.Hadamard((16,), 3))):
        model = MAKE_MODEL(bench(rotated=True, rotation_block=block), CONFIG, bj.Precision(2, 2))
        rotation = model.config.rotation
        assert (rotation.stream, rotation.ffn, rotation.keys) == (None, ffn, bj.ops.hadamard(8))
    assert MAKE_MODEL(bench(), CONFIG, bj.Precision(2, 2)).config.rotation is None


def test_nonfinite_logits_are_an_error():
    model = make_model(bench(), CONFIG, None)
    model.final_norm.scale[...] = jnp.full_like(model.final_norm.scale[...], jnp.nan)
    with pytest.raises(ValueError, match="prefill gives logits that are not finite"):
        CompiledWorkload(model, Workload(1, 3, 1)).check()


def test_a_decode_step_reads_all_weights_but_the_embedding():
    model = make_model(bench(), CONFIG, None)
    every = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert read_bytes(model) == every - model.embed.embedding[...].nbytes


def test_duplicate_workloads_are_removed():
    assert parse_workloads("8x5+3, 1x2+1,8x5+3", 64) == [Workload(8, 5, 3), Workload(1, 2, 1)]


def test_speed_ups_are_over_the_faster_baseline():
    def rows(prefill, decode):
        return {
            "workloads": {
                "1x4+2": {part: {"microseconds": t} for part, t in zip(PARTS, (prefill, decode), strict=True)}
            }
        }

    failed = {"workloads": {"1x4+2": {"error": "x"}}}
    result = {"models": {"W1A1": rows(2.0, 4.0), "bf16": rows(6.0, 9.0), "other": rows(8.0, 6.0), "W2A2": failed}}
    result["peers"] = {"transformers": rows(3.0, 3.0)}
    add_speedups(result, ["bf16", "other"])
    speedups = {
        name: [row["workloads"]["1x4+2"].get(part, {}).get("speedup") for part in PARTS]
        for name, row in (result["models"] | result["peers"]).items()
    }
    assert speedups == {
        "W1A1": [3.0, 1.5],
        "bf16": [1.0, 0.667],
        "other": [0.75, 1.0],
        "W2A2": [None, None],
        "transformers": [2.0, 2.0],
    }


def test_the_table_has_no_memory_of_peers(monkeypatch):
    """Peers report their peak memory only, which includes building the model."""
    ours = {"weight_bytes": 2e9, "cache_bytes": 1e9, "prefill_temporary_bytes": 5e8, "decode_temporary_bytes": 1e8}
    rows = {
        name: {
            "workloads": {
                "1x4+2": {
                    "prefill": {"microseconds": 6000.0},
                    "decode": {"microseconds": 4000.0, "tokens_per_second": 250.0},
                    "memory": memory | {"peak_bytes": 9e9},
                }
            }
        }
        for name, memory in (("W1A1", ours), ("transformers", {}))
    }
    result = {"settings": {"model": "tiny", "device": "cpu", "calibration": "absmax"}, "profiles": {}}
    result |= {"models": {"W1A1": rows["W1A1"]}, "peers": {"transformers": rows["transformers"]}}
    console = Console(width=200, record=True)
    monkeypatch.setattr(report, "console", console)
    print_tables(result)
    printed = [line.strip(" │").split("│") for line in console.export_text().splitlines() if "1x4+2" in line]
    assert [[cell.strip() for cell in line] for line in printed] == [
        ["1x4+2", "W1A1", "6.00", "-", "4.000", "-", "250", "-", "3.50", "-"],
        ["1x4+2", "transformers", "6.00", "-", "4.000", "-", "250", "-", "-", "-"],
    ]


def write_trace(folder):
    """Writes a GPU trace: streams, a line that spans the same kernels again, and the host."""
    names = [(1, None, "process_name", "/device:GPU:0"), (2, None, "process_name", "/host:CPU")]
    names += [(1, 10, "thread_name", "Stream #13(Compute)"), (1, 11, "thread_name", "XLA Modules")]
    names += [(2, 10, "thread_name", "Stream #13")]
    events = [
        {"ph": "M", "pid": pid, "name": kind, "args": {"name": name}} | ({} if tid is None else {"tid": tid})
        for pid, tid, kind, name in names
    ]
    for pid, tid, name, microseconds in [
        (1, 10, "matmul", 5.0),
        (1, 10, "matmul", 7.0),
        (1, 10, "add", 1.5),
        (1, 11, "jit_decode", 99.0),
        (2, 10, "matmul", 99.0),
    ]:
        events.append({"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": 0.0, "dur": microseconds})
    file = folder / "plugins" / "profile" / "now" / "vm.trace.json.gz"
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt") as stream:
        json.dump({"traceEvents": events}, stream)


def test_kernel_times_are_summed_by_name_over_streams(tmp_path):
    write_trace(tmp_path)
    times, calls = kernel_times.read_kernel_times(tmp_path)
    assert (times, calls) == ({"matmul": 12.0, "add": 1.5}, {"matmul": 2, "add": 1})


def test_a_profile_is_of_one_step_and_prints(monkeypatch, capsys):
    monkeypatch.setattr(
        kernel_times, "read_kernel_times", lambda _: ({"matmul": 12.0, "add": 1.5}, {"matmul": 4, "add": 2})
    )
    profile = kernel_times.profile_kernels(lambda: None, steps=2, most=1)
    assert profile == {"microseconds": 6.75, "kernels": [{"name": "matmul", "microseconds": 6.0, "calls": 2.0}]}
    settings = {"model": "tiny", "device": "cpu", "calibration": "absmax"}
    print_tables(
        {
            "settings": settings,
            "models": {},
            "peers": {},
            "profiles": {"W2A2": {"workload": "1x4+2", "prefill": {"kernels": []}, "decode": profile}},
        }
    )
    printed = capsys.readouterr()
    assert "matmul" in printed.out + printed.err
