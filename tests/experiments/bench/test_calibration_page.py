"""experiments/bench/calibration_page.py on results that are made up, and on those that are kept."""

from __future__ import annotations

import json

from configs.bench import calibration_page as page_config
from experiments.bench import calibration_page
from tests.support.imports import ROOT

_ROW = {"standard_error": 0.5, "bytes": 2e6, "seconds": {"quantize": 3.0}}
_SETTINGS = {"model": "m", "text": "folder/text.txt", "windows": 2, "window_length": 4}


def test_models_of_one_text_share_a_table_and_are_paired(tmp_path):
    baseline = {"perplexity": 10.0, "standard_error": 1.0}
    rounded = _ROW | {"perplexity": 20.0, "window_losses": [2.0, 3.0]}
    calibrated = _ROW | {"perplexity": 11.0, "window_losses": [1.5, 2.7], "peak_bytes": 1e9}
    method = {"calibration_windows": 8, "rotation": "full", "rounding": {"algorithm": "gptq"}}
    for name, settings, row in (("one", {}, rounded), ("two", method, calibrated)):
        result = {"settings": _SETTINGS | settings, "baseline": baseline, "precisions": {"W4A8": row}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    learned = {"settings": _SETTINGS | {"distillation_windows": 64}, "baseline": baseline}
    learned |= {"calibrated": {"W4A8": calibrated}, "precisions": {"W4A8": calibrated | {"perplexity": 10.5}}}
    learned |= {"distillation": {"W4A8": {"schedule": {"steps": 600}}}}
    (tmp_path / "three.json").write_text(json.dumps(learned))
    config = page_config.get_config()
    config.models, config.comparisons, config.parts = "one.json,two.json,three.json", "", ""
    calibration_page.main(config, tmp_path)
    page = (tmp_path / calibration_page.PAGE).read_text()
    assert page.count("## m, 2 windows of 4 tokens of text.txt") == 1
    assert "| W4A8 | rounding | 2 | 20 | +100.0% | - | 3 | - |" in page
    assert "| W4A8 | GPTQ, rotation full, 8 windows | 2 | 11 | +10.0% | -33.0% (10.0%) | 3 | 1.0 |" in page
    assert "| W4A8 | calibration before it | 2 | 11 | +10.0% |" in page
    assert "| W4A8 | distilled, 600 steps, 64 windows | 2 | 10.5 | +5.0% |" in page


def test_the_page_in_the_tree_is_that_of_its_files(tmp_path):
    results = ROOT / "experiments" / "results"
    for folder in ("cpu_2_cores", "nvidia_h200"):
        (tmp_path / folder).symlink_to(results / folder)
    calibration_page.main(page_config.get_config(), tmp_path)
    assert (tmp_path / calibration_page.PAGE).read_text() == (results / calibration_page.PAGE).read_text()
