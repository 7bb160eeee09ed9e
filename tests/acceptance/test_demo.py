"""`make demo` reaches the promised quality on unseen compositions. Wall time is printed, never asserted."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def figures() -> dict:
    subprocess.run(["make", "demo"], cwd=ROOT, check=True)
    values = json.loads((ROOT / "demo_out" / "rlt-retrieval-demo.json").read_text())
    print(json.dumps(values, indent=2))
    return values


def test_quality_on_unseen_compositions(figures: dict) -> None:
    text_to_video = figures["scores"]["rlt/rlt"]["text_to_video"]
    assert figures["scores"]["rlt/rlt"]["num_videos"] == 256
    assert figures["scores"]["rlt/rlt"]["num_texts"] == 256, "the compared captions are distinct"
    assert text_to_video["recall@1"] >= 0.75
    assert text_to_video["recall@5"] >= 0.95


def test_keeps_at_most_40_percent_of_the_tokens(figures: dict) -> None:
    assert figures["keep_ratio"] <= 0.40


def test_sees_the_direction_of_motion(figures: dict) -> None:
    assert figures["direction_accuracy"] >= 0.90
    assert figures["reversed_direction_accuracy"] >= 0.85


def test_two_by_two_has_equal_training_time(figures: dict) -> None:
    assert set(figures["scores"]) == {"rlt/rlt", "rlt/dense", "dense/dense", "dense/rlt"}
    assert figures["scores"]["rlt/dense"]["keep_ratio"] == 1.0
    assert figures["dense_training_steps"] < figures["training_steps"]


def test_report_is_self_contained(figures: dict) -> None:
    page = (ROOT / "demo_out" / "report.html").read_text()
    text, num_images = re.subn(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert num_images > 3
    assert not re.search(r"https?:|src=\"(?!\")|<script|<link|@import", text)
