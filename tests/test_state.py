"""What checkpoints and exports may hold: each key is read, or refused in one line."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.states import CHECKPOINT, differences, read_state, small_state, small_values

from fastgn import files
from fastgn.checkpoint import FORMAT
from fastgn.errors import UserError
from fastgn.models.weights import read_weights
from fastgn.trained import read_saved


def save_state(path: Path, state: dict[str, Any]) -> Path:
    torch.save({"format": FORMAT, **state}, path)
    return path


def refused_state(path: Path) -> str:
    with pytest.raises(UserError) as refusal:
        read_state(path)
    line = str(refusal.value)
    assert line.startswith(f"{path}") and line.isprintable(), line
    return line


@pytest.mark.parametrize("key", sorted(CHECKPOINT))
def test_a_missing_key_is_named(key, tmp_path):
    state = small_values(1)
    del state[key]
    path = save_state(tmp_path / "update_00000001.pt", state)
    if key in (
        "epoch",
        "bad_images",
        "data",
        "evaluation_pending",
        "loss_scale",
        "ranks",
    ):  # older versions did not write them
        assert not read_state(path)[key]
    else:
        assert refused_state(path) == f"{path} is damaged: it lacks '{key}'"


WRONG: dict[str, Any] = {
    "None": None,
    "text": "x",
    "number": 1.5,
    "negative": -1,
    "true": True,
    "enormous": 2**200,
    "NaN": float("nan"),
    "inf": float("inf"),
    "empty list": [],
    "empty dict": {},
    "list": [1, None],
    "dict": {"a": {"b": object}},
    "tensor": torch.tensor(1),
    "list of lists": [["a"], ["b"]],
    "doubled": ["a", "a"],
    "unnamed": {1: 2},
    "sparse": {"weight": torch.eye(2).to_sparse()},
    "meta": {"weight": torch.empty(2, device="meta")},
    "quantized": {"weight": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)},
    "nested": {"weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    "expanded": {"weight": torch.ones(1).expand(10**12)},
    "complex": {"weight": 1j},
    "set": {"weight": {1}},
    "bytes": b"x",
    "NaN inside": {"weight": float("nan")},
}
FINE = {
    ("epoch", "number"),
    ("epoch", "negative"),
    ("epoch", "None"),
    ("evaluation_pending", "true"),
    ("best", "number"),
    ("best", "negative"),
    ("accuracy", "empty dict"),
    ("bad_images", "empty list"),
    ("bad_images", "doubled"),
    ("ema", "None"),
    ("loss_scale", "None"),
    ("data", "empty dict"),
}
"""What is not wrong after all."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", sorted(CHECKPOINT))
def test_a_key_of_another_kind_is_named(key, tmp_path):
    path = tmp_path / "update_00000001.pt"
    for kind, value in WRONG.items():
        if (key, kind) in FINE:
            continue
        try:
            save_state(path, small_values(1, **{key: value}))
        except (pickle.PicklingError, AttributeError):
            continue
        line = refused_state(path)
        assert key in line or "weight" in line or "more than tensors" in line, (kind, line)


def test_a_newer_version_is_named(tmp_path):
    path = save_state(tmp_path / "update_00000001.pt", small_values(1) | {"format": FORMAT + 1})
    later = f"has format {FORMAT + 1}, but this version of fastgn reads format {FORMAT}"
    assert refused_state(path) == f"{path} {later}: update fastgn"
    save_state(path, small_values(1, later=1))
    assert "holds 'later', which this version of fastgn does not know: a newer" in refused_state(
        path
    )
    with pytest.raises(TypeError, match="later"):  # a key that TrainState does not declare
        small_state(1, later=1)


def test_a_state_that_holds_itself_is_refused(tmp_path):
    loop: list[Any] = []
    loop.append(loop)
    path = save_state(tmp_path / "update_00000001.pt", small_values(1, bad_images=loop))
    assert "contains itself" in refused_state(path)
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    save_state(path, small_values(1, bad_images=deep))
    assert "nested too deeply" in refused_state(path)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.builds(torch.ones, st.integers(0, 3)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted(CHECKPOINT)), value=values)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_value_of_any_key_is_read_or_refused_in_one_line(key, value, tmp_path):
    path = save_state(tmp_path / "update_00000001.pt", small_values(1) | {key: value})
    try:
        state = read_state(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and str(error).isprintable()
    else:
        assert CHECKPOINT[key].fits(state[key])


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("no JSON", "is not JSON"),
        ("[]", "holds a list, but should hold a dict"),
        ("{}", "lacks 'config'"),
        ('{"config": 1, "classes": ["a", "b"]}', "'config' should be a recipe's text"),
        ('{"config": "", "classes": "ab"}', "'classes' should be a list of different texts"),
        ('{"config": "", "classes": ["a", "a"]}', "'classes' should be a list of different texts"),
        ('{"config": "", "classes": ["a", "b"], "update": NaN}', "NaN is not a finite number"),
        ('{"config": "", "classes": ["a", "b"], "update": -1}', "'update' should be a whole"),
        ('{"config": "", "classes": ["a", "b"], "x": 1}', "holds 'x', which this version"),
        (
            '{"config": "x = ", "classes": ["a", "b"]}',
            "an invalid configuration: the text is not valid TOML",
        ),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_header_that_is_none_is_named(header, expected, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1)}, path, metadata={"fastgn": header})
    with pytest.raises(UserError) as refusal:
        read_saved(path)
    assert expected in str(refusal.value) and str(path) in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_what_cannot_be_read_is_named(tmp_path):
    for name in ("a.pt", "a.safetensors", "a.json"):
        path = tmp_path / name
        read = {".pt": read_weights, ".safetensors": read_weights, ".json": files.read_json}[
            path.suffix
        ]
        with pytest.raises(UserError, match=f"^{path} cannot be read: No such file"):
            read(path)
        os.mkfifo(path)  # would be waited for
        with pytest.raises(UserError, match=f"^{path} cannot be read: it is not a file"):
            read(path)


def test_a_class_behind_numpys_names_is_not_run(tmp_path):
    """NumPy's numbers beside tensors are passed over, and none of its functions is called."""
    content = {"state_dict": {"a": torch.ones(2)}, "loss": np.float64(0.5), "seen": np.arange(3)}
    torch.save(content, tmp_path / "with_numpy.pt")
    assert differences(read_weights(tmp_path / "with_numpy.pt"), {"a": torch.ones(2)}) == []
    with pytest.raises(UserError, match="holds more than tensors"):
        save_state(tmp_path / "update_00000001.pt", small_values(1, best=np.float64(0.5)))
        read_state(tmp_path / "update_00000001.pt")
    stream = io.BytesIO()
    torch.save({"a": torch.ones(1), "d": np.dtype([("x", "O")])}, stream)
    (tmp_path / "dtype.pt").write_bytes(stream.getvalue())
    assert list(read_weights(tmp_path / "dtype.pt")) == ["a"]
