"""docs/segment_images.ipynb, run from its first cell to its last."""

import base64
import io

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_the_segmenter_finds(weights, segmenter, ade20k, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs/segment_images.ipynb", as_version=4)
    images = ade20k / "images/validation"
    (settings,) = (cell for cell in notebook.cells if cell.source.startswith("WEIGHTS = "))
    settings.source = f"WEIGHTS = {str(weights)!r}\nIMAGES = {str(images)!r}"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(ROOT / "docs"))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))))
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    files = sorted(images.glob("*.jpg"))
    first, scores, left = pictures
    expected = segmenter(files[0])
    assert np.array_equal(first, np.asarray(expected.picture))
    assert np.array_equal(scores, np.uint8(255 * expected.scores))
    assert left.shape[1] == first.shape[1] // 2
    (printed,) = (output.text for output in outputs if output.get("name") == "stdout")
    pixels = np.bincount(expected.labels.ravel())
    largest = int(pixels.argmax())
    assert printed.startswith(
        f"{segmenter.classes[largest]}: {pixels[largest] / pixels.sum():.1%}, mean score "
    )
    shapes = [segmenter(file).labels.shape for file in files[:3]]
    assert str(shapes) in [output.data["text/plain"] for output in outputs if "data" in output]
