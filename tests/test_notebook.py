"""The notebook runs from its first cell to its last."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import PROJECT


@pytest.mark.slow
def test_quickstart_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKSTART_EPOCHS", "1")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("HOME", os.environ["HOME"])
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    notebook = nbformat.read(PROJECT / "notebooks/quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs if "data" in out]
    assert sum("image/png" in out["data"] for out in pictures) == 4
    assert len(list(Path(tmp_path, "predictions/masks").iterdir())) == 3
