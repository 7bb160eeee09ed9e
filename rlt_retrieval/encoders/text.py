"""The text tower: open_clip's own tokenizer and encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from rlt_retrieval.errors import MissingDependencyError

Tokenize = Callable[[Sequence[str]], Tensor]  # texts → int64 [Q, context_length]


def build_text_tokenizer(text_cfg: dict[str, Any]) -> Tokenize:
    """The tokenizer that open_clip pairs with a text tower.

    Args:
        text_cfg: "text_cfg" of an open_clip model configuration.
    Returns:
        A function from texts to int64 ids [Q, context_length].
    Raises:
        MissingDependencyError: the tower needs a Hugging Face tokenizer and `transformers` is not installed.
    """
    context_length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    name = text_cfg.get("hf_tokenizer_name")
    if name is None:
        tokenizer = SimpleTokenizer(context_length=context_length, **options)
    else:
        try:
            tokenizer = HFTokenizer(
                name,
                context_length=context_length,
                tokenizer_mode=text_cfg.get("tokenizer_mode"),
                **options,
            )
        except ImportError as error:
            raise MissingDependencyError(
                f"the text tower needs the tokenizer {name}, which comes with transformers: pip install transformers"
            ) from error
    return lambda texts: tokenizer(list(texts))


def encode_text(clip: nn.Module, tokenize: Tokenize, texts: Sequence[str], device: torch.device) -> Tensor:
    """[Q, D], unit norm, in the autograd graph of the tower."""
    ids_QC = tokenize(texts).to(device)
    return clip.encode_text(ids_QC, normalize=True)  # type: ignore[operator]
