"""The text tower: open_clip's own tokenizer and encoder.

Shapes: Q texts, C tokens of the context, L tokens of it that are read, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

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
    """[Q, D], unit norm, in the autograd graph of the tower.

    A causal tower that reads a text at its end token ignores the padding after it. So the context is cut behind the
    longest text of the batch: the embeddings and gradients of the whole context, for the texts' own length.
    """
    ids_QC = tokenize(texts)
    tower = _causal_tower(clip)
    if tower is None or not len(ids_QC):
        return clip.encode_text(ids_QC.to(device), normalize=True)  # type: ignore[operator]
    pool_type, eos_id = _pooling(tower)
    places_QC = torch.arange(ids_QC.shape[1]).expand_as(ids_QC)
    num_read = int(text_global_pool(places_QC, ids_QC, pool_type, eos_id).max()) + 1
    ids_QL = ids_QC[:, :num_read].to(device)
    pooled_QD = text_global_pool(_walked(tower, ids_QL), ids_QL, pool_type, eos_id)
    projection = tower.text_projection
    if projection is not None:
        pooled_QD = projection(pooled_QD) if isinstance(projection, nn.Linear) else pooled_QD @ projection
    return F.normalize(pooled_QD, dim=-1)


def _causal_tower(clip: nn.Module) -> CLIP | TextTransformer | None:
    """The module with the parts of a causal text tower whose embedding is that of one token of the text."""
    tower = clip.text if isinstance(clip, CustomTextCLIP) else clip
    if isinstance(tower, TextTransformer) and tower.cls_emb is not None:
        return None
    return tower if isinstance(tower, CLIP | TextTransformer) and tower.attn_mask is not None else None


def _pooling(tower: CLIP | TextTransformer) -> tuple[str, int]:
    """pool_type and eos_token_id for open_clip's `text_global_pool`."""
    if isinstance(tower, CLIP):
        return tower.text_pool_type, tower.text_eos_id
    return tower.pool_type, tower.eos_id


def _walked(tower: CLIP | TextTransformer, ids_QL: Tensor) -> Tensor:
    """The tower's own modules over the first L places: [Q, L, D']."""
    num_read, dtype = ids_QL.shape[1], tower.transformer.get_cast_dtype()
    x_QLD = tower.token_embedding(ids_QL).to(dtype) + tower.positional_embedding[:num_read].to(dtype)
    x_QLD = tower.transformer(x_QLD, attn_mask=tower.attn_mask[:num_read, :num_read])
    return tower.ln_final(x_QLD)


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
