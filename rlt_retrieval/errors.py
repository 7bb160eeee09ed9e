"""Every error a user can cause. One line each: the thing, what was expected, what to do.

The command line prints `str(error)` and exits with 1; `--debug` shows the traceback.
"""


class RetrievalError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(RetrievalError):
    """A recipe or an option has an unknown key, a wrong type or an impossible value."""


class SourceError(RetrievalError):
    """A source (folder, CSV, video list) is missing, empty or unreadable."""


class VideoDecodeError(RetrievalError):
    """A file or byte string gave no decodable video frame."""


class ShardError(RetrievalError):
    """A shard cannot be read or written, or too many of its samples are bad."""


class ModelError(RetrievalError):
    """A model cannot be built: unsupported tower, missing or unfitting weights."""


class CheckpointError(RetrievalError):
    """A checkpoint or run folder does not fit the recipe, or cannot be read."""


class TrainingError(RetrievalError):
    """Training cannot go on, e.g. the loss is NaN."""


class IndexStoreError(RetrievalError):
    """An index folder is missing, locked by another writer, or not an index."""


class IndexMismatchError(IndexStoreError):
    """An index was opened with a model or settings other than those it was built with."""


class AnnotationError(RetrievalError):
    """An annotation file is missing, or not what its format says."""


class MetricsError(RetrievalError):
    """Scores or relevancies cannot be evaluated: NaN, wrong shape, no relevant pair."""


class MissingDependencyError(RetrievalError):
    """An optional package is not installed; the message names the extra that brings it."""
