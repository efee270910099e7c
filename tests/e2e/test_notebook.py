"""The notebook of the quickstart runs from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.house import ROOT

FOLDER = ROOT / "recipes" / "quickstart"


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINRAY_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(FOLDER / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    ).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    _, trained, metrics, report, answer, mistake, runs = outputs
    assert "step 60/60" in str(trained) and "notebook finished" in str(trained)
    assert "exact_match" in metrics[0].data["text/plain"]
    assert report[0].data["text/html"].startswith("<iframe srcdoc=")
    assert "48213" in answer[0].data["text/plain"]
    assert "did you mean 'learning_rate'?" in mistake[0].text
    assert "notebook: finished, step 60 of 60" in runs[0].data["text/plain"]
    assert not list(FOLDER.glob("runs"))
