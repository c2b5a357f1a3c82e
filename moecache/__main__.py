"""The program, as `moecache` and as `python -m moecache`: how it starts and how it ends."""

import os
import signal
import sys
import threading
from typing import Any

INTERRUPTED = 130  # what a shell says of a process that Ctrl-C ended


def main() -> None:
    """Run one command; Ctrl-C is as quiet while it is being loaded as later."""
    signal.signal(signal.SIGINT, _leave)
    _open_what_is_closed()
    from moecache.cli import app

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = INTERRUPTED
    try:
        app(prog_name="moecache")
    except KeyboardInterrupt:
        pass
    except SystemExit as done:
        code = int(done.code or 0)
    if code == INTERRUPTED or threading.active_count() > 1:
        # A candidate still runs in its thread. It would meet a Python that shuts down, and abort the process.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _open_what_is_closed() -> None:
    """Standard streams that the caller closed lead nowhere, else a cache file would get their number. What an encoding
    lacks is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        elif mode == "w":
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _leave(*_: Any) -> None:
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
