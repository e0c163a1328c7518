"""The page of what calibration reaches, experiments/results/CALIBRATION.md, from the results that are kept there.

python -m experiments.bench.calibration_page --config=configs/bench/calibration_page.py --workdir=experiments/results
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Files below --workdir, comma separated: of experiments.quantize, experiments.calibrate and experiments.distill.
    config.models = (
        "cpu_2_cores/quantize_wikitext2.json,cpu_2_cores/calibrate_wikitext2.json,"
        "cpu_2_cores/calibrate_128_windows.json,cpu_2_cores/calibrate_demo.json,"
        "nvidia_h200/distill.json,nvidia_h200/distill_long.json,nvidia_h200/calibrate_reconstruction.json,"
        "nvidia_h200/distill_reconstructed.json,nvidia_h200/distill_reconstructed_few_bits.json,"
        "nvidia_h200/distill_two_bits_5000_steps.json"
    )
    # Of experiments.compare_methods; "" for none.
    config.comparisons = (
        "nvidia_h200/compare_precisions_absmax_embedding.json,nvidia_h200/compare_precisions_one_process.json,"
        "nvidia_h200/compare_precisions.json,nvidia_h200/compare_reconstruction.json,"
        "nvidia_h200/compare_groups.json,nvidia_h200/compare_three_bits.json,nvidia_h200/compare_six_bits.json,"
        "nvidia_h200/compare_eight_bits.json,nvidia_h200/compare_cache.json,nvidia_h200/compare_even_planes.json,"
        "nvidia_h200/compare_learned_w4a8.json,nvidia_h200/compare_help_topics.json"
    )
    # Of experiments.bench.calibration; "" for none.
    config.parts = "nvidia_h200/bench_calibration_smollm2.json,nvidia_h200/bench_calibration_llama-3-8b.json"
    return config
