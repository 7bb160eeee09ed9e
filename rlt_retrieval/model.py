"""VideoTextModel: an open_clip model that reads run-length tokens of videos instead of images.

Shapes: B clips, Q texts, D embedding, T frames, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlt_retrieval.config import RATIO_REDUCERS, VideoSettings, explain
from rlt_retrieval.data.video import FrameTransform, resize_frames
from rlt_retrieval.encoders.attention import Backend
from rlt_retrieval.encoders.packing import PackedTokens, Tokenizer, pack
from rlt_retrieval.encoders.reducers import make_tokenizer
from rlt_retrieval.encoders.text import build_text_tokenizer, encode_text
from rlt_retrieval.encoders.towers.loading import build_clip, create_clip
from rlt_retrieval.encoders.video import VideoEncoder
from rlt_retrieval.errors import ModelError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_FORMAT = 1

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a model but its weights; saved as config.json."""

    backbone: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    video: VideoSettings
    added_logit_bias: bool = False  # by `add_logit_bias`; the backbone has none

    def to_json(self) -> str:
        values = {**vars(self), "video": self.video.model_dump()}
        return json.dumps({"format": _FORMAT, **values}, indent=2, default=list)

    @staticmethod
    def from_json(text: str) -> ModelConfig:
        values = json.loads(text)
        if values.pop("format") != _FORMAT:
            raise ValueError(f"format is not {_FORMAT}")
        return ModelConfig(**{**values, "video": VideoSettings(**values["video"])})


class VideoTextModel(nn.Module):
    """Two towers in one embedding space: `encode_video` and `encode_text` give unit-norm float32 vectors.

    Build one with `create`, read a saved one with `load`; both return it in eval mode.
    """

    def __init__(self, clip: nn.Module, config: ModelConfig, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.clip = clip
        self.video = VideoEncoder(clip.visual, config.video, backend=backend)  # type: ignore[arg-type]
        self.config = config
        self.origin: dict[str, Any] | None = (
            None  # arguments of `create` or `load` that give this model again
        )

    @classmethod
    def create(
        cls,
        backbone: str | Mapping[str, Any] = "ViT-B-16",
        pretrained: str | Path | None = "openai",
        *,
        device: str = "auto",
        quick_gelu: bool | None = None,
        seed: int = 0,
        backend: Backend = "auto",
        **video_settings: Any,
    ) -> VideoTextModel:
        """A model from stock weights (or random ones, said once).

        Args:
            backbone: open_clip model name (docs/models.md), `hf-hub:org/name` or `local-dir:PATH` (which bring their
                own weights), or a configuration table.
            pretrained: open_clip tag (downloaded once), local weight file, or None for random weights. A published
                AVION dual encoder (arXiv 2309.16669) is known by its names; it was trained for layout "joint".
            device: "auto" (CUDA where there is one), or a torch device.
            quick_gelu: activation of a local weight file; None: the backbone's name decides. The own one of a tag
                or of an AVION file wins.
            seed: of random weights.
            video_settings: fields of `VideoSettings`: layout, length_bias, cls_bias, reducer, threshold,
                reference, refresh_every, keep_ratio, tubelet_size, num_frames, stochastic_depth, patch_dropout.
        Raises:
            ModelError: unknown backbone, unsupported tower, weights that cannot be had, impossible settings.
        """
        settings = _video_settings(video_settings)
        backbone = _from_anywhere(backbone) if isinstance(backbone, str) else backbone
        made = create_clip(backbone, pretrained, quick_gelu=quick_gelu, seed=seed)
        name = backbone if isinstance(backbone, str) else "custom"
        config = ModelConfig(name, made.model_cfg, made.preprocess_cfg, settings)
        model = cls(made.module, config, backend=backend)
        if made.temporal_table_TD is not None:
            model.video.set_temporal_table(made.temporal_table_TD)
        model = model.to(resolve_device(device)).eval()
        if pretrained is not None and Path(pretrained).is_file():
            pretrained = os.path.abspath(pretrained)
        model.origin = {
            "backbone": backbone if isinstance(backbone, str) else dict(backbone),
            "pretrained": pretrained,
            "quick_gelu": quick_gelu,
            "seed": seed,
            **settings.model_dump(),
        }
        return model

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", backend: Backend = "auto") -> VideoTextModel:
        """The model that `save` wrote to the folder `path` (a run folder's `model` is found too).

        Raises:
            ModelError: no such folder, or one that does not hold a whole model.
        """
        folder = find_model_folder(path)
        try:
            config = ModelConfig.from_json((folder / CONFIG_FILE).read_text())
            state = load_file(folder / WEIGHTS_FILE)
            model = cls(build_clip(config.model_cfg, config.preprocess_cfg), config, backend=backend)
            model.load_state_dict(state)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" …")
            raise ModelError(
                f"{folder} does not hold a whole model ({reason}); train or save it again"
            ) from error
        model.origin = {"path": os.path.abspath(folder)}
        return model.to(resolve_device(device)).eval()

    @classmethod
    def from_origin(cls, origin: Mapping[str, Any], *, device: str = "auto") -> VideoTextModel:
        """The model whose `origin` this is: loaded again, or created again."""
        if "path" in origin:
            model = cls.load(origin["path"], device=device)
            return model.with_settings(**origin["settings"]) if "settings" in origin else model
        return cls.create(**origin, device=device)

    def with_settings(self, **changes: Any) -> VideoTextModel:
        """The same weights (shared, not copied) with other video settings, e.g. `reducer="none"`.

        Raises:
            ModelError: impossible settings, or another layout, tubelet size or number of frames: other weights belong
                to these.
        """
        fixed = [name for name in ("layout", "tubelet_size", "num_frames") if name in changes]
        if fixed:
            raise ModelError(f"{fixed[0]} belongs to the weights; create or train a model for another")
        if changes.get("reducer", self.config.video.reducer) not in RATIO_REDUCERS:
            changes = {"keep_ratio": None, **changes}
        video = _video_settings({**self.config.video.model_dump(), **changes})
        twin = VideoTextModel(self.clip, replace(self.config, video=video), backend=self.video.backend)
        twin.video.load_state_dict(self.video.state_dict(), assign=True)
        twin.origin = _with_changes(self.origin, changes)
        return twin.to(self.device).train(self.training)

    def save(self, path: str | Path) -> None:
        """Write config.json and model.safetensors to the folder `path`, whole or not at all.

        Raises:
            ModelError: the folder cannot be written.
        """
        folder = Path(path)
        part, replaced = (folder.parent / f".{folder.name}.{kind}" for kind in ("part", "replaced"))
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        try:
            for leftover in (part, replaced):  # of a save that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            part.mkdir(parents=True)
            (part / CONFIG_FILE).write_text(self.config.to_json())
            save_file(state, part / WEIGHTS_FILE)
            for file in part.iterdir():
                _flush(file)
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(part, folder)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot write the model to {folder}: {error}; choose another folder") from error
        finally:
            for leftover in (part, replaced):
                shutil.rmtree(leftover, ignore_errors=True)

    def export(self, path: str | Path) -> None:
        """Write the towers as an open_clip state dict (.safetensors), unchanged in name and shape.

        `open_clip.create_model(name, pretrained=path)` reads it. What was added for video, or for the sigmoid loss
        by `add_logit_bias`, is left out. Weights that came from AVION are for `config.model_cfg`, whose embedding
        size and norms no open_clip name has.

        Raises:
            ModelError: a path of another kind, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ModelError(f"cannot export to {path}: expected a file name that ends in .safetensors")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.clip.state_dict().items()}
        if self.config.added_logit_bias:
            del state["logit_bias"]
        try:
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
                save_file(state, Path(temporary) / path.name)
                os.replace(Path(temporary) / path.name, path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot write {path}: {error}; choose another place") from error

    def add_logit_bias(self) -> None:
        """Give the model the bias that the sigmoid loss trains (SigLIP, arXiv 2303.15343, section 3: -10)."""
        if self.clip.logit_bias is None:
            self.clip.logit_bias = nn.Parameter(torch.tensor(-10.0, device=self.device))
            model_cfg = {**self.config.model_cfg, "init_logit_bias": -10.0}
            self.config = replace(self.config, model_cfg=model_cfg, added_logit_bias=True)

    @property
    def device(self) -> torch.device:
        return self.video.tower.patch_weight.device

    @property
    def dimension(self) -> int:
        """D, the size of the embeddings."""
        return self.config.model_cfg["embed_dim"]

    @property
    def tokenizer(self) -> Tokenizer:
        """Video tokenizer: uint8 [T, 3, H, W] at the model's size → VideoTokens."""
        return make_tokenizer(self.config.video, self.video.tower.patch_size)

    @property
    def transform(self) -> FrameTransform:
        """How a frame becomes this model's input (size, resize mode, interpolation of the backbone)."""
        preprocess = self.config.preprocess_cfg
        height, width = preprocess["size"]
        return FrameTransform(
            height=height,
            width=width,
            resize_mode=preprocess["resize_mode"],
            interpolation=preprocess["interpolation"],
            fill_color=preprocess["fill_color"],
        )

    def encode_video(self, frames: Tensor | Sequence[Tensor]) -> Tensor:
        """Embed clips.

        Args:
            frames: uint8 [B, T, 3, H, W], or a list of uint8 [T, 3, H, W]. Frames of another size than the
                model's go through the backbone's own resizing.
        Returns:
            float32 [B, D], unit norm, on the model's device.
        Raises:
            ValueError: frames of another dtype or shape.
        """
        return self.encode_tokens(self._tokens(frames))

    def encode_frames(self, frames: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Embed every frame of each clip, for moments finer than a clip; layout "frame" only.

        Args:
            frames: as in `encode_video`.
        Returns:
            float32 [T, D] a clip, unit norm; the clip's embedding is their normalised mean.
        Raises:
            ValueError: frames of another dtype or shape, or a model of another layout.
        """
        with self._inference_precision():
            return self.video.encode_frames(self._tokens(frames))

    def _tokens(self, frames: Tensor | Sequence[Tensor]) -> PackedTokens:
        return pack([self.tokenizer(resize_frames(clip, self.transform)) for clip in frames])

    def encode_tokens(self, packed: PackedTokens) -> Tensor:
        """Embed packed tokens: float32 [B, D], unit norm. Gradients flow unless the caller is in `torch.no_grad()`."""
        with self._inference_precision():
            return self.video(packed)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: float32 [Q, D], unit norm. Gradients flow as in `encode_tokens`."""
        with self._inference_precision():
            z_QD = encode_text(self.clip, self._tokenize_text, texts, self.device)
        return z_QD if z_QD.dtype == torch.float64 else z_QD.float()

    def check_text_tokenizer(self) -> None:
        """Make the text tokenizer now rather than at the first text.

        Raises:
            MissingDependencyError, ModelError: it needs packages or files that are not here.
        """
        assert self._tokenize_text

    def sha256(self) -> str:
        """Hash of settings and weights: equal for models that give the same embeddings."""
        digest = hashlib.sha256(self.config.to_json().encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def _tokenize_text(self) -> Any:
        return build_text_tokenizer(self.config.model_cfg["text_cfg"])

    def _inference_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Half precision on a GPU that has it; training brings its own."""
        return contextlib.nullcontext() if self.training else autocast(self.device, "auto")


def _video_settings(values: dict[str, Any]) -> VideoSettings:
    try:
        return VideoSettings(**values)
    except ValidationError as error:
        raise ModelError(f"video settings: {explain(error, VideoSettings)}") from error


def _with_changes(origin: dict[str, Any] | None, changes: dict[str, Any]) -> dict[str, Any] | None:
    """The origin of a twin: a loaded model's file says its own settings, a created one's origin holds them."""
    if origin is None or "path" not in origin:
        return origin and {**origin, **changes}
    return {**origin, "settings": {**origin.get("settings", {}), **changes}}


def _from_anywhere(backbone: str) -> str:
    """A backbone's name that means the same in every working directory."""
    prefix = "local-dir:"
    return prefix + os.path.abspath(backbone[len(prefix) :]) if backbone.startswith(prefix) else backbone


def _flush(path: Path) -> None:
    """Make a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def resolve_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one.

    Raises:
        ModelError: a device that torch does not have here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); use 'auto' or 'cpu'"
        ) from error
    return resolved


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast: "auto" on a CUDA device that has it, "bf16" always, "fp32" never."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" or (precision == "auto" and has_bf16):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def find_model_folder(path: str | Path) -> Path:
    """The folder with config.json and model.safetensors: `path` itself or its `model`.

    Raises:
        ModelError: neither is one.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder
    raise ModelError(
        f"{path} is not a saved model: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE} "
        "(a training run writes one as RUN_DIR/model)"
    )
