"""The notebooks run from top to bottom."""

import os
import pathlib

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_quickstart_runs(monkeypatch):
    """Few training steps: this checks that the cells work, not that the model is good."""
    monkeypatch.setenv("ONEREC_NOTEBOOK_STEPS", "6")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.fspath(ROOT / ".jax_cache"))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}})
    client.execute()
    last = notebook.cells[-2]["outputs"][0]["text"]
    assert "recall@10" in last
