"""What an index holds, in a form that two builds can be compared by."""

from pathlib import Path
from typing import Any

import numpy as np

from rlt_retrieval.indexing.store import ClipStore

Rows = dict[str, tuple[Any, ...]]


def rows_of(index_path: Path) -> Rows:
    """By video, ids left out: (status, reason, duration_seconds, [(start, end, caption)], embeddings z_ND)."""
    with ClipStore.open(index_path) as store, store._records.snapshot():
        z_of: dict[int, np.ndarray] = {}
        for ids_N, z_ND in store._records.embeddings():
            z_of.update(zip(ids_N.tolist(), z_ND.copy(), strict=True))
        rows: Rows = {}
        for row in store.videos():
            clips = store.clips(row.video)
            spans = [(clip.start_seconds, clip.end_seconds, clip.caption) for clip in clips]
            z_ND = np.array([z_of[clip.clip_id] for clip in clips]).reshape(-1, store.dimension)
            rows[row.video] = (row.status, row.reason, row.duration_seconds, spans, z_ND)
        return rows


def assert_same_rows(actual: Rows, expected: Rows) -> None:
    """The same videos, statuses, reasons and spans; embeddings to 1e-5."""
    assert actual.keys() == expected.keys()
    for video, (*facts, z_ND) in expected.items():
        assert list(actual[video][:-1]) == facts
        np.testing.assert_allclose(actual[video][-1], z_ND, atol=1e-5)


def assert_begins_like(actual: Rows, expected: Rows) -> None:
    """What an unfinished build committed is the beginning of every video of a finished one, nothing else."""
    assert actual.keys() <= expected.keys()
    for video, (status, _, _, spans, z_ND) in actual.items():
        assert spans == expected[video][3][: len(spans)]
        np.testing.assert_allclose(z_ND, expected[video][4][: len(spans)], atol=1e-5)
        assert status in ("incomplete", expected[video][0])
