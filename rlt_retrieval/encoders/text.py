"""The text tower: open_clip's own tokenizer and encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from rlt_retrieval.encoders.towers.building import has_transformers, needs_transformers
from rlt_retrieval.encoders.towers.hub import offline_if_unreachable
from rlt_retrieval.encoders.towers.weight_files import short_reason
from rlt_retrieval.errors import ModelError

TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language", "reduction_mask"}

Tokenize = Callable[[Sequence[str]], Tensor]  # texts → int64 [Q, context_length]


def build_text_tokenizer(text_cfg: dict[str, Any]) -> Tokenize:
    """The tokenizer that open_clip pairs with a text tower.

    Args:
        text_cfg: "text_cfg" of an open_clip model configuration.
    Returns:
        A function from texts to int64 ids [Q, context_length].
    Raises:
        MissingDependencyError: the tower needs a Hugging Face tokenizer, and transformers or sentencepiece is not
            installed.
        ModelError: the files of that tokenizer cannot be had, and the message says which to bring; or a configuration
            with options beyond `TOKENIZER_OPTIONS`.
    """
    context_length = text_cfg.get("context_length", 77)
    options = _tokenizer_options(text_cfg.get("tokenizer_kwargs") or {})
    name = text_cfg.get("hf_tokenizer_name")
    if name is None:
        tokenizer = SimpleTokenizer(context_length=context_length, **options)
    else:
        mode = text_cfg.get("tokenizer_mode")
        tokenizer = _hugging_face(name, context_length=context_length, tokenizer_mode=mode, **options)
    return lambda texts: tokenizer(list(texts))


def _tokenizer_options(options: dict[str, Any]) -> dict[str, Any]:
    """Only what open_clip's own configurations set: a foreign one could ask transformers to run its code."""
    strange = sorted(options.keys() - TOKENIZER_OPTIONS)
    if strange:
        raise ModelError(
            f"the backbone's configuration sets tokenizer_kwargs {', '.join(strange)}; allowed are "
            f"{', '.join(sorted(TOKENIZER_OPTIONS))}: take the others out of its open_clip_config.json"
        )
    return options


def encode_text(clip: nn.Module, tokenize: Tokenize, texts: Sequence[str], device: torch.device) -> Tensor:
    """[Q, D], unit norm, in the autograd graph of the tower."""
    ids_QC = tokenize(texts).to(device)
    return clip.encode_text(ids_QC, normalize=True)  # type: ignore[operator]


def _hugging_face(name: str, **options: Any) -> HFTokenizer:
    what = f"the tokenizer {name} of the text tower"
    if not has_transformers():
        raise needs_transformers(what)
    try:
        with offline_if_unreachable():
            return HFTokenizer(name, **options)
    except (
        ImportError,
        ValueError,
        OSError,
    ) as error:  # transformers says "install sentencepiece" in many ways
        if isinstance(error, ImportError) or "sentencepiece" in str(error).lower():
            raise needs_transformers(what) from error
        cached = Path(hub.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        raise ModelError(
            f"{what} could not be had ({short_reason(error)}); copy {cached.name} from the hub's cache of a machine "
            f"with network to {cached.parent}, or put its tokenizer files beside the weights and give that folder as "
            "backbone: local-dir:path/to/folder"
        ) from error
