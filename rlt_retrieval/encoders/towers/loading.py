"""Creating open_clip models: by name with pretrained weights, or from a configuration table."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from torch import Tensor, nn

from rlt_retrieval.encoders.towers.avion import (
    AVION_PREPROCESS,
    avion_config,
    is_avion,
    temporal_table,
    to_open_clip,
)
from rlt_retrieval.encoders.towers.building import build_clip, check_backbone, check_tables
from rlt_retrieval.encoders.towers.hub import quiet_open_clip, repository_file, tag_weights
from rlt_retrieval.encoders.towers.weight_files import (
    WEIGHT_SUFFIXES,
    does_not_load,
    read_tensors,
    safe_tensors,
    short_reason,
)
from rlt_retrieval.errors import ModelError

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


@dataclass(frozen=True)
class _Backbone:
    """What a name or a table stands for.

    preprocess_cfg: what is known to differ from open_clip's defaults. repository: of the hub, and folder: on this
    machine, where the weights lie that came with the configuration.
    """

    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: Mapping[str, Any]
    repository: str | None = None
    folder: Path | None = None

    @property
    def brings_weights(self) -> bool:
        return self.repository is not None or self.folder is not None


def create_clip(
    backbone: str | Mapping[str, Any],
    pretrained: str | Path | None,
    *,
    quick_gelu: bool | None = None,
    seed: int = 0,
) -> ClipModel:
    """Build an open_clip model on the CPU in float32.

    Args:
        backbone: an open_clip model name; `hf-hub:org/name` or `local-dir:PATH`, which hold an open_clip_config.json
            and weights; or a configuration table (embed_dim, vision_cfg, text_cfg, …).
        pretrained: an open_clip tag, a local weight file (an AVION dual encoder is known by its names), or None
            for random weights. Backbones that bring their weights take those instead of any tag.
        quick_gelu: activation of a local weight file (None: name or table decide); the own one of a tag, of a
            backbone that brings its weights or of an AVION file always wins.
        seed: of the random weights.
    Raises:
        ModelError: unknown name or tag, a tower that cannot be walked, weights that cannot be had or do not fit; the
            message says the way out.
        MissingDependencyError: the text tower comes from transformers, which is not installed.
    """
    found = _find(backbone)
    with torch.random.fork_rng(devices=[]):
        check_backbone(found.model_cfg)
        tag_cfg = _tag_cfg(found.name, pretrained)
        path = _weight_file(found, pretrained, tag_cfg)
        torch.manual_seed(seed)
        if path is not None and not tag_cfg:
            state = read_tensors(found.name, path)
            if is_avion(state):
                return _create_avion(found.name, found.model_cfg, path, state)
            if not found.brings_weights:
                _say_doubts(found.name, path)
        model_cfg = {**found.model_cfg, "quick_gelu": _quick_gelu(found, pretrained, quick_gelu)}
        module = build_clip(model_cfg, _preprocess(found.preprocess_cfg, tag_cfg))
    if path is None:
        logger.warning(
            "%s has random weights (pretrained none): train it before you trust its hits", found.name
        )
    else:
        _load_local(module, found.name, path)
    return _clip_model(module, model_cfg)


def _clip_model(
    module: nn.Module, model_cfg: dict[str, Any], temporal_table_TD: Tensor | None = None
) -> ClipModel:
    preprocess_cfg = dict(open_clip.get_model_preprocess_cfg(module))
    preprocess_cfg["size"] = list(module.visual.image_size)  # type: ignore[union-attr, arg-type]
    return ClipModel(module.eval(), model_cfg, preprocess_cfg, temporal_table_TD)


# --- where a configuration comes from -----------------------------------------------------------------------------


def _find(backbone: str | Mapping[str, Any]) -> _Backbone:
    if isinstance(backbone, Mapping):
        return _Backbone("the configured backbone", {**backbone}, {})
    if backbone.startswith("hf-hub:"):
        repository = backbone.removeprefix("hf-hub:")
        config = repository_file(backbone, repository, HF_CONFIG_NAME)
        return _Backbone(backbone, *_read_config(backbone, config), repository=repository)
    if backbone.startswith("local-dir:"):
        folder = Path(backbone.removeprefix("local-dir:"))
        model_cfg, preprocess_cfg = _read_config(backbone, folder / HF_CONFIG_NAME)
        return _Backbone(backbone, _with_local_tokenizer(model_cfg, folder), preprocess_cfg, folder=folder)
    model_cfg = open_clip.get_model_config(backbone.replace("/", "-"))
    if model_cfg is None:
        raise ModelError(
            f"backbone {backbone!r} is not an open_clip model; try ViT-B-32, ViT-B-16 or ViT-L-14 (all: "
            "`rlt-retrieval models`)"
        )
    return _Backbone(backbone, model_cfg, _agreed_preprocess(backbone))


def _read_config(name: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_cfg and preprocess_cfg of an open_clip_config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_cfg, preprocess_cfg = config["model_cfg"], config.get("preprocess_cfg", {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"backbone {name!r}: {path} is not an {HF_CONFIG_NAME} ({short_reason(error)}); expected a JSON file with "
            "model_cfg and preprocess_cfg, as open_clip publishes it beside weights"
        ) from error
    check_tables(model_cfg)
    return model_cfg, preprocess_cfg


def _with_local_tokenizer(model_cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with the folder's own tokenizer files in the place of a name on the hub."""
    text_cfg = model_cfg["text_cfg"]
    if text_cfg.get("hf_tokenizer_name") and any(folder.glob("tokenizer*.json")):
        return {**model_cfg, "text_cfg": {**text_cfg, "hf_tokenizer_name": str(folder.resolve())}}
    return model_cfg


def _agreed_preprocess(name: str) -> dict[str, Any]:
    """What all tags of a name agree on: so a local file of it gets the mean, std and resizing it was trained with."""
    cfgs = _tag_cfgs(name)
    first = cfgs[0] if cfgs else {}
    return {key: value for key, value in first.items() if all(cfg.get(key) == value for cfg in cfgs)}


def _say_doubts(name: str, path: Path) -> None:
    """Where the tags of a name do not agree, nothing tells which of them a local file is."""
    cfgs = _tag_cfgs(name)
    doubts = [
        key
        for key in ("mean", "std", "resize_mode", "interpolation")
        if len({cfg.get(key) for cfg in cfgs}) > 1
    ]
    if doubts:
        logger.warning(
            "%s + %s: the tags of %s differ in %s; using CLIP's own (to choose, put an %s beside the file and give "
            "local-dir:FOLDER as backbone)",
            name,
            path.name,
            name,
            ", ".join(doubts),
            HF_CONFIG_NAME,
        )


def _tag_cfgs(name: str) -> list[dict[str, Any]]:
    return [_tag_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))]


def _preprocess(own: Mapping[str, Any], tag_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, std and resizing that the tag says, else the backbone."""
    return open_clip.transform.merge_preprocess_dict(
        open_clip.transform.merge_preprocess_dict({}, dict(own)), tag_cfg
    )


def _quick_gelu(found: _Backbone, pretrained: str | Path | None, asked: bool | None) -> bool:
    """Activation of the towers: the weights' own, else what was asked for, else the configuration's; it is said."""
    configured = bool(found.model_cfg.get("quick_gelu", False))
    tag_cfg = _tag_cfg(found.name, pretrained)
    if tag_cfg or found.brings_weights:
        needed = bool(tag_cfg.get("quick_gelu", False)) if tag_cfg else configured
        if needed != configured or asked not in (None, needed):
            logger.warning(
                "%s + %s: using %s, as its weights need", found.name, pretrained, _activation(needed)
            )
        return needed
    chosen = configured if asked is None else asked
    if pretrained is not None:
        logger.warning(
            "%s + %s: using %s, by %s (a -quickgelu model name or quick_gelu changes it)",
            found.name,
            Path(pretrained).name,
            _activation(chosen),
            "its configuration" if asked is None else "request",
        )
    return chosen


def _activation(quick_gelu: bool) -> str:
    return "QuickGELU" if quick_gelu else "GELU"


def _tag_cfg(name: str, pretrained: str | Path | None) -> dict[str, Any]:
    """What open_clip knows of a tag; nothing for what is none."""
    return open_clip.get_pretrained_cfg(name.replace("/", "-"), str(pretrained))


# --- where weights come from --------------------------------------------------------------------------------------


def _weight_file(found: _Backbone, pretrained: str | Path | None, tag_cfg: Mapping[str, Any]) -> Path | None:
    if pretrained is None:
        return None
    if tag_cfg:
        return tag_weights(found.name, pretrained, tag_cfg)
    path = Path(pretrained)
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        return path
    if found.brings_weights and path.suffix not in WEIGHT_SUFFIXES:
        return _own_weights(found)
    seen = "is not a weight file" if path.is_file() else "is neither a known tag nor a file"
    tags = open_clip.list_pretrained_tags_by_model(found.name.replace("/", "-"))
    known = f"tags of {found.name}: {', '.join(tags)}; or " if tags else ""
    raise ModelError(f"pretrained {str(pretrained)!r} {seen}; {known}a file ({', '.join(WEIGHT_SUFFIXES)})")


def _own_weights(found: _Backbone) -> Path:
    if found.repository is not None:
        return repository_file(found.name, found.repository, HF_WEIGHTS_NAME)
    assert found.folder is not None
    files = sorted(path for path in found.folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    published = [path for path in files if path.name in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)]
    if not published and len(files) != 1:
        raise ModelError(
            f"backbone {found.name!r}: expected one weight file beside {HF_CONFIG_NAME}, found "
            f"{', '.join(path.name for path in files) or 'none'}; name it {HF_SAFE_WEIGHTS_NAME}"
        )
    return (published or files)[0]


def _create_avion(name: str, model_cfg: dict[str, Any], path: Path, state: Mapping[str, Tensor]) -> ClipModel:
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


def _load_local(module: nn.Module, name: str, path: Path) -> None:
    try:
        with quiet_open_clip(), safe_tensors():
            open_clip.load_checkpoint(module, str(path), weights_only=True)
    except Exception as error:  # open_clip and torch raise many kinds; all mean: other weights
        raise does_not_load(name, path, error) from error
