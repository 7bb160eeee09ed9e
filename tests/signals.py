"""What a command started by a test must not inherit."""

import signal


def default_ctrl_c() -> None:
    """For `preexec_fn`: a test run in the background of a shell ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
