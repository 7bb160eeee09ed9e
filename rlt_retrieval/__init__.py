"""Text-to-video retrieval with run-length tokens. Public names are resolved at first use (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlt_retrieval.encoders.packing import PackedTokens, VideoTokens, pack
    from rlt_retrieval.encoders.tokenizer import RunLengthTokenizer
    from rlt_retrieval.errors import RetrievalError
    from rlt_retrieval.model import VideoTextModel
    from rlt_retrieval.video_index import Hit, VideoIndex

__version__ = "0.1.0"
__all__ = [
    "Hit",
    "PackedTokens",
    "RetrievalError",
    "RunLengthTokenizer",
    "VideoIndex",
    "VideoTextModel",
    "VideoTokens",
    "pack",
]

_HOMES = {
    "Hit": "video_index",
    "PackedTokens": "encoders.packing",
    "RetrievalError": "errors",
    "RunLengthTokenizer": "encoders.tokenizer",
    "VideoIndex": "video_index",
    "VideoTextModel": "model",
    "VideoTokens": "encoders.packing",
    "pack": "encoders.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlt_retrieval' has no attribute {name!r}")
    return getattr(import_module(f"rlt_retrieval.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
