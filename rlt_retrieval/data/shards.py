"""WebDataset shards: write them, read anybody's.

A shard is a plain tar; the members of one sample share a key, the file name up to its first dot. From
webdataset come that naming rule (`base_plus_ext`), the tar writer and brace expansion. Its reader is not
used: it reads forward only, so it ends without a word at a torn header and cannot join members that do not
lie side by side, and its `.decode()` unpickles. Here a shard is scanned once (headers only), and members are
then read at their offsets, by who wants them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import string
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from rlt_retrieval.annotations import Classes, is_class_id
from rlt_retrieval.data.files import make_folder, write_whole
from rlt_retrieval.data.sources.folder import VIDEO_EXTENSIONS
from rlt_retrieval.errors import ShardError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
PLAIN_KEY_BYTES = frozenset((string.ascii_letters + string.digits + "_-").encode())
MAX_KEY_LENGTH = 80  # ustar holds 100 characters a name, the suffix included
TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class ShardSample:
    """One clip (or picture) of a shard.

    `media` is the file as stored; its own clock starts at 0. `start_seconds`, `end_seconds` say which span of
    the video `video_id` it was cut from (end None: to the end, or not known). Samples of the same `group`
    that lie next to each other stay together in training. `captions` may be empty. `shard` is the path it was
    read from. `classes` (json keys verb_class and noun_classes) say to which sentences the clip is relevant.
    """

    key: str
    media: bytes
    captions: tuple[str, ...]
    video_id: str
    start_seconds: float
    end_seconds: float | None
    group: str | None = None
    shard: str = ""
    classes: Classes | None = None


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, and why in one line."""

    key: str
    shard: str
    reason: str


# --- keys ---------------------------------------------------------------------------------------------------


def sanitize_key(name: str) -> str:
    """A tar-safe sample key for any name: only `A-Z a-z 0-9 _ - ~`, at most 80 characters.

    Every other byte of the UTF-8 form (dot, slash, space, `~` itself) becomes `~` and two hex digits, which
    can be undone, so two names never share a key. An empty or too long result becomes its first 46
    characters, `~h` and 128 bits of SHA-256; no escape reads `~h`, so these can only collide if the hash
    does.
    """
    # surrogatepass: file names that are not UTF-8 reach Python as lone surrogates
    name_bytes = name.encode("utf-8", "surrogatepass")
    key = "".join(chr(byte) if byte in PLAIN_KEY_BYTES else f"~{byte:02x}" for byte in name_bytes)
    if 0 < len(key) <= MAX_KEY_LENGTH:
        return key
    return f"{key[:46]}~h{hashlib.sha256(name_bytes).hexdigest()[:32]}"


# --- writing ------------------------------------------------------------------------------------------------


def write_shards(
    samples: Iterable[ShardSample], out_dir: str | Path, *, samples_per_shard: int
) -> list[Path]:
    """Write `clips-000000.tar`, … into a folder without shards; the same samples give the same bytes.

    Every shard is written under a temporary name, flushed to disk and renamed: a final name is always whole.

    Raises:
        ShardError: a key twice or not `sanitize_key`-safe, no sample at all, shards already there, disk full,
            folder not writable.
    """
    check_shard_size(samples_per_shard)
    folder = Path(out_dir)
    make_folder(folder)
    if next(folder.glob("clips-*.tar"), None):
        raise ShardError(f"{folder}: already holds shards; choose an empty folder")
    seen: set[str] = set()
    remaining = iter(samples)
    paths: list[Path] = []
    while chunk := list(islice(remaining, samples_per_shard)):
        check_keys((sample.key for sample in chunk), seen)
        paths.append(folder / shard_name(len(paths)))
        write_tar(paths[-1], chunk)
    if not paths:
        raise ShardError(f"{folder}: no sample to write; give at least one")
    return paths


def check_shard_size(samples_per_shard: int) -> None:
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")


def shard_name(index: int) -> str:
    return f"clips-{index:06d}.tar"


def check_keys(keys: Iterable[str], seen: set[str]) -> None:
    """Refuse keys that would fall apart in the tar, and keys in `seen`; adds to `seen`."""
    for key in keys:
        if not re.fullmatch(r"[\w~-]{1,80}", key, re.ASCII):
            raise ShardError(f"key {key!r}: only A-Z a-z 0-9 _ - ~ can be stored; use sanitize_key(name)")
        if key in seen:
            raise ShardError(f"key {key!r}: given to two samples; give every clip a name of its own")
        seen.add(key)


def write_tar(path: Path, samples: Iterable[ShardSample]) -> None:
    def fill(file: BinaryIO) -> None:
        with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for sample in samples:
                text = json.dumps(_meta(sample), sort_keys=True).encode()
                tar.write({"__key__": sample.key, "mp4": sample.media, "json": text})

    write_whole(path, fill)


def _meta(sample: ShardSample) -> dict[str, Any]:
    """What the json member says; `_parse` reads it."""
    meta = asdict(sample)
    for name in ("key", "media", "shard", "classes", *(["group"] if sample.group is None else [])):
        del meta[name]
    if sample.classes is not None:
        meta["verb_class"], meta["noun_classes"] = sample.classes
    return meta


# --- reading ------------------------------------------------------------------------------------------------


def expand_shards(sources: Sequence[str | Path]) -> list[Path]:
    """All shards that `sources` name (tar files, folders of `.tar` files, brace patterns), each file once.

    Raises:
        ShardError: nothing given, something missing, a folder without shards, a URL or shell form (`pipe:`).
    """
    if not sources:
        raise ShardError(
            "no shards given; name tar files, a folder of them, or a pattern like clips-{000000..000003}.tar"
        )
    expanded = [path for source in sources for path in _expand_source(str(source))]
    unique: dict[Path, Path] = {}
    for path in expanded:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def _expand_source(source: str) -> list[Path]:
    if Path(source).exists():
        names = [source]
    elif re.match(r"\w[\w+.-]+:", source):
        raise ShardError(f"{source}: URLs and shell forms are not read; copy the shards to a local folder")
    else:
        try:
            names = list(braceexpand(source))
        except ValueError as error:
            raise ShardError(
                f"{source}: braces do not match; write for example clips-{{000000..000003}}.tar"
            ) from error
    return [path for name in names for path in _expand_path(Path(name))]


def _expand_path(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ShardError(f"{path}: no such shard file or folder; check the path")
    shards = sorted(p for p in path.glob("*.tar") if p.is_file() and not p.name.startswith("."))
    if not shards:
        raise ShardError(f"{path}: no .tar file in this folder; `rlt-retrieval shards make` writes them")
    return shards


@dataclass
class ShardEntry:
    """A sample as a scan sees it: `members` maps suffix → (offset, size) in bytes of the shard."""

    key: str
    shard: Path
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str | None = None


def read_shard(path: str | Path) -> Iterator[ShardSample | BadSample]:
    """All samples of one shard in order of their first member; what cannot be used comes as a `BadSample`.

    A torn tar gives the whole samples before the tear, then one `BadSample` with "truncated" in its reason.

    Raises:
        ShardError: the file is missing or cannot be opened.
    """
    for entry in scan_shard(Path(path)):
        yield load_sample(entry)


def iter_samples(
    paths: Sequence[str | Path], *, rank: int = 0, world_size: int = 1
) -> Iterator[ShardSample | BadSample]:
    """For evaluation: over all ranks every sample exactly once; ranks may get uneven numbers.

    Sample i in the order of `paths` goes to rank i % world_size; only that rank reads its media.
    """
    entries = (entry for path in paths for entry in scan_shard(Path(path)))
    for entry in islice(entries, rank, None, world_size):
        yield load_sample(entry)


def scan_shard(path: Path) -> list[ShardEntry | BadSample]:
    """What a shard holds, read from its headers alone; a damaged end becomes one `BadSample` at the end.

    Raises:
        ShardError: the file is missing or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            members, problem = _list_members(file)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    entries: dict[str, ShardEntry] = {}
    last_key = None
    for member in members:
        key, suffix = base_plus_ext(member.name)
        if key is None or not member.isreg() or member.issparse():
            continue
        last_key = key
        entry = entries.setdefault(key, ShardEntry(key, path))
        suffix = suffix.lower()
        if suffix in entry.members:
            entry.problem = f"two members named {member.name}"
        entry.members[suffix] = (member.offset_data, member.size)
    if problem is None:
        return list(entries.values())
    # Nothing after the last header seen can be trusted: its sample may lack members.
    entries.pop(last_key or "", None)
    return [*entries.values(), BadSample(last_key or "", str(path), problem)]


def _list_members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], str | None]:
    """Headers of a tar, the one torn member included, and what is wrong with its end (None: nothing)."""
    members: list[tarfile.TarInfo] = []
    size_bytes = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                members.append(member)
                # a negative size would send tarfile backwards for ever
                if member.size < 0 or member.offset_data + member.size > size_bytes:
                    break
            # tarfile stops at a damaged header as at the end mark (a block of zeros): look which it was
            file.seek(tar.offset)
            end = file.read(TAR_BLOCK_BYTES)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two from absurd header numbers
        if members:
            return members, f"truncated or damaged tar ({error})"
        return members, f"not a plain tar archive, or truncated at its start ({error})"
    if end == bytes(TAR_BLOCK_BYTES):
        return members, None
    kind = "truncated" if len(end) < TAR_BLOCK_BYTES else "damaged (truncated in the middle?)"
    return members, f"{kind} tar: no end mark after {len(members)} members; copy or make the shard again"


class _UnusableError(Exception):
    """Why one sample cannot be used."""


def load_sample(entry: ShardEntry | BadSample) -> ShardSample | BadSample:
    """Read a sample that `scan_shard` found; what cannot be used comes (and bad ones stay) a `BadSample`."""
    if isinstance(entry, BadSample):
        return entry
    try:
        with entry.shard.open("rb") as file:
            return _parse(entry, file)
    except (_UnusableError, OSError) as error:
        return BadSample(entry.key, str(entry.shard), str(error))


def read_group(entry: ShardEntry | BadSample) -> str | None:
    """The group of a sample that `scan_shard` found, without its media; None for one that cannot be used."""
    if isinstance(entry, BadSample):
        return None
    try:
        with entry.shard.open("rb") as file:
            return _group(_read_meta(entry, file))
    except (_UnusableError, OSError):
        return None


def _parse(entry: ShardEntry, file: BinaryIO) -> ShardSample:
    if entry.problem:
        raise _UnusableError(entry.problem)
    media = _read_media(entry, file)
    meta = _read_meta(entry, file)
    video_id = meta.get("video_id")
    return ShardSample(
        key=entry.key,
        media=media,
        captions=_captions(meta, _read_member(entry, file, "txt")),
        video_id=entry.key if video_id is None else str(video_id),
        start_seconds=_seconds(meta, "start_seconds") or 0.0,
        end_seconds=_seconds(meta, "end_seconds"),
        group=_group(meta),
        shard=str(entry.shard),
        classes=_classes(meta),
    )


def _read_member(entry: ShardEntry, file: BinaryIO, suffix: str) -> bytes | None:
    """Content of the member with this suffix, or of its gzipped form; None if there is neither."""
    packed = suffix not in entry.members
    span = entry.members.get(f"{suffix}.gz" if packed else suffix)
    if span is None:
        return None
    offset, size = span
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise _UnusableError(f"{suffix}: truncated")
    try:
        return gzip.decompress(content) if packed else content
    except (OSError, EOFError, zlib.error) as error:
        raise _UnusableError(f"{suffix}.gz: not gzip data ({error})") from error


def _read_media(entry: ShardEntry, file: BinaryIO) -> bytes:
    for suffix in VIDEO_EXTENSIONS + IMAGE_SUFFIXES:
        media = _read_member(entry, file, suffix)
        if media == b"":
            raise _UnusableError(f"{suffix}: empty")
        if media is not None:
            return media
    found = ", ".join(sorted(entry.members))
    raise _UnusableError(
        f"no video or image member, only: {found} (a suffix is all after a name's first dot)"
    )


def _read_meta(entry: ShardEntry, file: BinaryIO) -> dict[str, Any]:
    content = _read_member(entry, file, "json")
    if content is None:
        return {}
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"json: not valid ({error})") from error
    if not isinstance(meta, dict):
        raise _UnusableError(f"json: expected an object, found {type(meta).__name__}")
    return meta


def _captions(meta: dict[str, Any], text: bytes | None) -> tuple[str, ...]:
    """Captions of `captions`, `caption` and the txt member, in this order, each once."""
    found = meta.get("captions") or []
    if not isinstance(found, list):
        raise _UnusableError("json: captions is not a list")
    found = [*found, *([] if meta.get("caption") is None else [meta["caption"]])]
    if not all(isinstance(caption, str) for caption in found):
        raise _UnusableError("json: a caption is not text")
    if text is not None:
        try:
            found.append(text.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise _UnusableError("txt: not UTF-8") from error
    return tuple(dict.fromkeys(caption.strip() for caption in found if caption.strip()))


def _group(meta: dict[str, Any]) -> str | None:
    group = meta.get("group")
    return None if group is None else str(group)


def _seconds(meta: dict[str, Any], name: str) -> float | None:
    value = meta.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _UnusableError(f"json: {name} is not a number of seconds: {value!r}")
    return float(value)


def _classes(meta: dict[str, Any]) -> Classes | None:
    verb, nouns = meta.get("verb_class"), meta.get("noun_classes")
    if verb is None and nouns is None:
        return None
    if not is_class_id(verb):
        raise _UnusableError(f"json: verb_class is not a class id: {verb!r}")
    if not isinstance(nouns, list) or not all(map(is_class_id, nouns)):
        raise _UnusableError(f"json: noun_classes is not a list of class ids: {nouns!r}")
    return Classes.of(verb, nouns)
