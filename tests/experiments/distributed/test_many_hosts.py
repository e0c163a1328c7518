"""The page of bytes a link: numbers that are counted by hand for a tiny model, and meshes that are refused."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from configs.distributed import many_hosts as many_hosts_config
from experiments.distributed import many_hosts
from experiments.distributed.many_hosts import Layout

TINY = {
    "hidden_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "ffn_size": 256,
    "vocab_size": 64,
    "context_length": 64,
}
ONE = TINY | {"num_heads": 1, "num_kv_heads": 1, "ffn_size": 32}


def test_sums_over_hosts_pass_each_link_once():
    within, across = Layout(1, 8, 8), Layout(1, 32, 8)
    assert within.over_model(800.0) == (1400.0, 0.0)  # 2 * 7 / 8 of 800
    assert across.over_model(800.0) == (1400.0, 150.0)  # then 2 * 3 / 4 of 100 a GPU
    assert Layout(16, 8, 8).over_data(80.0) == (0.0, 150.0)  # one device of a host has a gradient of its own
    assert Layout(16, 2, 8).over_data(80.0) == (120.0, 30.0)


def test_the_page_says_what_is_assumed_and_what_is_refused(tmp_path):
    config = many_hosts_config.get_config()
    config.models, config.meshes, config.texts = ConfigDict({"tiny": TINY, "without cuts": ONE}), "1x2,1x3", 4
    config.precision, config.gpus_per_host, config.cached_tokens = "W4A8g32", 6, 8
    # Of one device, 8 tokens through two layers of 128 x (128 + 128 + 64 + 64 + 3 x 256) in a second.
    config.products.operations_per_second = 8 * 2 * 2 * 128 * 1152.0
    many_hosts.main(config, tmp_path)
    page = (tmp_path / many_hosts.PAGE).read_text()
    assert "| network | 50 | 30 | **assumed**, not measured |" in page
    # Four reductions of 4 bytes of 4 tokens and the columns' sums, and of 8 bytes a token: over two devices once each.
    sent = 4 * (4 * (4 + 1) * 128 + 8 * 4)
    row = next(line for line in page.splitlines() if line.startswith("| 2 | 1x2 |"))
    assert row.split(" | ")[5] == f"{sent / 4 / 1e3:,.0f}"
    # A prompt of 8 tokens: the same reductions; or half of the sums' bytes and as many of codes of one byte.
    first = 8 * 8 + 4 * 128
    row = [line for line in page.splitlines() if line.startswith("| 2 | 1x2 |")][1].split(" | ")
    sent = [4 * (first + 4 * 8 * 128) / 8 / 1e3, 4 * (first + 2 * 8 * 128 + (8 * 128 + 8 * 12) / 2) / 8 / 1e3]
    assert [row[2], row[4]] == [f"{each:,.0f}" for each in sent]
    assert row[6] == "500.00"  # ms of products, divided over two devices
    assert (
        "| 3 | 1x3 | refused: the model cannot be cut over 3 devices: attention whole on every device: 1 heads" in page
    )


def test_meshes_that_straddle_hosts_are_refused():
    with pytest.raises(ValueError, match="mesh 1x12: 12 devices of a model and hosts of 8 do not divide each other"):
        many_hosts._layout("1x12", 8)
    with pytest.raises(ValueError, match="config.meshes has '8': write data x model"):
        many_hosts._layout("8", 8)


def test_the_page_says_where_more_devices_stop_helping():
    rows = [many_hosts.Row([], parts, time) for parts, time in ((8, 9.0), (16, 12.5), (64, 12.0), (3, None))]
    (line,) = many_hosts._where_it_stops("A step", rows)
    assert line.startswith("A step takes at least 9.0 ms over 8 GPUs, 12.5 ms over 16 GPUs, 12.0 ms over 64 GPUs")
    assert "It stops getting faster at 8 GPUs" in line
    (line,) = many_hosts._where_it_stops("A prompt", [many_hosts.Row([], 8, 9.0), many_hosts.Row([], 16, 6.0)])
    assert line.endswith("2 times the GPUs of 8 make it 1.50 times as fast.\n")
    assert not [*many_hosts._where_it_stops("A step", rows[:1])]
