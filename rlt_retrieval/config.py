"""Typed, frozen run configuration: recipes are complete TOML files; unknown keys and wrong types raise."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlt_retrieval.errors import ConfigError


class Settings(BaseModel):
    """Base of all configuration tables."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Reducer = Literal[
    "none",
    "frames",
    "resolution",
    "random",
    "rlt",
    "gated",
    "motion",
    "tome",
    "vid_tldr",
    "centerclip",
    "rlt+random",
    "rlt+tome",
]
REDUCERS: tuple[Reducer, ...] = get_args(Reducer)
RATIO_REDUCERS = ("frames", "resolution", "tome", "vid_tldr", "centerclip", "rlt+random", "rlt+tome")
_SINGLE_FRAME_REDUCERS = ("frames", "resolution", "gated", "motion")  # of pixels of one frame a token


class VideoSettings(Settings):
    """How a clip becomes tokens and tokens an embedding; saved with every model.

    layout, length_bias, cls_bias: see encoders/video.py. reducer: encoders/reducers/__init__.py says what each is and
    which of `threshold`, `reference`, `refresh_every` (tubelets) and `keep_ratio` it reads. stochastic_depth and
    patch_dropout act in training only.
    """

    layout: Literal["joint", "frame"] = "frame"
    length_bias: bool = False
    cls_bias: Literal["zero", "log_T"] = "zero"
    reducer: Reducer = "rlt"
    threshold: float = Field(0.1, allow_inf_nan=False)
    reference: Literal["previous", "anchor"] = "anchor"
    refresh_every: int | None = Field(None, ge=0)
    keep_ratio: float | None = Field(None, gt=0, le=1)
    tubelet_size: Literal[1, 2] = 1
    num_frames: int = Field(16, ge=1)
    stochastic_depth: float = Field(0.0, ge=0, lt=1)
    patch_dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> VideoSettings:
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames {self.num_frames} is no multiple of tubelet_size {self.tubelet_size}"
            )
        if self.cls_bias != "zero" and not self.length_bias:
            raise ValueError("cls_bias needs length_bias = true")
        if self.layout == "frame" and (self.tubelet_size != 1 or self.patch_dropout or self.length_bias):
            raise ValueError(
                "layout 'frame' takes tubelet_size 1, no patch_dropout and no length_bias; use 'joint'"
            )
        if self.reducer in _SINGLE_FRAME_REDUCERS and self.tubelet_size != 1:
            raise ValueError(f"reducer {self.reducer!r} takes tubelet_size 1")
        if self.reducer in RATIO_REDUCERS and self.keep_ratio is None:
            raise ValueError(
                f"reducer {self.reducer!r} needs keep_ratio, the share to keep, e.g. keep_ratio=0.5"
            )
        if self.reducer not in RATIO_REDUCERS and self.keep_ratio is not None:
            raise ValueError(f"reducer {self.reducer!r} has no keep_ratio; {', '.join(RATIO_REDUCERS)} have")
        if self.reducer == "centerclip" and self.layout != "frame":
            raise ValueError("reducer 'centerclip' takes layout 'frame'")
        return self

    @property
    def refresh_tubelets(self) -> int:
        """refresh_every; where it is not given, 8 in layout "frame" (docs/reducers.md) and 0, never, in "joint"."""
        if self.refresh_every is None:
            return 8 if self.layout == "frame" else 0
        return self.refresh_every

    @property
    def required_keep_ratio(self) -> float:
        """keep_ratio of a reducer that reads it."""
        assert self.keep_ratio is not None, f"reducer {self.reducer!r} reads no keep_ratio"
        return self.keep_ratio

    @property
    def num_tubelets(self) -> int:
        return self.num_frames // self.tubelet_size


Share = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


class ModelRecipe(Settings):
    """Where the weights start. `backbone_config` (an open_clip configuration table) replaces `backbone`."""

    backbone: str = "ViT-B-16"
    pretrained: str = "openai"  # tag, file, or "none" for random weights
    backbone_config: dict[str, Any] | None = None
    quick_gelu: bool | None = None


class DataRecipe(Settings):
    """Shards and how they are read."""

    train: tuple[str, ...] = Field(min_length=1, strict=False)
    eval: tuple[str, ...] = Field((), strict=False)
    num_streams: int = Field(8, ge=1)
    shuffle_buffer: int = Field(1000, ge=1)
    crop_scale: tuple[PositiveShare, PositiveShare] | None = Field(None, strict=False)
    num_workers: int = Field(1, ge=0)
    decode_timeout_seconds: float = Field(60.0, gt=0, le=86400)
    max_bad_fraction: float = Field(0.1, ge=0, le=1)


LossName = Literal["clip", "siglip", "mi_mm", "adaptive_mi_mm", "sms"]
RANKING_LOSSES: tuple[LossName, ...] = ("mi_mm", "adaptive_mi_mm", "sms")


class OptimRecipe(Settings):
    """Loss, batch and schedule. `batch_size` counts clips over all ranks; `token_budget` cuts micro-batches.

    loss, margin and tolerance: see training/losses.py; no margin means the published one. `max_grad_norm = inf` does
    not clip.
    """

    loss: LossName = "clip"
    margin: float | None = Field(None, gt=0, allow_inf_nan=False)
    tolerance: float = Field(0.1, ge=0, allow_inf_nan=False)
    freeze_logit_scale: bool = False
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    token_budget: int = Field(65536, ge=1)
    start_learning_rate: float = Field(0.0, ge=0)  # the warm-up leaves from here
    learning_rate: float = Field(gt=0)
    final_learning_rate: float = Field(0.0, ge=0)
    added_lr_scale: float = Field(1.0, gt=0)  # of what is added beside the towers and starts at zero
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Share, Share] = Field((0.9, 0.98), strict=False)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _margin_is_used(self) -> OptimRecipe:
        if self.margin is not None and self.loss not in RANKING_LOSSES:
            raise ValueError(f"loss {self.loss!r} has no margin; only {', '.join(RANKING_LOSSES)} have")
        return self


class Recipe(Settings):
    """One training run, whole. See configs/ for examples."""

    run_dir: str
    seed: int = Field(0, ge=0)
    eval_every: int = Field(0, ge=0)  # steps; 0: only at the end
    checkpoint_every: int = Field(100, ge=1)
    model: ModelRecipe = ModelRecipe()
    video: VideoSettings
    data: DataRecipe
    optim: OptimRecipe

    @model_validator(mode="after")
    def _batch_fits_streams(self) -> Recipe:
        if self.optim.batch_size % self.data.num_streams:
            raise ValueError(
                f"optim.batch_size {self.optim.batch_size} is no multiple of data.num_streams {self.data.num_streams}"
            )
        return self


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: a TOML file, or the name of a recipe that ships with the package ("demo").
        overrides: "table.key=value" each; the value in TOML's own notation, a bare word is a string.
    Raises:
        ConfigError: no such recipe, no TOML, an unknown key, a wrong type; names the key and what is expected.
    """
    path = find_recipe(name_or_path)
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"recipe {path}: {explain(error, Recipe)}") from error


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe given by path or by name.

    Raises:
        ConfigError: neither a file nor a known name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    folders = [folder for folder in _recipe_folders() if folder.is_dir()]
    for folder in folders:
        candidate = folder / f"{name_or_path}.toml"
        if path.parent == Path() and candidate.is_file():
            return candidate
    names = sorted({file.stem for folder in folders for file in folder.glob("*.toml")})
    raise ConfigError(f"recipe {str(name_or_path)!r} is neither a file nor one of: {', '.join(names)}")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error in one line, with the nearest known key for a misspelt one."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"key {key!r} is missing; add it or pass --set {key}=…"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {first['input']!r})" if key else message


def _known_keys(model: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _recipe_folders() -> tuple[Path, ...]:
    package = Path(__file__).parent
    return (package / "configs", package.parent / "configs")


def parse_override(override: str) -> tuple[str, Any]:
    """ "table.key=value" as key and value; the value in TOML's own notation, a bare word is a string.

    Raises:
        ConfigError: no "=" or no key.
    """
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r}: expected key=value, e.g. optim.steps=100")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text.strip()


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """ "key=value" each (see `parse_override`), for what checks them itself."""
    return dict(parse_override(override) for override in overrides)


def parse_video_settings(overrides: Iterable[str]) -> dict[str, Any]:
    """ "key=value" each, checked, as arguments for `VideoTextModel.create`.

    Raises:
        ConfigError: no field of `VideoSettings`, or an impossible value.
    """
    values = parse_overrides(overrides)
    try:
        VideoSettings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"--set: {explain(error, VideoSettings)}") from error
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, value = parse_override(override)
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {table!r} is a value, not a table")
    values[last] = value


def default_num_workers() -> int:
    """Decoding processes by core count: a quarter of the cores, at least one (the rest compute)."""
    return max(1, num_cores() // 4)


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
