"""JSON files: strict JSON, whatever the figures are."""

import json
import math

import pytest

from cramfast.errors import UserError
from cramfast.runtime.jsonfile import dumps, read_json
from cramfast.scaling import table


def strict(text: str):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_not_finite_is_null_at_any_depth():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN", "e": None, "f": True}
    assert strict(dumps(value)) == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": None, "f": True}


def test_a_table_of_runs_is_strict_json(tmp_path):
    table.append(tmp_path, {"name": "a", "loss": math.nan, "curve": {"loss": [1.0, math.nan]}})
    strict((tmp_path / table.TABLE).read_text())
    (row,) = table.read_table(tmp_path)
    assert (row["loss"], row["curve"]["loss"]) == (None, [1.0, None])


def test_a_file_without_an_object(tmp_path):
    assert read_json(tmp_path / "none.json") == {}
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match=r"list\.json: holds no JSON object — train again"):
        read_json(tmp_path / "list.json", "train again")
