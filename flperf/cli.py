"""The `flperf` command; `deepspeed flperf/cli.py COMMAND …` runs one of them on many processes."""

import difflib
import sys
from collections.abc import Callable
from importlib import import_module

from flperf.commands.common import run_command

COMMANDS = {
    "doctor": "say what this machine has for a run, and what is missing",
    "estimate": "say what a run would need, and how fast it might be, on devices that are not here",
    "train": "train a head on one process (use the deepspeed launcher for more)",
    "index": "probe a dataset's files once: what they are, and which are unusable",
    "encode": "write a dataset's latents, to train from them without an encoder",
    "evaluate": "judge a trained head beside the baselines",
    "sample": "write a trained head's forecasts of validation clips",
    "locator": "train what finds the bouncing shapes in latents, to judge forecasts by",
    "export": "write a trained head as one safetensors file",
    "import-weights": "take from a FutureLatents checkpoint what a head of ours can start from",
    "import-config": "turn a FutureLatents configuration into one of ours",
}

EXAMPLES = """for example:
  flperf doctor
  flperf train --config configs/demo.yaml
  flperf evaluate --checkpoint experiment/demo
  flperf export --checkpoint experiment/demo --out demo.safetensors"""


def overview() -> str:
    listing = "\n".join(f"  {name:14} {what}" for name, what in COMMANDS.items())
    return f"usage: flperf COMMAND …\n\ncommands:\n{listing}\n\n{EXAMPLES}\n\n`flperf COMMAND --help` says more."


def load_command(name: str) -> Callable[[list[str]], None]:
    """The function of a command, which bears the name of its module; only that module is imported."""
    function = name.replace("-", "_")
    return getattr(import_module("flperf.train" if name == "train" else f"flperf.commands.{function}"), function)


def main() -> None:
    # The launcher's --local_rank says nothing that the environment does not.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
    elif arguments[0] in COMMANDS:
        run_command(load_command(arguments[0]), arguments[1:])
    else:
        nearest = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(COMMANDS)}"
        sys.exit(f"flperf: unknown command {arguments[0]!r}: {hint}")


if __name__ == "__main__":
    main()
