"""Which tokens of a clip are computed: the choices of `reducer`, from the settings to the code that does it.

| reducer | what it computes | reads |
|---|---|---|
| none | every token | |
| frames | a uniform subset of the frames | keep_ratio |
| resolution | every frame, smaller | keep_ratio |
| random | the first frame and as many others as rlt would keep, drawn uniformly | as rlt |
| rlt | tokens that do not repeat (arXiv 2411.05222) | threshold, reference, refresh_every |
| gated | tokens that do not look like the scene's key frame (after arXiv 2509.14199) | threshold |
| motion | tokens that no shifted block of what was seen explains | threshold |
| tome | all, merged by similar keys from block to block (arXiv 2210.09461) | keep_ratio |
| vid_tldr | all, merged by saliency in the first blocks (arXiv 2403.13347) | keep_ratio |
| centerclip | all up to a block, then a segment's medoids (arXiv 2205.00823) | keep_ratio |
| rlt+random, rlt+tome | what rlt keeps, less a uniform draw, or merged | those of both |
"""

from __future__ import annotations

from rlt_retrieval.config import VideoSettings
from rlt_retrieval.encoders.packing import Tokenizer
from rlt_retrieval.encoders.reducers.centerclip import CenterClip
from rlt_retrieval.encoders.reducers.choosing import (
    FrameTokenizer,
    RandomTokenizer,
    RltRandomTokenizer,
    SmallPictureTokenizer,
    reduced_grid,
)
from rlt_retrieval.encoders.reducers.gated import GatedTokenizer
from rlt_retrieval.encoders.reducers.merging import NetworkReducer
from rlt_retrieval.encoders.reducers.motion import MotionTokenizer
from rlt_retrieval.encoders.reducers.tome import TokenMerging
from rlt_retrieval.encoders.reducers.vid_tldr import VidTldr
from rlt_retrieval.encoders.tokenizer import KEEP_ALL, RunLengthTokenizer

__all__ = ["make_network_reducer", "make_tokenizer", "reduced_grid"]


def make_tokenizer(settings: VideoSettings, patch_size: int) -> Tokenizer:
    """What runs before the encoder, in the loader's workers."""
    rlt = RunLengthTokenizer(
        patch_size, settings.tubelet_size, settings.threshold, settings.reference, settings.refresh_tubelets
    )
    match settings.reducer:
        case "rlt" | "rlt+tome":
            return rlt
        case "random":
            return RandomTokenizer(rlt)
        case "rlt+random":
            return RltRandomTokenizer(rlt, settings.required_keep_ratio)
        case "frames":
            return FrameTokenizer(patch_size, settings.required_keep_ratio)
        case "resolution":
            return SmallPictureTokenizer(patch_size, settings.required_keep_ratio)
        case "gated":
            return GatedTokenizer(patch_size, settings.threshold)
        case "motion":
            return MotionTokenizer(patch_size, settings.threshold)
    return RunLengthTokenizer(patch_size, settings.tubelet_size, KEEP_ALL)


def make_network_reducer(settings: VideoSettings, num_blocks: int) -> NetworkReducer | None:
    """What runs between the encoder's blocks, where the reducer has such a part."""
    match settings.reducer:
        case "tome" | "rlt+tome":
            return TokenMerging(settings.required_keep_ratio, num_blocks)
        case "vid_tldr":
            return VidTldr(settings.required_keep_ratio, num_blocks)
        case "centerclip":
            return CenterClip(settings.required_keep_ratio, num_blocks)
    return None
