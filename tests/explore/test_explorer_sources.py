"""What the explorer finds in folders, what it shows without a store, and inside a notebook."""

from __future__ import annotations

import re
import shutil
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from saetools import load_sae, shipped_path
from saetools.errors import InputError, ResourceError
from saetools.explore import Sources, Workspace, explore_run
from saetools.explore.latent import layout
from saetools.explore.neighbourhoods import Neighbourhoods


def test_one_of_several_organisms_is_looked_at(run_folder: Path, tmp_path: Path) -> None:
    for name in ("finance", "sports"):
        shutil.copytree(run_folder / "diff", tmp_path / f"diff-{name}")
    shutil.copytree(run_folder / "trajectory", tmp_path / "trajectory-sports")
    assert Sources.find(tmp_path).diff == tmp_path / "diff-finance"
    found = Sources.find(tmp_path, "sports")
    assert found.diff == tmp_path / "diff-sports"
    assert found.trajectory == tmp_path / "trajectory-sports"
    with pytest.raises(InputError, match="expected finance, sports, received 'cooking'"):
        Sources.find(tmp_path, "cooking")


def test_without_a_store_a_latent_shows_what_is_known(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "diff", tmp_path / "diff")
    workspace = Workspace(Sources.find(tmp_path))
    shown = str(layout(workspace, 707))
    assert "Change by token role" in shown
    assert "saetools index" in shown
    assert "Largest activations" not in shown
    with pytest.raises(InputError, match="expected 0 to 8191"):
        layout(workspace, 8192)


def test_neighbours_stay_near_and_a_lost_process_is_noticed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 8, generator=generator)
    rows = centres.repeat_interleave(40, 0) + 0.1 * torch.randn(80, 8, generator=generator)
    path = tmp_path / "umap.npy"
    found = Neighbourhoods(rows, path)
    found.start()
    while (places := found.places()) is None:
        assert found.seconds is not None or path.exists()
    distance = torch.cdist(places, places)
    assert distance[:40, :40].max() < distance[:40, 40:].min()
    assert np.load(path).shape == (80, 2)
    path.unlink()
    found.start()
    found._process.kill()
    found._process.join()
    with pytest.raises(ResourceError, match="ended with code -9"):
        found.places()
    found.start()  # and can be tried again
    found.cancel()
    assert found.places() is None
    assert not list(tmp_path.iterdir())


def test_a_notebook_shows_the_explorer(run_folder: Path) -> None:
    code = f"import saetools\nshown = saetools.explore_run({str(run_folder)!r}, height=300)\nshown"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(notebook, timeout=120)
    with client.setup_kernel():
        client.execute_cell(notebook.cells[0], 0)
        (output,) = notebook.cells[0].outputs
        address = re.search(r'<iframe src="(http://127[.]0[.]0[.]1:[0-9]+/)"', output["data"]["text/html"])[1]
        with urllib.request.urlopen(address) as answer:
            assert b"saetools" in answer.read()
            assert "http://localhost:*" in answer.headers["Content-Security-Policy"]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address)


def test_models_come_with_their_sae(run_folder: Path) -> None:
    with pytest.raises(InputError, match="received no models and an SAE"):
        explore_run(run_folder, None, load_sae(shipped_path("sae/smollm2-135m")))
