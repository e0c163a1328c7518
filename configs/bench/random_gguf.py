"""A GGUF file in the shapes of Qwen3-1.7B with one bit a weight, in groups of 128 (Q1_0): 0.5 GB, 7 s.

python -m experiments.bench.language_models.random_gguf --config=configs/bench/random_gguf.py --workdir=DIR
python -m experiments.generate --config=configs/generate.py --config.model=DIR/model.gguf --config.activations=8
python -m experiments.bench.llm --config=configs/bench/llm.py --config.model=DIR/model.gguf --config.precisions=A8,A16
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # A preset of bipolar_jax/models/presets.py of the families Llama, Qwen2 and Qwen3.
    config.model = "qwen3-1.7b"
    # Decoder layers; 0 has all of the preset's.
    config.layers = 0
    # Q1_0, Q4_0, Q5_0 or Q8_0: of all layers; of the embedding and the output layer.
    config.type = "Q1_0"
    config.embedding_type = "Q8_0"
    config.seed = 0
    return config
