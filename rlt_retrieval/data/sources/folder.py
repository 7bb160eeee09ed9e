"""A folder of videos, with captions in text files beside them."""

from __future__ import annotations

from pathlib import Path

from rlt_retrieval.data.sources import SourceClip
from rlt_retrieval.errors import SourceError

VIDEO_EXTENSIONS = (
    *("mp4", "mov", "mkv", "webm", "avi", "mpg", "mpeg"),
    *("ts", "m2ts", "3gp", "ogv", "wmv", "flv", "m4v"),
)


def list_videos(folder: str | Path) -> list[Path]:
    """All video files below a folder, by extension in any case, sorted; hidden files and folders are skipped.

    Raises:
        SourceError: not a folder, not readable, or no video in it.
    """
    root = Path(folder)
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise SourceError(f"{root}: {problem}; give a folder that holds videos")
    try:
        videos = sorted(path for path in root.rglob("*") if _is_video(path, root))
    except OSError as error:
        raise SourceError(
            f"{root}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    if not videos:
        raise SourceError(f"{root}: no video in this folder; looked for .{', .'.join(VIDEO_EXTENSIONS)}")
    return videos


def _is_video(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS and path.is_file()


def read_folder(folder: str | Path) -> list[SourceClip]:
    """One clip a video; its captions are the lines of the file with the same stem and .txt, if there is one.

    Raises:
        SourceError: as `list_videos`, and a caption file that is not UTF-8 text.
    """
    root = Path(folder)
    return [
        SourceClip(path, captions_beside(path), path.relative_to(root).as_posix())
        for path in list_videos(root)
    ]


def captions_beside(video: Path) -> tuple[str, ...]:
    side_file = video.with_suffix(".txt")
    if not side_file.is_file():
        return ()
    try:
        lines = side_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{side_file}: not readable as UTF-8 text ({error}); save it as UTF-8") from error
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
