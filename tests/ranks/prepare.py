"""`flperf prepare`, killed if wanted when it renames a given file into place, before or after it does."""

import os
import signal
from collections.abc import Sequence
from threading import Lock

from worlds import command


def prepare(arguments: Sequence[str], killed_at: int | None = None, after: bool = False) -> None:
    replace, files, lock = os.replace, [], Lock()

    def replace_or_die(source, target) -> None:
        with lock:
            files.extend([target] if str(target).endswith(".mp4") else [])
            if len(files) == killed_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if len(files) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die
    command("prepare", *arguments)
