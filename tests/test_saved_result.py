"""Results in folders: what is loaded is what was saved, and whatever was not is an error."""

import json

import polars as pl
import pytest
import torch

from saetools.errors import InputError, IntegrityError, ResourceError
from saetools.saved_result import load_result, save_result, saved_warnings

TABLE = pl.DataFrame({"latent": [1, 2, 3], "value": [0.1, None, -2.5]})
TENSORS = {"rows": torch.arange(6.0).reshape(2, 3).T, "none": torch.zeros(0, 4)}
FACTS = {"share": float("nan"), "n": 3, "third": 1 / 3, "names": ("é", "b"), "by": {1: 2}}
FILES = ["first.parquet", "second.parquet", "tensors.safetensors", "thing.json"]


@pytest.fixture
def saved(tmp_path):
    return save_result(tmp_path / "run", "thing", {"first": TABLE, "second": TABLE[1:]}, FACTS, tensors=TENSORS)


def load(path):
    return load_result(path, "thing", ["first", "second"], has_tensors=True)


def test_everything_comes_back(saved):
    (first, second), facts, tensors = load(saved)
    assert first.equals(TABLE)
    assert second.equals(TABLE[1:])
    assert facts == {"share": None, "n": 3, "third": 1 / 3, "names": ["é", "b"], "by": {"1": 2}}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], values) for name, values in TENSORS.items())
    assert sorted(path.name for path in saved.iterdir()) == FILES
    assert load_result(saved, "thing", ["second"])[0][0].equals(TABLE[1:])


def test_saving_again_replaces_it(saved):
    save_result(saved, "thing", {"first": TABLE[:1], "second": TABLE}, {"n": 1}, tensors=TENSORS)
    (first, second), facts, _ = load(saved)
    assert (len(first), len(second), facts) == (1, 3, {"n": 1})


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_and_a_changed_one(saved, file):
    content = (saved / file).read_bytes()
    (saved / file).unlink()
    with pytest.raises(InputError, match=rf"path: expected a folder with .*{file}"):
        load(saved)
    (saved / file).write_bytes(content[:-2])
    with pytest.raises(IntegrityError, match=rf"{file} (has changed since it was saved|is damaged)"):
        load(saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sha256": {"facts": "0"}}', '{"sha256": null}'])
def test_json_of_something_else_is_damaged(saved, text):
    (saved / "thing.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"thing\.json is damaged"):
        load(saved)


def test_a_changed_number_is_noticed_and_another_layout_is_not(saved):
    place = saved / "thing.json"
    content = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps(dict(reversed(content.items()))))
    assert load(saved)[1]["n"] == 3
    place.write_text(json.dumps({**content, "n": 4}))
    with pytest.raises(IntegrityError, match=r"thing\.json has changed since it was saved"):
        load(saved)


def test_a_full_disk_leaves_no_half_result(saved, small_files):
    with pytest.raises(ResourceError, match="no disk space for the result in"), small_files(100):
        save_result(saved, "thing", {"first": TABLE, "second": TABLE}, FACTS, tensors=TENSORS)
    assert sorted(path.name for path in saved.iterdir()) == FILES[:-1]
    with pytest.raises(InputError, match=r"path: expected a folder with .*thing\.json"):
        load(saved)


def test_a_result_without_warnings_is_an_old_one(tmp_path):
    assert saved_warnings(tmp_path, {"warnings": ["a", "b"]}) == ("a", "b")
    with pytest.raises(InputError, match="path: expected a result with its warnings, received an older one"):
        saved_warnings(tmp_path, FACTS)
