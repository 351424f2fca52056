"""The HTML report: what it holds, that it stands alone, stays small, and survives what a run can leave behind."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_run import make_run, rows, tiny_config

from cramfast import stages
from cramfast.errors import UserError
from cramfast.pages.charts import BINS, binned, tick
from cramfast.pages.numbers import short, span
from cramfast.report import write_report
from cramfast.session.record import Record, read_record


class Tags(HTMLParser):
    """Every tag with its attributes; complains about tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def write(folder, written):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "trial", tiny_config())


def page_of(run):
    return write_report(run).read_text(encoding="utf-8")


def test_holds_the_figures_and_stands_alone(run):
    page = page_of(run)
    for part in (
        "6.900 → 5.250",
        "6.500",
        "unigram entropy",
        "123 k",
        "52,000 tokens",
        "C++ for the CPU",
        "a CPU",
        "12.5 %",
    ):
        assert part in page, part
    for part in ("model.feedforward", "weight_decay", "pipeline(&quot;fill-mask&quot;"):
        assert part in page, part
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    for tag, attributes in tags.seen:
        assert tag not in ("script", "link", "img", "iframe")
        for key, value in attributes.items():
            assert key.startswith("xmlns") or "//" not in (value or ""), f"{tag} {key}={value}"
    assert "@import" not in page and "url(http" not in page
    assert not list(run.glob("*.partial"))


def test_charts_are_valid_and_ids_do_not_collide(run):
    pictures = re.findall(r"<svg.*?</svg>", page_of(run), flags=re.S)
    assert len(pictures) == 9
    seen = set()
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        clips = {element.get("id") for element in root.iter() if element.tag.endswith("clipPath")}
        assert not clips & seen
        seen |= clips
    assert "#010101" not in "".join(pictures) and "var(--ink)" in pictures[0]


def test_stays_small_however_long_the_run(run):
    write(run, rows(20_000))
    assert write_report(run).stat().st_size < 400_000


def test_skipped_steps_and_missing_values(run):
    written = rows(30)
    for row in written[5:9]:
        row |= {"loss": None, "grad_norm": None, "skipped": 1}
    written[12]["loss"] = math.nan
    write(run, written)
    page = page_of(run)
    assert "4 of 30 updates were skipped" in page and "nan" not in page.lower().replace("nanosecond", "")


def test_no_finite_loss_at_all(run):
    written = [
        row | ({"loss": None, "skipped": 1} if "loss" in row else {}) for row in rows(4) if "heldout_loss" not in row
    ]
    write(run, written)
    assert "no finite values" in page_of(run)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rows(run, count):
    write(run, rows(3)[:count])
    assert "</html>" in page_of(run)


def test_rows_of_a_killed_and_resumed_run_count_once(run):
    written = rows(6)[:-1]
    again = [{"run": {"device": "another CPU"}}, *(row | {"loss": 1.0} for row in written[6:])]
    torn = json.dumps(written[-1])[:20]
    lines = [json.dumps(row) for row in written] + [torn] + [json.dumps(row) for row in again]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    record = read_record(run)
    assert [row["step"] for row in record.steps] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in record.steps[4:]] == [1.0, 1.0]
    assert record.resumed == 1 and record.unreadable_lines == 1 and record.run["device"] == "another CPU"
    page = page_of(run)
    assert "Resumed 1 time;" in page and "1 unreadable line of" in page


def test_text_of_the_run_is_escaped(run):
    written = rows(2)
    written[0]["run"]["device"] = "<script>alert(1)</script>"
    write(run, written)
    assert "<script>" not in page_of(run)


def test_errors_name_the_file(tmp_path, run):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    (run / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(run)


def test_a_report_that_cannot_be_written_is_named(run):
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: cannot be written .*disk"):
        write_report(run)


def test_the_model_is_loaded_from_where_it_lies(run, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    named = run.relative_to(run.parent.parent)
    assert f"python -m cramfast.export {named} trial-hf" in write_report(named).read_text()
    (run / "hf").mkdir()
    (run / "hf" / "config.json").touch()
    assert f"model=&quot;{named}/hf&quot;" in write_report(named).read_text()


def test_an_mfu_too_high_to_be_true_is_said_so(run):
    assert "achine busy" not in page_of(run)
    write(run, [row | ({"mfu": 0.99} if "mfu" in row else {}) for row in rows(4)])
    assert "(machine busy)" in page_of(run)


def test_held_out_losses_under_another_masking_are_marked(run):
    assert "does not compare" not in page_of(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"masking": "all_mask"}))
    assert "Trained with --masking all_mask" in page_of(run) and "does not compare" in page_of(run)


def test_bins_keep_mean_and_range():
    x = list(range(10_000))
    y = [math.nan if i % 100 == 7 else float(i % 10) for i in x]
    centre, mean, low, high = binned(x, y)
    assert BINS - 5 <= len(centre) <= BINS and (low == 0).all() and (high == 9).all()
    assert abs(mean.mean() - 4.5) < 0.1 and (centre[1:] > centre[:-1]).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (short(math.nan), "–"),
        (short(950), "950"),
        (short(45_600_000), "45.6 M"),
        (short(1.2e15), "1.20e15"),
        (span(45), "45 s"),
        (span(600), "10.0 min"),
        (span(86400), "24.00 h"),
        (tick(0.0005), "0.0005"),
        (tick(20_000), "20 k"),
        (tick(1.5e8), "150 M"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("order", "tokens", "said"), [("sentences", 250, "25%"), ("sentences", 1000, ""), ("shuffled", 250, "")]
)
def test_a_sorted_text_that_was_not_read_to_its_end_is_said_so(order, tokens, said):
    manifest = {"splits": {"train": {"tokens": 1000}}}
    record = Record("run", Path("run"), {}, [{"step": 1, "tokens": tokens}], [], {"order": order}, manifest)
    line = stages.partly_read(record)
    assert (f"the first {said} of the text" in line) == bool(line) == bool(said)
