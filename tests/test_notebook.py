"""The notebook of the library runs, from its first cell to its last."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "initializers.ipynb"


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert "kmeans" in capsys.readouterr().out
    assert len(drawn) == 2
    plt.close("all")
    default, ours = names["rates"].values()
    assert ours.spread < 5 < 100 < default.spread
    assert all(min(values) < values[0] for values in names["losses"].values())
