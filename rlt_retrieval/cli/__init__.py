"""The command line: parse → one domain call → print. stdout is data, everything else goes to stderr."""

from __future__ import annotations

import errno
import io
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from rlt_retrieval import __version__
from rlt_retrieval.cli import bench, data, evaluation, models, search, training
from rlt_retrieval.cli.options import EXIT_ERROR, EXIT_INTERRUPTED
from rlt_retrieval.console import log_to_stderr, say
from rlt_retrieval.errors import RetrievalError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rlt-retrieval")
def cli() -> None:
    """Text-to-video search whose cost follows what changes in a video.

    \b
    rlt-retrieval index build my.index my_videos/
    rlt-retrieval search my.index "opens the fridge"

    Exit codes: 0 ok, 1 error, 2 usage, 3 finished but some inputs were skipped, 130 interrupted.
    `--debug` with any command shows the traceback of an error.
    """


for command in (
    training.demo,
    data.shards,
    training.train,
    search.index,
    search.search,
    evaluation.evaluate,
    bench.bench,
    models.models,
):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; errors that a user can cause are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    log_to_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8 come out as they are
    try:
        code = cli.main(arguments, prog_name="rlt-retrieval", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = _report("interrupted; the same command continues", EXIT_INTERRUPTED, debug)
    except RetrievalError as error:
        code = _report(f"Error: {error}", EXIT_ERROR, debug)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing to say, nobody to say it to
        code = EXIT_ERROR
    except OSError as error:
        code = _report(f"Error: {_explain(error)}", EXIT_ERROR, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    way_out = "free space there" if error.errno in DISK_FULL else "check the path and its permissions"
    return f"{place}{error.strerror or error}; {way_out}, or choose another place"


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say(" ".join(message.split()))
    return code
