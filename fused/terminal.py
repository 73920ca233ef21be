"""The terminal of the commands: their exit codes, lines that stay and progress that is overwritten, errors in one line."""

import io
import sys

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes: see each command
SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)  # of wrong input, before the work begins


class Terminal:
    """Standard output. On a terminal the progress is one line that is overwritten, elsewhere there are lines alone."""

    def __init__(self) -> None:
        self.stream = sys.stdout
        escape_what_cannot_be_printed(self.stream)
        self._line_open = False  # whether the last line has no end yet

    @property
    def overwrites(self) -> bool:
        """Whether the progress can be overwritten."""
        return self.stream.isatty()

    def print_line(self, text: str) -> None:
        """Print a line that stays."""
        self.end_line()
        print(text, file=self.stream, flush=True)

    def print_progress(self, text: str) -> None:
        """Print the progress, over the progress before it where that is possible."""
        if not self.overwrites:
            self.print_line(text)
            return
        print(f"\r\x1b[2K{text}", end="", file=self.stream, flush=True)
        self._line_open = True

    def end_line(self) -> None:
        """End the last line if it is open."""
        if self._line_open:
            print(file=self.stream, flush=True)
            self._line_open = False


def escape_what_cannot_be_printed(stream: object) -> None:
    """Make a stream print a character that its encoding lacks as an escape, such as \\xe9, instead of raising an error.

    File names on Linux may hold any bytes, and a stream may be ASCII.
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bad_file_reasons(unreadable: int, too_short: int, total: int, too_long: int = 0) -> str:
    """Return how many of `total` files gave no clip, or samples no row, and why; nothing if all numbers are 0."""
    parts = []
    if unreadable:
        parts.append(f"{unreadable} of {total} files could not be read")
    if too_short:
        parts.append(f"{too_short} of {total} files {'are' if too_short > 1 else 'is'} too short")
    if too_long:
        parts.append(f"{too_long} of {total} samples {'are' if too_long > 1 else 'is'} too long")
    return " and ".join(parts)


def fail(command: str, reason: object, code: int) -> int:
    """Print in one line of standard error why a command failed, and return the exit code."""
    print(f"{command}:", *(line.strip() for line in str(reason).splitlines()), file=sys.stderr)
    return code
