"""Who the explorer answers, what it keeps, and its rows; without a browser."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import polars as pl
import pytest
from explorer_process import start, stop

from saetools.cli import main
from saetools.errors import InputError, IntegrityError
from saetools.explore import Label, Labels, Sources
from saetools.explore.grid import rows_for
from saetools.explore.playground import edit_text, strengths


def ask(address: str, path: str = "/", **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(address + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_requests_by_other_names_and_of_foreign_pages_are_refused(address: str) -> None:
    assert ask(address)[0] == 200
    assert ask(address, Host="evil.example")[0] == 403  # a name that was rebound to this machine
    assert ask(address, Origin="http://evil.example")[0] == 403
    assert ask(address, Origin=address)[0] == 200


def test_no_file_outside_of_the_pages_can_be_read(address: str, run_folder: Path) -> None:
    for path in ("/assets/../app.py", "/assets/%2e%2e/app.py", "/assets/..%2f..%2fcli%2fentry.py", "//etc/passwd"):
        status, text = ask(address, path)
        assert status == 404 or "<!doctype html>" in text, path
        assert "import" not in text.partition("<body>")[0].partition("<style>")[0]


def test_a_token_is_asked_for_where_there_is_one(run_folder: Path) -> None:
    process, address = start(run_folder, "--no-models", token="secret of the day")
    try:
        plain = address.partition("/?")[0]
        assert ask(plain)[0] == 401
        assert ask(plain, "/?token=wrong")[0] == 401
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(plain + "/?token=secret%20of%20the%20day", timeout=30) as answer:
            assert answer.status == 200
            assert "token" not in answer.geturl()
        with opener.open(plain + "/_dash-layout", timeout=30) as answer:
            assert answer.status == 200
        assert ask(plain, "/_dash-layout")[0] == 401
    finally:
        stop(process)


def test_other_machines_need_a_token(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (["--host", "0.0.0.0"], "without a token"),
        (["--port", "70000"], "--port: expected 0 to 65535"),
    ):
        with pytest.raises(SystemExit):
            main(["explore", str(run_folder), *args])
        assert message in capsys.readouterr().err


def test_folders_without_anything_to_show_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="run: expected a folder with a diff, a latent store or a report"):
            Sources.find(folder)


def test_sources_are_found_in_a_run_and_below(run_folder: Path) -> None:
    found = Sources.find(run_folder)
    assert found.diff == run_folder / "diff"
    assert found.store == run_folder / "store"
    assert found.explanations == run_folder / "explanations.jsonl"
    assert found.report is None


def test_labels_of_several_tabs_are_all_kept(tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.json")
    threads = [threading.Thread(target=labels.set, args=(number, Label(f"label {number}"))) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Labels(tmp_path / "labels.json")
    assert again.all() == {number: Label(f"label {number}") for number in range(30)}
    again.set(3, Label())
    assert Labels(tmp_path / "labels.json").of(3) == Label()
    assert 3 not in json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))["labels"]
    with pytest.raises(InputError, match=r"note: expected at most 10,000 letters, received 10,001"):
        again.set(4, Label("x", "y" * 10_001))
    assert again.of(4) == Label("label 4")
    (tmp_path / "labels.json").write_text("[]", encoding="utf-8")
    with pytest.raises(IntegrityError, match="holds no labels"):
        Labels(tmp_path / "labels.json")


FRAME = pl.DataFrame(
    {"latent": [0, 1, 2, 3], "delta": [0.5, None, -1.0, 2.0], "label": ["A<b>", "", None, "ab"]},
    schema={"latent": pl.Int64, "delta": pl.Float64, "label": pl.String},
)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"delta": {"filterType": "number", "type": "greaterThan", "filter": 0}}, [0, 3]),
        ({"delta": {"filterType": "number", "type": "inRange", "filter": -1, "filterTo": 0.5}}, [0, 2]),
        ({"delta": {"filterType": "number", "type": "blank"}}, [1]),
        ({"label": {"filterType": "text", "type": "contains", "filter": "a"}}, [0, 3]),
        ({"label": {"filterType": "text", "type": "contains", "filter": ".*"}}, []),
        ({"label": {"filterType": "text", "type": "notBlank"}}, [0, 3]),
        ({"label": {"filterType": "text", "type": "startsWith", "filter": "a<"}}, [0]),
        (
            {
                "delta": {
                    "filterType": "number",
                    "operator": "OR",
                    "conditions": [
                        {"filterType": "number", "type": "lessThan", "filter": 0},
                        {"filterType": "number", "type": "equals", "filter": 2},
                    ],
                }
            },
            [2, 3],
        ),
        (
            {
                "delta": {"filterType": "number", "type": "notBlank"},
                "label": {"filterType": "text", "type": "endsWith", "filter": "B"},
            },
            [3],
        ),
    ],
)
def test_filters_choose_rows(model: dict[str, object], expected: list[int]) -> None:
    found, n = rows_for(FRAME, {"startRow": 0, "endRow": 100, "filterModel": model})
    assert [row["latent"] for row in found] == expected
    assert n == len(expected)


def test_rows_come_sorted_and_in_blocks() -> None:
    request = {"startRow": 1, "endRow": 3, "sortModel": [{"colId": "delta", "sort": "desc"}]}
    found, n = rows_for(FRAME, request)
    assert [row["latent"] for row in found] == [0, 2]  # the missing one is last
    assert n == 4
    with pytest.raises(InputError, match="column: expected one of the table"):
        rows_for(FRAME, {"sortModel": [{"colId": "nothing", "sort": "asc"}]})
    with pytest.raises(InputError, match="filter: expected"):
        rows_for(FRAME, {"filterModel": {"label": {"filterType": "text", "type": "eval", "filter": "1"}}})


def test_edits_are_written_as_they_are_read() -> None:
    assert edit_text(3, "clamp", 0.5, "99th percentile", "the answer") == "clamp 3=0.5*p99 on response"
    assert edit_text(3, "scale", 2.0, "activation", "all tokens") == "scale 3=2"
    assert edit_text(3, "ablate", 2.0, "activation", "new tokens") == "ablate 3 on generated"
    assert strengths("0.5, 1 2") == [0.5, 1.0, 2.0]
    assert strengths("") == [1.0]
    for wrong in ("x", "nan", "1,2,3,4,5,6,7,8,9"):
        with pytest.raises(InputError, match="strengths: expected up to 8 numbers"):
            strengths(wrong)
