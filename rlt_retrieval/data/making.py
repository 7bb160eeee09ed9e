"""Making shards from videos: cut clips out in worker processes, go on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.data.files import make_folder, write_whole
from rlt_retrieval.data.shards import (
    BadSample,
    ShardSample,
    check_keys,
    check_shard_size,
    sanitize_key,
    scan_shard,
    shard_name,
    write_tar,
)
from rlt_retrieval.data.sources import Source, SourceClip
from rlt_retrieval.data.video import cut_span
from rlt_retrieval.data.workers import Failure, Item, WorkerPool
from rlt_retrieval.errors import ShardError

# Measured: 82 cuts of two seconds out of 19 public videos of 24 to 30 frames a second, mean of the videos (a
# screen recording 5,000, sports 140,000). Footage of 50 or 60 frames a second may need up to twice as much.
BYTES_PER_SECOND_AT_288 = 80_000


@dataclass(frozen=True)
class MakeReport:
    """What `make_shards` left in its folder.

    `failures`: the clips that could not be read (`shard` names the video); absent ones are not among them.
    """

    shards: tuple[Path, ...]
    num_clips: int
    failures: tuple[BadSample, ...]


def plan_shards(source: Source, *, samples_per_shard: int, short_side: int = 288) -> dict[str, Any]:
    """What `make_shards` would do with a source; hours and gigabytes (a rough guess) are of the clips that are there.

    Hours and gigabytes only where all spans are known; missing_hours, those of the absent clips, likewise.
    """
    clips = source.clips
    values = {**count_clips(source), "shards": math.ceil(len(clips) / samples_per_shard)}
    seconds, missing_seconds = _total_seconds(clips), _total_seconds(source.absent)
    if seconds < math.inf:
        # as if bytes grew with the area of the picture
        num_bytes = seconds * BYTES_PER_SECOND_AT_288 * (short_side / 288) ** 2
        values |= {"hours": round(seconds / 3600, 2), "expected_gb": round(num_bytes / 1e9, 3)}
    if source.absent and missing_seconds < math.inf:
        values |= {"missing_hours": round(missing_seconds / 3600, 2)}
    return values


def _total_seconds(clips: Iterable[SourceClip]) -> float:
    """Infinite where a clip goes to the end of its video."""
    return sum(
        math.inf if clip.end_seconds is None else clip.end_seconds - clip.start_seconds for clip in clips
    )


def count_clips(source: Source) -> dict[str, Any]:
    """Clips, those with captions, and missing videos with the number of their clips where there are any."""
    values = {"clips": len(source.clips), "captioned": sum(bool(clip.captions) for clip in source.clips)}
    if source.absent:
        values |= {"missing_videos": len(source.missing), "missing_clips": len(source.absent)}
    return values


def make_shards(
    clips: Sequence[SourceClip],
    out_dir: str | Path,
    *,
    samples_per_shard: int,
    short_side: int = 288,
    num_workers: int,
    timeout_seconds: float,
    absent: Sequence[SourceClip] = (),
    dataset: Mapping[str, Any] = MappingProxyType({}),
    on_progress: Callable[[int, int], None] | None = None,
) -> MakeReport:
    """Cut every clip out of its video in worker processes and write the shards; repeat the call to go on.

    Shard i holds source clips i·n … (i+1)·n − 1, so finished shards are kept when a killed run is repeated
    with the same clips, settings and files (`plan.json` tells). Clips that cannot be read are left out and
    listed in `failures.jsonl`, and so are `absent` ones, whose videos are not there. `dataset.json` is written
    last: the counts, and what `dataset` says. `on_progress(num_done, num_clips)`.

    Videos that come later make another plan, which the folder refuses: make all clips anew in an empty one.

    Raises:
        ShardError: no clip, two clips of one name, something else in the folder, no clip readable, disk full.
    """
    check_shard_size(samples_per_shard)
    folder = Path(out_dir)
    keys = [sanitize_key(clip.name) for clip in clips]
    absent_keys = [sanitize_key(clip.name) for clip in absent]
    if not clips:
        raise ShardError(f"{folder}: no clip to make shards from; give a source with at least one")
    check_keys([*keys, *absent_keys], set())
    _claim_folder(folder, _plan(clips, samples_per_shard, short_side))
    log = FailureLog(folder / "failures.jsonl", max_bad_fraction=1.0)
    for key, clip in zip(absent_keys, absent, strict=True):
        log.bad(key, str(clip.video), "no such video")
    keyed = list(zip(keys, clips, strict=True))
    starts = range(0, len(keyed), samples_per_shard)
    parts = {folder / shard_name(n): keyed[i : i + samples_per_shard] for n, i in enumerate(starts)}
    todo = {shard: part for shard, part in parts.items() if not shard.exists()}
    num_done = len(keyed) - sum(map(len, todo.values()))
    missing = [clip for part in todo.values() for _, clip in part]
    with (
        WorkerPool(num_workers, timeout_seconds) as pool,
        closing(_cut_all(pool, missing, short_side)) as results,
    ):
        for shard, part in todo.items():
            samples = []
            for (key, clip), result in zip(part, results, strict=False):
                if isinstance(result, bytes):
                    samples.append(_clip_sample(key, clip, result))
                else:
                    # decoding errors name the video themselves, and so does the list
                    log.bad(key, str(clip.video), result.removeprefix(f"{clip.video}: "))
                num_done += 1
                if on_progress:
                    on_progress(num_done, len(keyed))
            if samples:
                write_tar(shard, samples)
    shards = [shard for shard in parts if shard.exists()]
    return _finish(folder, shards, log.failures, set(absent_keys), dataset)


def _cut_all(
    pool: WorkerPool, clips: Sequence[SourceClip], short_side: int
) -> Generator[bytes | str, None, None]:
    """For every clip in order its bytes, or why there are none."""
    tasks = ((clip.video, clip.start_seconds, clip.end_seconds, short_side) for clip in clips)
    media = b""
    for event in pool.run(_cut, tasks, ordered=True):
        if isinstance(event, Item):
            media = event.value
        else:
            yield event.message if isinstance(event, Failure) else media


def _cut(video: Path, start_seconds: float, end_seconds: float | None, short_side: int) -> Iterator[bytes]:
    end_seconds = math.inf if end_seconds is None else end_seconds
    yield cut_span(video, start_seconds=start_seconds, end_seconds=end_seconds, short_side=short_side)


def _clip_sample(key: str, clip: SourceClip, media: bytes) -> ShardSample:
    return ShardSample(
        key=key,
        media=media,
        captions=clip.captions,
        video_id=clip.video_id or str(clip.video),
        start_seconds=clip.start_seconds,
        end_seconds=clip.end_seconds,
        classes=clip.classes,
    )


def _plan(clips: Sequence[SourceClip], samples_per_shard: int, short_side: int) -> bytes:
    """What the shards are made from, as JSON; other clips, settings or changed files give another plan."""
    digest = hashlib.sha256()
    for clip in clips:
        try:
            status = clip.video.stat()
            file_identity: tuple[int, ...] = (status.st_size, status.st_mtime_ns)
        except OSError:
            file_identity = ()
        row = (str(clip.video), file_identity, clip.start_seconds, clip.end_seconds, clip.captions, clip.name)
        # only where a source has them: folders begun before clips had ids go on
        ids = (clip.video_id, clip.classes) if clip.video_id or clip.classes else ()
        digest.update(json.dumps(row + ids).encode())
    settings = {"num_clips": len(clips), "samples_per_shard": samples_per_shard, "short_side": short_side}
    return json.dumps({**settings, "clips_sha256": digest.hexdigest()}, indent=1).encode() + b"\n"


def _claim_folder(folder: Path, plan: bytes) -> None:
    """Make the folder ours, or find that it is: empty, or holding this very plan."""
    make_folder(folder)
    plan_file = folder / "plan.json"
    if plan_file.exists():
        if (begun := plan_file.read_bytes()) != plan:
            raise ShardError(
                f"{folder}: holds shards of other clips or settings ({_difference(begun, plan)}); "
                "choose an empty folder, or delete this one to make all anew"
            )
        return
    leftover = f".{plan_file.name}.tmp"
    if foreign := sorted(path.name for path in folder.iterdir() if path.name != leftover):
        raise ShardError(
            f"{folder}: not empty ({foreign[0]}) and not begun by this command; choose an empty folder"
        )
    write_whole(plan_file, lambda file: file.write(plan))


def _difference(begun: bytes, plan: bytes) -> str:
    """What two plans differ in, in words."""
    now = json.loads(plan)
    try:
        values = json.loads(begun)
        then = {name: values[name] for name in now}
    except (ValueError, RecursionError, KeyError, TypeError):
        return "its plan.json is damaged"
    words = {"samples_per_shard": "clips per shard", "short_side": "short side", "num_clips": "clips"}
    changes = [
        f"{words[name]}: {then[name]!r:.40} then, {now[name]} now"
        for name in words
        if then[name] != now[name]
    ]
    if then["num_clips"] == now["num_clips"] and then["clips_sha256"] != now["clips_sha256"]:
        changes.append(f"{now['num_clips']} clips then and now, but they or their video files have changed")
    return "; ".join(changes) or "its plan.json was edited"


def _finish(
    folder: Path,
    shards: Sequence[Path],
    failures: Sequence[BadSample],
    absent_keys: Collection[str],
    dataset: Mapping[str, Any],
) -> MakeReport:
    failures = [failure for failure in failures if failure.key not in absent_keys]
    written = {entry.key for shard in shards for entry in scan_shard(shard)}
    if not written:
        raise ShardError(
            f"{folder}: none of the clips could be read (first: {failures[0].shard}: {failures[0].reason}); "
            "see failures.jsonl there"
        )
    # a clip that failed before the run was killed may have succeeded in the repeat
    failures = tuple(failure for failure in failures if failure.key not in written)
    counts = {
        "num_clips": len(written),
        "num_failures": len(failures),
        **({"num_missing_clips": len(absent_keys)} if absent_keys else {}),
        "shards": [shard.name for shard in shards],
    }
    text = json.dumps({**counts, **dataset}, indent=1).encode() + b"\n"
    write_whole(folder / "dataset.json", lambda file: file.write(text))
    return MakeReport(tuple(shards), len(written), failures)
