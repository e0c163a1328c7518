"""Tuning tables: those of the package are whole, and damage is one ValueError that names the file and the field."""

from __future__ import annotations

import copy
import dataclasses
import importlib.resources
import json
import random
import re

import pytest

from bipolar_jax import tuning
from bipolar_jax.kernels.sm90.backend.planning import FEW_TOKENS
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling
from bipolar_jax.tuning.parse import TILINGS, parse_table
from bipolar_jax.tuning.table import load_table
from tests.fuzz.mutations import damaged_bytes, damaged_json

MANY = {"kind": "int8", "m": 8, "n": 64, "steps": 2, "shape": "s", "microseconds": 1.5}
MANY["tiling"] = dataclasses.asdict(Tiling())
FEW = MANY | {"kind": FEW_TOKENS, "tiling": {"warpgroups": 4, "w_slots": 8, "x_slots": 4}}
TABLE = {"device": "NVIDIA H200", "entries": [MANY, FEW]}


def test_the_packages_own_tables_are_whole():
    names = [file.name for file in importlib.resources.files(tuning).iterdir() if file.name.endswith(".json")]
    assert len(names) == 3  # with the costs
    for device in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        table = load_table(device)
        assert table["device"] == device
        for entry in table["entries"]:
            if entry["kind"] != FEW_TOKENS:
                Tiling(**entry["tiling"]).check()
    assert load_table("NVIDIA A100") is None


def test_the_fields_are_those_of_the_kernels():
    assert parse_table(json.dumps(TABLE), "x") == TABLE
    for kind, fields in TILINGS.items():
        tiling = DecodeTiling if kind == FEW_TOKENS else Tiling
        assert set(fields) == {field.name for field in dataclasses.fields(tiling)}


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["device"], None, "device"),
        (["entries"], {}, "entries"),
        (["entries", 0], 3, r"entries\[0\]"),
        (["entries", 1, "kind"], "int4", r"entries\[1\].kind"),
        (["entries", 1, "kind"], [], r"entries\[1\].kind"),
        (["entries", 0, "m"], True, r"entries\[0\].m"),
        (["entries", 0, "n"], 0, r"entries\[0\].n"),
        (["entries", 0, "steps"], 2.0, r"entries\[0\].steps"),
        (["entries", 0, "shape"], None, r"entries\[0\].shape"),
        (["entries", 0, "microseconds"], float("nan"), r"entries\[0\].microseconds"),
        (["entries", 0, "microseconds"], 10**400, r"entries\[0\].microseconds"),
        (["entries", 0, "tiling"], [], r"entries\[0\].tiling"),
        (["entries", 0, "tiling", "tile"], 64, r"entries\[0\].tiling"),
        (["entries", 0, "tiling", "tile_m"], 65, r"entries\[0\].tiling.tile_m"),
        (["entries", 0, "tiling", "tile_n"], "64", r"entries\[0\].tiling.tile_n"),
        (["entries", 0, "tiling", "band"], "8", r"entries\[0\].tiling.band"),
        (["entries", 0, "tiling", "schedule"], [], r"entries\[0\].tiling.schedule"),
        (["entries", 1, "tiling", "warpgroups"], 5, r"entries\[1\].tiling.warpgroups"),
        (["entries", 1, "tiling", "x_slots"], None, r"entries\[1\].tiling.x_slots"),
    ],
    ids=lambda value: f"{value!s:.30}",
)
def test_a_damaged_field_is_named(path, value, field):
    table = copy.deepcopy(TABLE)
    node = table
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ValueError, match=f"^tuning table a/x.json is damaged: {field} is .*, expected .*; restore it"):
        parse_table(json.dumps(table), "a/x.json")


def test_damage_is_a_table_or_one_value_error():
    accepted = 0
    for seed in range(2000):
        rng = random.Random(seed)
        text = damaged_json(TABLE, rng)
        if seed % 4 == 0:
            text = damaged_bytes(json.dumps(TABLE).encode(), rng).decode(errors="replace")
        try:
            parse_table(text, "x.json")
            accepted += 1
        except ValueError as error:
            assert type(error) is ValueError
            assert re.match(r"tuning table x.json is damaged: ", str(error))
            assert len(str(error)) < 500
    assert accepted < 400
