"""`flperf encode` into shards of eight clips, killed if wanted when it renames a given file into place."""

import os
import signal
from collections.abc import Sequence

from worlds import command

from flperf.data import latent_shards

SHARD_BYTES = 8 * 4 * 2 * 2 * 24 * 2  # n t h w d in bf16; the default would hold all clips of the demo


def encode(arguments: Sequence[str], killed_at: int | None = None) -> None:
    latent_shards.SHARD_BYTES = SHARD_BYTES
    replace, files = os.replace, []

    def replace_or_die(source, target) -> None:
        files.extend([target] if str(target).endswith((".pt", ".safetensors")) else [])
        if len(files) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die
    command("encode", *arguments)
