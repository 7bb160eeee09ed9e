"""Captioned clips as JSON lines: {"video": "a.mp4", "captions": ["a dog runs", …]}, one object a line.

A line may have "caption" instead of (or beside) "captions", "start_seconds", "end_seconds" and "name". MSVD, DiDeMo,
VATEX and ActivityNet Captions come in this way: docs/protocols says how.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlt_retrieval.data.sources import Source
from rlt_retrieval.data.sources.captioned import CaptionedClips, read_seconds, reading
from rlt_retrieval.errors import SourceError


def read_jsonl(path: str | Path, videos_dir: str | Path | None = None) -> Source:
    """Clips of a UTF-8 file of JSON lines, in order of first mention; blank lines and other keys are ignored.

    Videos are relative to the file's folder, where each must be, or to `videos_dir`, where some may be absent. Lines
    with the same video, span and name are one clip with all their captions; without "name", video and span are it.

    Raises:
        SourceError: with file and line: no JSON object, no video, no caption, a wrong type, a bad number, end ≤ start,
            a name of two clips, missing video file; or the file is missing, empty or not UTF-8.
    """
    path = Path(path)
    clips = CaptionedClips(path, videos_dir)
    for where, line in _objects(path):
        clips.add(
            where,
            _text(where, line, "video"),
            _line_seconds(where, line, "start_seconds") or 0.0,
            _line_seconds(where, line, "end_seconds"),
            _read_captions(where, line),
            _text(where, line, "name"),
        )
    return clips.source()


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", object) of every line that is not blank."""
    with reading(path), path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                where = f"{path}, line {number}"
                yield where, _parse(where, text)


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not valid JSON ({error}); write one object a line") from error
    if not isinstance(line, dict):
        raise SourceError(f"{where}: expected an object, found {type(line).__name__}; write one a line")
    return line


def _text(where: str, line: dict[str, Any], key: str) -> str:
    value = line.get(key)
    if value is not None and not isinstance(value, str):
        raise SourceError(f"{where}: {key} is {value!r:.80}; write it as text")
    return (value or "").strip()


def _line_seconds(where: str, line: dict[str, Any], key: str) -> float | None:
    value = line.get(key)
    return None if value is None else read_seconds(where, key, value)


def _read_captions(where: str, line: dict[str, Any]) -> list[str]:
    captions = line.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SourceError(f"{where}: captions is {captions!r:.80}; write a list of texts")
    found = [text for text in (*map(str.strip, captions), _text(where, line, "caption")) if text]
    if not found:
        raise SourceError(f'{where}: no caption; write "captions": ["…"] or delete the line')
    return found
