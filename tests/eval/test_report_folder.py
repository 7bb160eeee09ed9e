"""The report's folder: what is in it, that it says what the numbers say, and that no text becomes markup."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ek100_oracle import SENTENCE_CLASSES, clip_classes, clip_ids, oracle_embeddings, sentence_set
from PIL import Image

from rlt_retrieval.errors import RetrievalError
from rlt_retrieval.eval.embedding_file import read_embeddings
from rlt_retrieval.eval.examples import NUM_HITS, NUM_QUERIES, example_queries, extreme_queries, first_hits
from rlt_retrieval.eval.protocols import Pairs
from rlt_retrieval.eval.published import EK100_ROWS
from rlt_retrieval.eval.report import metrics_table
from rlt_retrieval.eval.report_folder import Evaluated, _sample_maps, write_report_folder
from rlt_retrieval.eval.scored import Scored, comparison, score_captions, score_ek100, with_extra_rows
from rlt_retrieval.eval.tables import markdown, result_tables
from rlt_retrieval.viz import png_bytes

HOSTILE = "<script>alert(1)</script> | x"
PNG = png_bytes(np.zeros((2, 2, 3), dtype=np.uint8))


def ek100_scored(num_clips: int = 20, num_official: int = 20, noise: float = 0.3, seed: int = 0) -> Scored:
    z = oracle_embeddings([*clip_classes(num_clips), *SENTENCE_CLASSES])
    z += noise * np.random.default_rng(seed).standard_normal(z.shape)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    scored = score_ek100(
        z[:num_clips],
        clip_ids(num_clips),
        clip_classes(num_clips),
        [HOSTILE] * num_clips,
        z[num_clips:],
        sentence_set(num_official),
    )
    return with_extra_rows(replace(scored, z_bank_BD=z[:4]))


def captions_scored(protocol, num_clips: int = 12) -> Scored:
    z = np.eye(num_clips)
    captions = [
        (f"caption {n // 2}", HOSTILE) if n == 0 else (f"caption {n // 2}",) for n in range(num_clips)
    ]
    z_captions = np.concatenate([z[:1], z])
    return with_extra_rows(score_captions(protocol, z, clip_ids(num_clips), captions, z_captions))


def evaluated(scored: Scored, **more) -> Evaluated:
    values = {**scored.to_dict(), "keep_ratio": 0.5, "skipped": 0}
    return Evaluated("my run", scored, values, **more)


def with_everything(scored: Scored) -> Evaluated:
    return evaluated(
        scored,
        kept_share_V=np.linspace(0.1, 1, len(scored.clip_ids)),
        pictures=lambda rows: [PNG] * len(rows),
    )


@pytest.mark.parametrize("protocol", ["ek100", "msrvtt", "captions"])
def test_the_folder_holds_all_of_it(tmp_path: Path, protocol) -> None:
    scored = ek100_scored() if protocol == "ek100" else captions_scored(protocol)
    folder = tmp_path / "reports" / "one"
    for _ in range(2):  # again over itself
        write_report_folder(folder, with_everything(scored))
    plots = ["average_precision.png", "recall.png", "similarity.png", "tokens_kept.png"]
    assert sorted(os.listdir(folder)) == sorted(
        ["embeddings.npz", "report.html", "result.json", "result.md", *plots]
    )
    for name in plots:
        assert min(Image.open(io.BytesIO((folder / name).read_bytes())).size) > 100
    assert json.loads((folder / "result.json").read_text())["protocol"] == protocol
    file = read_embeddings(folder / "embeddings.npz")
    assert (file.video_ids, file.text_ids) == (list(scored.clip_ids), list(scored.text_ids))
    np.testing.assert_array_equal(file.z_text_ND, scored.z_text_TD)


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    write_report_folder(tmp_path, with_everything(ek100_scored()))
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page
    # The plots; the hits of all five sentences; the best and the worst clips.
    assert page.count("<img") == 4 + len(SENTENCE_CLASSES) * NUM_HITS + 2 * NUM_QUERIES
    assert page.count("<img") == page.count('src="data:image/png;base64,')


def test_the_markdown_stands_beside_the_published_rows() -> None:
    run = evaluated(ek100_scored())
    text = markdown(run.name, run.values)
    for row in EK100_ROWS:
        assert f"| {' | '.join(row)} |" in text
    mean = run.values["mean"]
    assert f"| my run | {100 * mean['mAP']:.2f} | {100 * mean['nDCG']:.2f} | this evaluation |" in text
    low, high = run.values["intervals"]["mAP"]["mean"]
    assert f"{100 * mean['mAP']:.2f} ({100 * low:.2f} to {100 * high:.2f})" in text
    assert "dual softmax (uses all test queries)" in text
    assert "QB-norm (uses a query bank; text to video only)" in text


def test_a_partial_set_says_so_everywhere(tmp_path: Path) -> None:
    note = "partial, 20 of 9,668, not comparable; 5 of 3,842 sentences"
    write_report_folder(tmp_path, evaluated(ek100_scored(num_official=9668)))
    assert f"**{note}**" in (tmp_path / "result.md").read_text()
    assert f"| my run ({note}) |" in (tmp_path / "result.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert page.count(note) == 2
    assert f"<strong>{note}</strong>" in page
    assert json.loads((tmp_path / "result.json").read_text())["note"] == note


def test_a_picture_that_fails_loses_nothing(tmp_path: Path) -> None:
    """No thumbnail: the card stands without. An error in making them: the numbers are there already."""
    scored = ek100_scored()
    write_report_folder(tmp_path / "none", evaluated(scored, pictures=lambda rows: [None] * len(rows)))
    assert (tmp_path / "none" / "report.html").read_text().count("<img") == 3  # the plots

    def fail(rows):
        raise RetrievalError("no picture")

    with pytest.raises(RetrievalError, match="no picture"):
        write_report_folder(tmp_path / "error", evaluated(scored, pictures=fail))
    assert {"result.json", "result.md", "embeddings.npz"} <= set(os.listdir(tmp_path / "error"))


def test_the_words_explain_the_columns(tmp_path: Path) -> None:
    write_report_folder(tmp_path, evaluated(ek100_scored()))
    for name in ("result.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "“left out” counts queries with nothing to find in this set" in text
        assert text.index("text to video") < text.index("video to text")


def test_the_terminal_says_clips_and_over_how_many_videos() -> None:
    last = metrics_table({"x": ek100_scored().to_dict()}).splitlines()[-1]
    assert last.startswith("x: 20 clips, 5 texts;")
    assert "; mean mAP, 95 % interval over 3 videos: " in last


def test_a_sample_of_the_matrix_says_which_rows_it_holds() -> None:
    pairs = Pairs(np.arange(90.0 * 2).reshape(90, 2), np.eye(90, 2))
    maps = _sample_maps(pairs)
    assert list(maps) == ["Similarity, one clip every 3 rows", "Relevancy, one clip every 3 rows"]
    np.testing.assert_array_equal(maps["Similarity, one clip every 3 rows"][:, 0], pairs.similarity[::3, 0])
    assert "Similarity, every clip" in _sample_maps(Pairs(np.eye(5), np.eye(5)))


def test_msrvtt_needs_the_1k_a_set_to_be_comparable_and_does_not_merge() -> None:
    scored = captions_scored("msrvtt")
    assert scored.note == (
        "12 videos and 13 texts, not the 1,000 of each that 1k-A has: not comparable with published rows"
    )
    assert captions_scored("captions").to_dict()["num_texts"] == 7
    whole = score_captions("msrvtt", np.eye(1000), clip_ids(1000), [("a",)] * 1000, np.eye(1000))
    assert whole.note is None
    assert "43.1" in str(result_tables("x", whole.to_dict())[0].rows)


def test_a_comparison_is_in_the_markdown() -> None:
    first, second = ek100_scored(), ek100_scored(noise=1, seed=1)
    values = {**first.to_dict(), "comparison": comparison(first, "other.npz", second)}
    text = markdown("mine", values)
    difference = 100 * (first.to_dict()["mean"]["mAP"] - second.to_dict()["mean"]["mAP"])
    assert "## Minus other.npz" in text
    assert f"| mAP | mean | {difference:+.2f} |" in text
    assert text.index("| mAP | text to video |") < text.index("| mAP | video to text |")


def test_a_cell_cannot_break_the_markdown_table() -> None:
    run = evaluated(ek100_scored())
    assert "| a \\| b | " in markdown("a | b", run.values)


def test_best_and_worst_queries_never_overlap_and_skip_those_left_out() -> None:
    similarity = np.eye(7)[:, ::-1] + np.eye(7)
    relevancy = np.eye(7)
    relevancy[2] = 0
    chosen = extreme_queries(similarity, relevancy)
    assert len({query for query, _ in chosen}) == len(chosen) == 6
    assert 2 not in {query for query, _ in chosen}
    precisions = [precision for _, precision in chosen]
    assert precisions == sorted(precisions, reverse=True)


def test_hits_follow_the_rule_for_ties() -> None:
    assert first_hits(np.array([0.5, 0.9, 0.9, 0.1, 0.5]), np.array([0, 1, 0.5, 1, 1])) == [2, 1, 0, 4]


def test_pictures_are_asked_for_once_and_shown_beside_their_clips() -> None:
    scored = ek100_scored()
    asked = []

    def pictures(rows):
        asked.append(list(rows))
        return [f"picture of {row}".encode() for row in rows]

    page = "".join(example_queries(scored, pictures))
    assert "<img" in page
    clip_part = page.split("Best clips")[1]
    assert clip_part.index("the query") < clip_part.index('class="query"')  # then come its texts
    assert len(asked) == 1
    assert asked[0] == sorted(set(asked[0]))
    assert "<img" not in "".join(example_queries(scored, None))


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RetrievalError, match="file"):
        write_report_folder(tmp_path / "file", evaluated(ek100_scored()))
