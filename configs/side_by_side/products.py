"""Single products on one NVIDIA H200: whole operations beside Humming's, groups beside one scale a column: 3 minutes.

Claim: see experiments/results/README.md. Humming needs its wheel, humming-kernels 0.1.20, and torch.

    python -m experiments.side_by_side --config=configs/side_by_side/products.py --workdir=runs/products
"""

from ml_collections import ConfigDict

from . import llama3_groups

_PEERS = (
    "bench.matmul --config=configs/bench/matmul.py --config.peers=humming --config.precisions=W4A8g128 "
    "--config.peer_precisions=W4A8,W4A8g128,W4A16g128 --config.shapes="
)


def get_config() -> ConfigDict:
    config = llama3_groups.get_config()
    config.chains = ConfigDict(
        {
            "humming_down": f"{_PEERS}1024x4096x14336",
            "humming_up": f"{_PEERS}1024x28672x4096",
            "humming_token": f"{_PEERS}1x28672x4096",
            "many_tokens": (
                "bench.products.expanded --chosen --shapes=2048x14336x4096,8192x14336x4096 "
                "--precisions=4,4g128,4g64,4g32 --out={folder}/result.json"
            ),
            "few_tokens": (
                "bench.products.few_tokens --precisions=4,4g128,4g64 --shapes=1x28672x4096,16x28672x4096,"
                "64x28672x4096,64x4096x14336 --out={folder}/result.json"
            ),
            "binary": (
                "bench.matmul --config=configs/bench/matmul.py --config.precisions=W1A1,W1A2,W2A2 --config.shapes=8192"
            ),
        },
        sort_keys=False,
    )
    return config
