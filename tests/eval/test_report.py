"""The HTML page, the terminal table, the chart."""

import io
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rlt_retrieval.errors import RetrievalError
from rlt_retrieval.eval import evaluate, report
from rlt_retrieval.eval.protocols import captions_protocol
from rlt_retrieval.viz import png_bytes

PNG = png_bytes(np.zeros((2, 2, 3), dtype=np.uint8))
HOSTILE = "<script>alert(\"x\")</script> & 'y'"


class Page(HTMLParser):
    """Collects what a browser would see, and whether every tag closes."""

    VOID = frozenset({"img", "meta"})

    def __init__(self, document):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag, css_class=""):
        return [a for name, a in self.tags if name == tag and css_class in ["", *a.get("class", "").split()]]


def whole_page():
    cards = [
        report.HitCard(PNG, 1, 0.5, True, HOSTILE),
        report.HitCard(PNG, 2, 0.25, False),
        report.HitCard(PNG, 3, 0),
    ]
    return report.page(
        HOSTILE,
        [
            report.heading(HOSTILE),
            report.paragraph(HOSTILE),
            report.table([HOSTILE, "R@1"], [[HOSTILE, 0.5], ["b", None]]),
            report.image_row([(PNG, HOSTILE), (PNG, "")]),
            report.hit_grid([(HOSTILE, cards)]),
        ],
    )


def test_text_is_escaped_everywhere_and_nothing_is_loaded():
    page = Page(whole_page())
    assert (
        page.text.count(HOSTILE) == 9
    )  # title twice; heading; paragraph; header; cell; caption; query; card
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    sources = [a["src"] for a in page.all("img")]
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in whole_page()


def test_hits_say_right_wrong_or_nothing():
    page = Page(whole_page())
    assert [len(page.all("div", name)) for name in ("hit", "right", "wrong")] == [3, 1, 1]
    assert "1. 0.500 right" in page.text
    assert "2. 0.250 wrong" in page.text


def test_table_formats_numbers_and_marks_the_best():
    rows = [["a", 0.51, 3.0, 12560], ["b", 0.5, 2.0, None], ["c", float("nan"), 2.0, 7]]
    document = report.table(["run", "R@1", "rank", "videos"], rows, best={"R@1": "highest", "rank": "lowest"})
    page = Page(document)
    assert len(page.all("td", "best")) == 3  # one recall, two tied ranks
    assert '<td class="number best">0.510</td>' in document
    assert '<td class="number">12,560</td>' in document
    assert page.text.count(report.NO_VALUE) == 2


def test_a_column_without_numbers_has_no_best():
    document = report.table(["run", "R@1"], [["a", None]], best={"R@1": "highest"})
    assert Page(document).all("td", "best") == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), ("x", "x"), (1234, "1,234"), (0.84, "0.840"), (1234.56, "1,234.6"), (float("nan"), "–")],
)
def test_format_number(value, text):
    assert report.format_number(value) == text


# ---- writing ----


def test_write_report_replaces_the_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("old")
    report.write_report(target, "<p>ü</p>")
    assert target.read_text(encoding="utf-8") == "<p>ü</p>"
    assert os.listdir(tmp_path) == ["report.html"]


def test_write_report_into_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(RetrievalError, match=r"report\.html: the report cannot be written \(No such file"):
        report.write_report(tmp_path / "none" / "report.html", "x")


def test_a_full_disk_keeps_the_old_report(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def no_room(source, destination):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(RetrievalError, match="No space left on device"):
        report.write_report(target, "new")
    assert (os.listdir(tmp_path), target.read_text()) == (["report.html"], "old")


# ---- terminal and charts ----


def test_metrics_table_of_captions():
    perfect = captions_protocol(np.eye(3), np.eye(3), [0, 1, 2], ["a", "b", "c"])
    collapsed = captions_protocol(np.ones((3, 3)), np.ones((3, 3)), [0, 1, 2])
    lines = report.metrics_table({"perfect": perfect.to_dict(), "flat": collapsed.to_dict()}).splitlines()
    assert len({len(line) for line in lines[:6]}) == 1  # aligned
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "perfect",
        "text to video",
        *["1.000"] * 3,
        "1.0",
        "1.0",
        "1.000",
        "1.000",
    ]
    assert lines[6] == "perfect: 3 videos, 3 texts"
    assert lines[7] == "flat: 3 videos, 3 texts; text to video tied: 3; video to text tied: 3"


def test_metrics_table_of_soft_relevancies_shows_only_its_columns():
    text = report.metrics_table({"ek": evaluate(np.eye(2), np.array([[1, 0], [0, 0.5]])).to_dict()})
    assert text.splitlines()[0].split() == ["|", "run", "|", "direction", "|", "mAP", "|", "nDCG", "|"]
    assert "| ek  | mean " in text
    assert text.splitlines()[-1] == "ek: text to video mAP left out: 1; video to text mAP left out: 1"


def test_line_chart_is_a_png_and_does_not_touch_the_global_plotting_state():
    import matplotlib

    backend = matplotlib.rcParams._get_backend_or_none()
    png = report.line_chart_png({"a": ([0, 1], [2, 1]), "b": ([0, 1], [1, 2])}, "step", "loss", "Loss")
    assert Image.open(io.BytesIO(png)).size == (704, 396)
    assert matplotlib.rcParams._get_backend_or_none() == backend
