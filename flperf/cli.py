"""The `flperf` command. `deepspeed flperf/cli.py COMMAND …` runs a command on several processes."""

import difflib
import sys
from collections.abc import Callable
from importlib import import_module

from flperf.commands.common import run_command

COMMANDS = {
    "doctor": "check that this machine has all that a run needs",
    "estimate": "estimate memory and speed of a run on other devices",
    "train": "train a head on one process (use the deepspeed launcher for more)",
    "index": "probe the files of a dataset once and find the unusable ones",
    "prepare": "write the videos of a dataset once as files that decode fast",
    "encode": "write the latents of a dataset, to train without running the encoder",
    "evaluate": "compare a trained head with the baselines",
    "sample": "write a trained head's forecasts of validation clips",
    "locator": "train a model that finds the bouncing shapes in latents, to evaluate forecasts with",
    "export": "write a trained head as one safetensors file",
    "import-weights": "convert the weights of a FutureLatents checkpoint, to start training from them",
    "import-config": "convert a FutureLatents configuration",
}

EXAMPLES = """for example:
  flperf doctor
  flperf train --config configs/demo.yaml
  flperf evaluate --checkpoint experiment/demo
  flperf export --checkpoint experiment/demo --out demo.safetensors"""


def overview() -> str:
    """The text of `flperf --help`."""
    listing = "\n".join(f"  {name:14} {purpose}" for name, purpose in COMMANDS.items())
    return (
        f"usage: flperf COMMAND …\n\ncommands:\n{listing}\n\n{EXAMPLES}\n\n`flperf COMMAND --help` describes a command."
    )


def load_command(name: str) -> Callable[[list[str]], None]:
    """The function of a command. It has the name of its module, and no other command's module is imported."""
    function = name.replace("-", "_")
    return getattr(import_module("flperf.train" if name == "train" else f"flperf.commands.{function}"), function)


def main() -> None:
    # The launcher adds --local_rank, which the environment holds as well.
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
