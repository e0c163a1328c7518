"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(tmp_path, monkeypatch):
    example, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["y"].shape == (2, 7, 128)
    assert names["logits"].shape == (2, 7, 10)
    assert (names["w"].bits, names["coarse"].bits, names["w3"].bits) == (4, 2, 3)
