"""What links carry when Llama-3.1-70B and 405B run and train on 8, 64 and 256 GPUs: experiments/results/MANY_HOSTS.md.

python -m experiments.distributed.many_hosts --config=configs/distributed/many_hosts.py --workdir=experiments/results

Claim: with the rates below a decode step stops getting faster at 8 GPUs, one host, and so does a prompt of the 70B
model. Bytes follow from the shapes and from the exchanges that tests count in compiled programs; a rate without a
source is an assumption, and the page says so.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Shapes, from the config.json of meta-llama/Llama-3.1-70B and -405B.
    config.models = ConfigDict(
        {
            "llama-3-70b": {
                "hidden_size": 8192,
                "num_layers": 80,
                "num_heads": 64,
                "num_kv_heads": 8,
                "head_dim": 128,
                "ffn_size": 28672,
                "vocab_size": 128256,
                "context_length": 131072,
            },
            "llama-3-405b": {
                "hidden_size": 16384,
                "num_layers": 126,
                "num_heads": 128,
                "num_kv_heads": 8,
                "head_dim": 128,
                "ffn_size": 53248,
                "vocab_size": 128256,
                "context_length": 131072,
            },
        }
    )
    # Meshes, data x model. Model axes of up to `gpus_per_host` stay within a host.
    config.meshes = "1x8,8x8,4x16,1x64,32x8,16x16,4x64"
    config.gpus_per_host = 8
    config.memory_bytes = 141e9  # of an H200, by its data sheet
    # Packed weights of linear layers; embedding and output layer are bfloat16.
    config.precision = "W4A8g64"
    # Texts that decode together on each row of the mesh, tokens of each that are cached, and bits of the cache
    # (16: bfloat16).
    config.texts = 16
    config.cached_tokens = 8192
    config.cache_bits = 16
    # Tokens of a training step, of all devices.
    config.step_tokens = 4194304
    # Bytes a second of each GPU in one direction, seconds of one small all-reduce, and where the numbers were measured;
    # "" says that they are assumed.
    config.links = ConfigDict(
        {
            "memory": {
                "bytes_per_second": 4.1e12,
                "seconds": 0.0,
                "source": "configs/bench/llm.py, reads of one H200",
            },
            "NVLink": {"bytes_per_second": 450e9, "seconds": 10e-6, "source": ""},
            "network": {"bytes_per_second": 50e9, "seconds": 30e-6, "source": ""},
        }
    )
    # Of the products of long prompts on one GPU, attention and all else included: 2 x 6.98e9 x 2048 operations of
    # Llama-3-8B's linear layers at W4A8g128 in 25.6 ms.
    config.products = ConfigDict(
        {
            "operations_per_second": 1.117e15,
            "source": "a prompt of 2048 of Llama-3-8B at W4A8g128, nvidia_h200/bench_llm_llama-3-8b_prompts.json",
        }
    )
    return config
