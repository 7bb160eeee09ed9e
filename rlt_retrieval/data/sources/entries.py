"""What can be indexed: video files, folders of videos, and the samples of shards, each under a name of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from rlt_retrieval.data.shards import BadSample, ShardEntry, expand_shards, load_sample, scan_shard
from rlt_retrieval.data.sources.folder import list_videos
from rlt_retrieval.errors import ShardError, SourceError


def video_name(path: str | Path) -> str:
    """The name of a file in an index: its absolute path. A sample of a shard is `<shard>#<key>`."""
    return os.path.abspath(path)


@dataclass(frozen=True)
class VideoEntry:
    """One video to index: a file, or a sample of a shard. `size` and `mtime_ns` are those of the file or shard."""

    video: str
    size: int
    mtime_ns: int
    sample: ShardEntry | None = None  # None: a file of its own
    problem: str | None = None  # why it cannot even be read

    def load(self) -> tuple[str | bytes, str | None]:
        """What the decoder takes, and the caption if there is one.

        Raises:
            ShardError: a sample without media.
        """
        if self.sample is None:
            return self.video, None
        sample = load_sample(self.sample)
        if isinstance(sample, BadSample):
            raise ShardError(sample.reason)
        return sample.media, sample.captions[0] if sample.captions else None


class VideoSources:
    """What the given paths hold.

    entries: every video once, by its name in the index, in order.
    Raises:
        SourceError: a path that does not exist or holds no video. ShardError: a shard that cannot be opened.
    """

    def __init__(self, sources: Sequence[str | Path]) -> None:
        names = [video_name(source) for source in sources]
        self._names = frozenset(names)
        self._below = tuple(f"{name.rstrip(os.sep)}{mark}" for name in names for mark in (os.sep, "#"))
        self.entries: dict[str, VideoEntry] = {}
        for source in sources:
            found = list(_source_entries(Path(source)))
            if not found:
                raise SourceError(
                    f"{source} holds no video; give video files, folders of videos or .tar shards"
                )
            for entry in found:
                self.entries.setdefault(entry.video, entry)

    def __contains__(self, video: str) -> bool:
        """Whether a video of this name lies, or lay once, in one of them: in a folder, a shard, or as the file."""
        return video in self._names or video.startswith(self._below)


def _source_entries(source: Path) -> Iterator[VideoEntry]:
    if source.is_dir():
        shards = _list_shards(source)
        with suppress(SourceError) if shards else nullcontext():
            yield from map(_file_entry, list_videos(source))
    elif source.suffix == ".tar" or (not source.exists() and "{" in str(source)):
        shards = expand_shards([source])
    elif source.is_file():
        shards = []
        yield _file_entry(source)
    else:
        raise SourceError(f"{source} does not exist; give video files, folders of videos or .tar shards")
    for shard in shards:
        yield from _shard_entries(shard)


def _list_shards(folder: Path) -> list[Path]:
    """Like `list_videos`: at any depth, sorted, without hidden ones."""
    shards = (path for path in folder.rglob("*.tar") if path.is_file())
    return sorted(
        path for path in shards if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _file_entry(path: Path) -> VideoEntry:
    stat = path.stat()
    return VideoEntry(video_name(path), stat.st_size, stat.st_mtime_ns)


def _shard_entries(shard: Path) -> Iterator[VideoEntry]:
    stat = shard.stat()
    for sample in scan_shard(shard):
        name = f"{video_name(shard)}#{sample.key}"
        if isinstance(sample, BadSample):
            yield VideoEntry(name, stat.st_size, stat.st_mtime_ns, problem=sample.reason)
        else:
            yield VideoEntry(name, stat.st_size, stat.st_mtime_ns, sample)
