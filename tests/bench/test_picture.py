"""The README's picture shows the committed figures, and comes out of its command again."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import picture
from bench.tables import read

ROOT = Path(picture.__file__).resolve().parent.parent


def words(svg: str) -> list[str]:
    """Every piece of text, in the order of drawing."""
    root = ElementTree.fromstring(svg)
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def committed() -> tuple[list[dict], list[list[dict]]]:
    runs = json.loads((ROOT / picture.RESULTS).read_text())["runs"]
    return runs, [read(ROOT / path) for path in picture.STEPS]


@pytest.mark.parametrize("name", picture.BACKGROUNDS)
def test_the_committed_picture_is_of_the_committed_results(name):
    """Texts rather than bytes: another matplotlib may draw its paths otherwise."""
    drawn = picture.picture(*committed(), picture.BACKGROUNDS[name])
    stored = (ROOT / "docs" / f"overview-{name}.svg").read_text()
    assert words(stored) == words(drawn) and len(stored) < 40_000
    readme = (ROOT / "README.md").read_text()
    assert f"docs/overview-{name}.svg" in readme


def test_figures_and_ratios():
    runs = [
        {"recipe": "cramfast", "seconds": 600.0, "threads": 1, "unigram_entropy": 7.25,
         "curve": {"tokens": [0, 1e6, 4e6], "heldout_loss": [9.0, 6.0, 4.321]}},
    ]  # fmt: skip
    rates = {"cramfast": 12_000.0, "transformers": 3_000.0}
    rows = [{"system": s, "tokens_per_s": r, "threads": 4, "layers": 2, "width": 128} for s, r in rates.items()]
    shown = words(picture.picture(runs, [rows], picture.BACKGROUNDS["light"]))
    for text in ("cramfast: 4.32", "word frequencies alone: 7.25", "12,000", "3,000 (4.0× slower)", "2 layers of 128"):
        assert text in shown
    assert any("10 minutes on one CPU core" in text for text in shown)
    assert any("4 CPU cores" in text for text in shown)


def test_the_command_writes_both(tmp_path, monkeypatch, capsys):
    results, steps = ROOT / picture.RESULTS, [str(ROOT / path) for path in picture.STEPS]
    words = ["picture", "--results", str(results), "--steps", *steps, "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    picture.main()
    light, dark = (tmp_path / f"overview-{name}.svg" for name in ("light", "dark"))
    assert "overview-dark.svg" in capsys.readouterr().out
    ours = [picture.BACKGROUNDS[name].ours for name in ("light", "dark")]
    assert ours[0] in light.read_text() and ours[1] not in light.read_text() and ours[1] in dark.read_text()
