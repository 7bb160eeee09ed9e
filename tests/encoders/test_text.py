"""The text tower on a cut context, against open_clip's own pass over the whole of it.

The bugs these would catch: a text cut before its end token, a context cut where later tokens are seen or pooled, a mask
or a position table of another length.

Shapes: Q texts, C context, L tokens read, D embedding.
"""

from typing import Any

import pytest
import torch
from small_models import SMALL_TEXT, randomise, small_config
from torch import Tensor, nn

from rlt_retrieval.encoders.text import build_text_tokenizer, encode_text
from rlt_retrieval.encoders.towers.building import build_clip

TEXTS = ["a dog jumps", "", "opens the fridge and takes out the milk", "opens the fridge " * 20]
END_OF_TEXT = 49407  # of open_clip's own tokenizer
CPU = torch.device("cpu")
CUT: dict[str, tuple[bool, dict[str, Any]]] = {  # custom_text, what the text tower sets
    "CLIP": (False, {}),
    "CLIP, end token by its id": (False, {"pool_type": "eos", "eos_id": END_OF_TEXT}),
    "CLIP, linear projection": (False, {"proj_bias": True}),
    "custom": (True, {}),
    "custom, end token by its id": (True, {"pool_type": "eos", "eos_id": END_OF_TEXT}),
    "custom, no projection": (True, {"proj_type": "none", "width": 32}),
}
WHOLE: dict[str, tuple[bool, dict[str, Any]]] = {
    "every token sees every other": (True, {"no_causal_mask": True}),
    "class token": (True, {"embed_cls": True}),
    "last token": (True, {"pool_type": "last"}),
}


def small_clip(custom: bool, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    text_cfg = {**SMALL_TEXT, **options}
    clip = build_clip({**small_config(), "custom_text": custom, "text_cfg": text_cfg})
    randomise(clip)
    return clip.double(), text_cfg


def lengths_seen(clip: nn.Module) -> list[int]:
    """Filled with the length of the context at each pass through the text tower."""
    lengths: list[int] = []
    tower = getattr(clip, "text", clip)
    tower.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    return lengths


def gradients(clip: nn.Module, z_QD: Tensor) -> dict[str, Tensor]:
    clip.zero_grad()
    weights = torch.linspace(-1, 1, z_QD.numel(), dtype=z_QD.dtype)
    (z_QD.flatten() @ weights).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in clip.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("custom", "options"), [*CUT.values(), *WHOLE.values()], ids=[*CUT, *WHOLE])
@pytest.mark.parametrize(
    "texts", [TEXTS[:1], TEXTS[:3], TEXTS], ids=["one text", "three texts", "too long a text"]
)
def test_embeddings_and_gradients_are_those_of_the_whole_context(
    custom: bool, options: dict[str, Any], texts: list[str]
) -> None:
    clip, text_cfg = small_clip(custom, options)
    tokenize = build_text_tokenizer(text_cfg)
    expected_QD = clip.encode_text(tokenize(texts), normalize=True)  # type: ignore[operator]
    expected = gradients(clip, expected_QD)
    z_QD = encode_text(clip, tokenize, texts, CPU)
    torch.testing.assert_close(z_QD, expected_QD, atol=1e-9, rtol=0)
    torch.testing.assert_close(gradients(clip, z_QD), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("custom", "options"), CUT.values(), ids=CUT)
def test_a_causal_tower_reads_no_further_than_the_longest_text(custom: bool, options: dict[str, Any]) -> None:
    clip, text_cfg = small_clip(custom, options)
    lengths = lengths_seen(clip)
    with torch.no_grad():
        for texts in (["a dog"], ["a dog", "a dog jumps"], [TEXTS[-1]]):
            encode_text(clip, build_text_tokenizer(text_cfg), texts, CPU)
    context = text_cfg["context_length"]
    assert lengths == [4, 5, context]  # start, words, end


@pytest.mark.parametrize(("custom", "options"), WHOLE.values(), ids=WHOLE)
def test_a_tower_that_sees_what_comes_after_reads_all(custom: bool, options: dict[str, Any]) -> None:
    clip, text_cfg = small_clip(custom, options)
    lengths = lengths_seen(clip)
    with torch.no_grad():
        encode_text(clip, build_text_tokenizer(text_cfg), ["a dog"], CPU)
    assert lengths == [text_cfg["context_length"] + bool(options.get("embed_cls"))]


def test_no_text_gives_no_row() -> None:
    clip, _ = small_clip(False, {})
    assert encode_text(clip, lambda texts: torch.zeros(0, 16, dtype=torch.long), [], CPU).shape == (0, 32)
