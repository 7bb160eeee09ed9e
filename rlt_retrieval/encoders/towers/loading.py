"""Creating open_clip models: by name with pretrained weights, or from a configuration table."""

from __future__ import annotations

import logging
import socket
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import open_clip
import torch
from huggingface_hub import constants as hub
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from rlt_retrieval.encoders.towers import unsupported_tower
from rlt_retrieval.encoders.towers.avion import (
    AVION_PREPROCESS,
    avion_config,
    is_avion,
    temporal_table,
    to_open_clip,
)
from rlt_retrieval.encoders.towers.weight_files import (
    WEIGHT_SUFFIXES,
    does_not_load,
    read_tensors,
    safe_tensors,
    short_reason,
)
from rlt_retrieval.errors import ModelError

_CONNECT_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipModel:
    """An open_clip model with all that is needed to build it again: `model_cfg` and `preprocess_cfg`.

    temporal_table_TD: float32, what the weights bring for T frames of a video; None for image weights.
    """

    module: nn.Module
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    temporal_table_TD: Tensor | None = None


def create_clip(
    backbone: str | Mapping[str, Any],
    pretrained: str | Path | None,
    *,
    quick_gelu: bool | None = None,
    seed: int = 0,
) -> ClipModel:
    """Build an open_clip model on the CPU in float32.

    Args:
        backbone: an open_clip model name, or a configuration table (embed_dim, vision_cfg, text_cfg, …).
        pretrained: an open_clip tag, a local weight file (an AVION dual encoder is known by its names), or None
            for random weights.
        quick_gelu: activation of a local weight file (None: name or table decide); the own one of a tag or of an
            AVION file always wins.
        seed: of the random weights.
    Raises:
        ModelError: unknown name or tag, weights that cannot be had or do not fit; the message says the way out.
    """
    if isinstance(backbone, Mapping):
        model_cfg = {**backbone}
        name = "the configured backbone"
    else:
        model_cfg, name = _named_config(backbone), backbone
    path = None if pretrained is None or _is_tag(name, pretrained) else _weight_file(name, pretrained)
    state = {} if path is None else read_tensors(name, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if path is not None and is_avion(state):
            return _create_avion(name, model_cfg, path, state)
        model_cfg["quick_gelu"] = _quick_gelu(name, model_cfg, pretrained, quick_gelu)
        if isinstance(backbone, Mapping):
            module = build_clip(model_cfg)
            _load_local(module, name, path)
        else:
            module = _create_named(backbone, pretrained, model_cfg["quick_gelu"])
    if pretrained is None:
        logger.warning("%s has random weights (pretrained none): train it before you trust its hits", name)
    return _clip_model(module, model_cfg)


def _clip_model(
    module: nn.Module, model_cfg: dict[str, Any], temporal_table_TD: Tensor | None = None
) -> ClipModel:
    preprocess_cfg = dict(open_clip.get_model_preprocess_cfg(module))
    preprocess_cfg["size"] = list(module.visual.image_size)  # type: ignore[union-attr, arg-type]
    return ClipModel(module.eval(), model_cfg, preprocess_cfg, temporal_table_TD)


def build_clip(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any] | None = None) -> nn.Module:
    """A randomly initialised open_clip model of a configuration; its class is the one open_clip would choose.

    Raises:
        ModelError: a configuration that open_clip cannot build.
    """
    _check_tables(model_cfg)
    options = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    # Weights follow: a Hugging Face text tower must not download its own first.
    options["text_cfg"] = {**options["text_cfg"], "hf_model_pretrained": False}
    if "multimodal_cfg" in model_cfg:
        model_class = CoCa
    elif model_cfg.get("custom_text") or "hf_model_name" in model_cfg.get("text_cfg", {}):
        model_class = CustomTextCLIP
    else:
        model_class = CLIP
    try:
        module = model_class(**options)
    except (TypeError, AssertionError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ModelError(
            f"the backbone configuration cannot be built: {error}; see open_clip's model_configs for examples"
        ) from error
    cfg = {**vars(open_clip.transform.PreprocessCfg()), **(preprocess_cfg or {})}
    cfg["size"] = module.visual.image_size
    open_clip.model.set_model_preprocess_cfg(module, cfg)
    return module


def _check_tables(model_cfg: Mapping[str, Any]) -> None:
    for table in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg.get(table), Mapping):
            raise ModelError(
                f"the backbone configuration cannot be built: it has no table {table}; see open_clip's "
                "model_configs for examples"
            )


def _named_config(name: str) -> dict[str, Any]:
    if name.startswith(("hf-hub:", "local-dir:")):
        raise ModelError(
            f"backbone {name!r}: give an open_clip model name and its weights as a tag or a local file instead"
        )
    config = open_clip.get_model_config(name.replace("/", "-"))
    if config is None:
        raise ModelError(
            f"backbone {name!r} is not an open_clip model; try ViT-B-32, ViT-B-16 or ViT-L-14 (all: "
            "python -c 'import open_clip; print(open_clip.list_models())')"
        )
    _check_tower_kind(config["vision_cfg"])
    return config


def _check_tower_kind(vision_cfg: Mapping[str, Any]) -> None:
    """Refuse before the download what `adapt_tower` would refuse after it."""
    if vision_cfg.get("timm_model_name"):
        raise unsupported_tower(f"timm {vision_cfg['timm_model_name']}")
    if not isinstance(vision_cfg.get("layers", 12), int):
        raise unsupported_tower("ModifiedResNet")


def _quick_gelu(
    name: str, model_cfg: Mapping[str, Any], pretrained: str | Path | None, asked: bool | None
) -> bool:
    """Activation of the towers: the tag's own, else what was asked for, else the configuration's; a choice is said."""
    configured = bool(model_cfg.get("quick_gelu", False))
    tag_cfg = open_clip.get_pretrained_cfg(name.replace("/", "-"), str(pretrained)) if pretrained else {}
    if tag_cfg:
        needed = bool(tag_cfg.get("quick_gelu", False))
        if needed != configured or asked not in (None, needed):
            logger.warning("%s + %s: using %s, as its weights need", name, pretrained, _activation(needed))
        return needed
    chosen = configured if asked is None else asked
    if pretrained is not None:
        logger.warning(
            "%s + %s: using %s, by %s (a -quickgelu model name or quick_gelu changes it)",
            name,
            Path(pretrained).name,
            _activation(chosen),
            "its configuration" if asked is None else "request",
        )
    return chosen


def _activation(quick_gelu: bool) -> str:
    return "QuickGELU" if quick_gelu else "GELU"


def _is_tag(name: str, pretrained: str | Path) -> bool:
    return bool(open_clip.get_pretrained_cfg(name.replace("/", "-"), str(pretrained)))


def _create_avion(name: str, model_cfg: dict[str, Any], path: Path, state: Mapping[str, Tensor]) -> ClipModel:
    _check_tables(model_cfg)
    try:
        model_cfg = avion_config(model_cfg, state)
        module = build_clip(model_cfg, AVION_PREPROCESS)
        weights = to_open_clip(state, module.state_dict())
        table_TD = temporal_table(state, len(weights["visual.class_embedding"]))
    except ValueError as error:
        raise does_not_load(name, path, error) from error
    module.load_state_dict(weights)
    logger.warning(
        "%s + %s: an AVION dual encoder; using GELU, norms, mean and std as it was trained with",
        name,
        path.name,
    )
    return _clip_model(module, model_cfg, table_TD)


def _create_named(name: str, pretrained: str | Path | None, quick_gelu: bool) -> nn.Module:
    is_tag = pretrained is not None and _is_tag(name, pretrained)
    try:
        with _quiet_open_clip(), safe_tensors(), _hub_offline_if_unreachable(is_tag):
            return open_clip.create_model(
                name,
                pretrained=None if pretrained is None else str(pretrained),
                pretrained_text=False,
                quick_gelu=quick_gelu,
                device="cpu",
                weights_only=True,
            )
    except Exception as error:  # open_clip, the hub and torch raise many kinds; all mean: no weights
        if not is_tag:
            raise does_not_load(name, pretrained, error) from error
        raise ModelError(
            f"the weights {name} + {pretrained} could not be downloaded ({short_reason(error)}); get the file on a "
            "machine with network and pass it instead: --pretrained path/to/weights.safetensors "
            '(pretrained="…" in Python)'
        ) from error


def _load_local(module: nn.Module, name: str, path: Path | None) -> None:
    if path is None:
        return
    try:
        with _quiet_open_clip(), safe_tensors():
            open_clip.load_checkpoint(module, str(path), weights_only=True)
    except Exception as error:  # as above
        raise does_not_load(name, path, error) from error


def _weight_file(name: str, pretrained: str | Path) -> Path:
    path = Path(pretrained)
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        return path
    seen = "is not a weight file" if path.is_file() else "is neither a known tag nor a file"
    tags = open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
    known = f"tags of {name}: {', '.join(tags)}; or " if tags else ""
    raise ModelError(f"pretrained {str(pretrained)!r} {seen}; {known}a file ({', '.join(WEIGHT_SUFFIXES)})")


@contextmanager
def _hub_offline_if_unreachable(needs_hub: bool) -> Iterator[None]:
    """Without network the hub's client retries for most of a minute before it looks into its cache."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or (needs_hub and not _reachable(hub.ENDPOINT))
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _reachable(url: str) -> bool:
    if urllib.request.getproxies():  # then only the proxy knows
        return True
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Without open_clip's own log lines and its activation warning: `create_clip` says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(before)
