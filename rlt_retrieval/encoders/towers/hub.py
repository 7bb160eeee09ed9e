"""Files from the hub or from its cache, and what to do without network."""

from __future__ import annotations

import logging
import socket
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import open_clip
from huggingface_hub import constants as hub
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

from rlt_retrieval.encoders.towers.weight_files import short_reason
from rlt_retrieval.errors import ModelError

_CONNECT_SECONDS = 5.0


def tag_weights(name: str, tag: str | Path, tag_cfg: Mapping[str, Any]) -> Path:
    """The weights of a tag.

    Raises:
        ModelError: they cannot be had; the message says which file to bring and where to put it.
    """
    try:
        with quiet_open_clip(), offline_if_unreachable():
            return Path(open_clip.factory.download_pretrained(tag_cfg))
    except Exception as error:  # the hub raises many kinds; all mean: no weights
        repository, _, file = tag_cfg["hf_hub"].rpartition("/")
        raise _not_downloaded(f"the weights {name} + {tag}", repository, file, error) from error


def repository_file(name: str, repository: str, file: str) -> Path:
    """A file of a hub repository; `name` is what errors call the backbone.

    Raises:
        ModelError: as above.
    """
    try:
        with quiet_open_clip(), offline_if_unreachable():
            return Path(open_clip.factory.download_pretrained_from_hf(repository, filename=file))
    except Exception as error:  # as above
        raise _not_downloaded(f"{file} of {name}", repository, file, error) from error


def _not_downloaded(what: str, repository: str, file: str, error: Exception) -> ModelError:
    """Which file to bring, and the two places where to put it."""
    file = {"": HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME: HF_SAFE_WEIGHTS_NAME}.get(file, file)
    cached = Path(hub.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    if file == HF_CONFIG_NAME:
        way = f"get the whole repository and give the folder as backbone: local-dir:path/to/{repository.split('/')[-1]}"
    else:
        way = f'get {file} there and pass it: --pretrained path/to/{file} (pretrained="…" in Python)'
    return ModelError(
        f"{what} could not be downloaded ({short_reason(error)}); on a machine with network open "
        f"{hub.ENDPOINT}/{repository}, {way}; or copy that machine's {cached.name} to {cached.parent}"
    )


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Without network the hub's client retries for most of a minute before it looks into its cache."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not reachable(hub.ENDPOINT)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def reachable(url: str) -> bool:
    """Whether a host answers within seconds."""
    if urllib.request.getproxies():  # then only the proxy knows
        return True
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Without open_clip's own log lines and its activation warning: `create_clip` says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(before)
