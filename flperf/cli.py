"""The `flperf` command."""

import sys

from flperf import train

COMMANDS = {"train": (train.main, "train a head on one process (use the deepspeed launcher for more)")}


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS:
        listing = "\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())
        wanted_help = not arguments or arguments[0] in ("-h", "--help")
        text = f"usage: flperf COMMAND …\n\ncommands:\n{listing}\n\n`flperf COMMAND --help` says more."
        print(text, file=sys.stdout if wanted_help else sys.stderr)
        sys.exit(0 if wanted_help else 2)
    COMMANDS[arguments[0]][0](arguments[1:])
