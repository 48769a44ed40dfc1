"""The log of a run: the console, WORK_DIR/train.log, and WORK_DIR/libraries.log for what other packages say.

What torch, DeepSpeed, mmseg and all others warn of is mostly nothing that a user can change, and comes from each
rank: it goes to a file of rank 0. Their errors, and what `MATTERS`, come to the console too. Needs the standard
library only, so that a command can begin its log before it imports them.
"""

import logging
import os
import re
import sysconfig
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from internseg_ds import progress
from internseg_ds.monitoring.buffered_lines import BufferedLines

log = logging.getLogger(__name__)

PACKAGE = str(Path(__file__).parent.parent)
LIBRARIES_LOG = "libraries.log"
"""In the work directory."""
EARLY_LINES = 1000
"""Lines of a log that are kept for a work directory that is not there yet."""
WARNINGS = "py.warnings"
"""Python's logger of warnings."""
LIBRARIES = ("DeepSpeed", "mmcls", "mmcv", "mmdet", "mmseg", WARNINGS, "timm", "torch", "transformers")
"""Loggers of other packages."""
USED_DIRECTLY = ("DeepSpeed", "mmcls", "mmcv", "mmdet", "mmseg", WARNINGS, "torch.utils.cpp_extension")
"""Those that are used without children: what they are given is taken before the handlers that their packages give
them, some only at their first line."""
MATTERS = re.compile(
    r"\bnan\b|\binf(?:inite)?\b|overflow|nccl|out of memory|memory pressure|recompile_limit|cache_size_limit"
    r"|won't convert|fall(?:s|ing)? ?back to eager|backend compiler failed|deterministic|excessive worker",
    re.IGNORECASE,
)
"""Warnings of other packages that the console shows: of numbers that are not finite, of memory, of communication,
of what torch.compile gave up, of what is not deterministic."""
PLAIN = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
BESIDE = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")


class LogFile(logging.Handler):
    """Appends the lines of a log to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.lines = BufferedLines(path)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.add(self.format(record) + "\n")


class ConsoleHandler(logging.Handler):
    """Writes lines to stderr, above what `progress` draws there."""

    def emit(self, record: logging.LogRecord) -> None:
        progress.say(self.format(record))


class WaitingLines(logging.Handler):
    """Keeps the last lines for a file that is not there yet. of_command: whether they are of a command that has not
    begun its run yet, which gets them."""

    def __init__(self, *, of_command: bool) -> None:
        super().__init__()
        self.of_command = of_command
        self.records: deque[logging.LogRecord] = deque(maxlen=EARLY_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class LibraryLines(logging.Handler):
    """What other packages say, into `to`; what matters, through this package's own log, once for each text."""

    def __init__(self, to: logging.Handler, *, is_main: bool) -> None:
        super().__init__()
        self.to, self.is_main = to, is_main
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text, severe = record.getMessage().strip(), record.levelno >= logging.ERROR
        if self.is_main:
            self.to.handle(record)
        matters = severe or (
            self.is_main and (_is_of_the_user(record, text) or MATTERS.search(text) is not None)
        )
        if matters and text not in self._shown:
            self._shown.add(text)
            of = "python" if record.name == WARNINGS else record.name.partition(".")[0]
            log.log(max(record.levelno, logging.WARNING), "%s: %s", of, text)


class TakenFirst(logging.Filter):
    """Of a logger: gives its records to a handler, and none to those that its package has."""

    def __init__(self, handler: LibraryLines) -> None:
        super().__init__()
        self.handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        self.handler.handle(record)
        return False


def begin_log() -> None:
    """For a command, before it imports what takes seconds: the console, and memory for the files of a run that
    `start_logging` will open."""
    # read when torch and OpenCV are loaded: the one warns of sockets, the other of each GeoTIFF's own tags
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    _start(None, level="INFO", is_main=progress.is_main(), of_command=True)


def start_logging(work_dir: Path | None, *, level: str, is_main: bool, header: Sequence[str] = ()) -> None:
    """Sends the log lines of this package on rank 0 to the console, and to WORK_DIR/train.log; what other packages
    say to WORK_DIR/libraries.log. level: of rank 0 ("INFO"); other ranks log warnings only.

    header: what is logged first. A run calls this without a work directory at its start, when the folder may
    not be made yet; the files get the lines since then, and since `begin_log`.
    """
    _start(work_dir, level=level, is_main=is_main, header=header)


def _start(
    work_dir: Path | None,
    *,
    level: str,
    is_main: bool,
    header: Sequence[str] = (),
    of_command: bool = False,
) -> None:
    package = logging.getLogger("internseg_ds")
    package.setLevel(level if is_main else logging.WARNING)
    package.propagate = False
    own, others = _taken_off(package), _libraries_taken_off()
    if not is_main:
        # all ranks build the same model: one logs what it found
        logging.getLogger("internseg_ds.models").setLevel(logging.ERROR)
    _add(package, ConsoleHandler(), PLAIN)
    to_file, beside = _files(work_dir, of_command) if is_main else (logging.NullHandler(),) * 2
    _add(package, to_file, PLAIN)
    beside.setFormatter(BESIDE)
    _listen_to_libraries(LibraryLines(beside, is_main=is_main))
    for line in header:
        log.info("%s", line)
    for waiting, handler in ((own, to_file), (others, beside)):
        if waiting is not None and (work_dir is not None or waiting.of_command):
            for record in waiting.records:
                handler.handle(record)


def _files(work_dir: Path | None, of_command: bool) -> tuple[logging.Handler, logging.Handler]:
    """For this package's lines and for those of others."""
    if work_dir is None:
        return WaitingLines(of_command=of_command), WaitingLines(of_command=of_command)
    return LogFile(work_dir / "train.log"), LogFile(work_dir / LIBRARIES_LOG)


def _add(logger: logging.Logger, handler: logging.Handler, formatter: logging.Formatter) -> None:
    handler.setFormatter(formatter)
    logger.addHandler(handler)


def _taken_off(package: logging.Logger) -> WaitingLines | None:
    """Takes off the handlers of a start before; the one whose lines wait in memory."""
    waiting: WaitingLines | None = None
    for handler in list(package.handlers):
        if isinstance(handler, WaitingLines):
            waiting = handler
        package.removeHandler(handler)
        handler.close()
    return waiting


def _libraries_taken_off() -> WaitingLines | None:
    """The same of other packages."""
    waiting: WaitingLines | None = None
    for logger in (logging.root, *_loggers_of_libraries()):
        for handler in [each for each in logger.handlers if isinstance(each, LibraryLines)]:
            logger.removeHandler(handler)
        for taken in [each for each in logger.filters if isinstance(each, TakenFirst)]:
            logger.removeFilter(taken)
            if isinstance(taken.handler.to, WaitingLines):
                waiting = taken.handler.to
    return waiting


def _listen_to_libraries(lines: LibraryLines) -> None:
    logging.captureWarnings(True)
    for name in USED_DIRECTLY:
        logging.getLogger(name).addFilter(TakenFirst(lines))
    if not logging.root.handlers:  # else whoever imports this package shows there what he likes
        logging.root.addHandler(lines)
    if "TORCH_LOGS" in os.environ:
        return  # who asks torch for its logs wants to see them where it writes them
    for logger in _loggers_of_libraries():
        shown = [each for each in logger.handlers if type(each) is logging.StreamHandler]
        for handler in shown:
            logger.removeHandler(handler)
        if logger.name in LIBRARIES or not logger.propagate:
            logger.addHandler(lines)
            if logger.name in LIBRARIES:
                logger.propagate = False


def _loggers_of_libraries() -> list[logging.Logger]:
    """Those that are there, and those of `LIBRARIES`."""
    names = {name for name in logging.root.manager.loggerDict if name.partition(".")[0] in LIBRARIES}
    return [logging.getLogger(name) for name in sorted(names | {*LIBRARIES, *USED_DIRECTLY})]


def _is_of_the_user(record: logging.LogRecord, text: str) -> bool:
    """Whether it is a warning of Python code that is neither of this package nor installed: the user's own."""
    if record.name != WARNINGS and record.name.partition(".")[0] in LIBRARIES:
        return False
    place = text if record.name == WARNINGS else record.pathname
    paths = sysconfig.get_paths()
    installed = (
        *(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        PACKAGE,
        "<frozen",
    )
    return not place.startswith(installed) and "site-packages" not in place.partition(": ")[0]
