"""Small shards made on the spot for the tests of this folder: media are short byte strings."""

import io
import json
import tarfile
from pathlib import Path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_numbered(folder: Path, sizes: list[int], group_size: int = 0) -> list[Path]:
    """Shards of the given sizes; sample keys count on, groups of `group_size` neighbours if given."""
    folder.mkdir(parents=True)
    paths, first = [], 0
    for number, size in enumerate(sizes):
        members = []
        for i in range(first, first + size):
            meta = {"captions": ["c"], **({"group": str(i // group_size)} if group_size else {})}
            members += [(f"{i:04d}.mp4", b"m"), (f"{i:04d}.json", json.dumps(meta).encode())]
        paths.append(write_tar(folder / f"clips-{number:06d}.tar", members))
        first += size
    return paths
