"""The core needs no optional package, and what does names the extra that brings it."""

from __future__ import annotations

import subprocess
import sys

from tests.support.imports import ROOT

OPTIONAL = (
    "safetensors",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "tokenizers",
    "ml_collections",
    "matplotlib",
    "grain",
    "tensorboardX",
    "qwix",
)  # flax itself imports rich


def printed_by(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_importing_the_package_imports_no_optional_one():
    code = f"import sys, bipolar_jax; print([name for name in {OPTIONAL} if name in sys.modules])"
    assert printed_by(code) == "[]"


def test_a_missing_optional_package_names_the_extra_that_brings_it():
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import bipolar_jax\n"
        "try:\n    bipolar_jax.load('nowhere')\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    assert "pip install 'bipolar_jax[models]'" in printed_by(code)
