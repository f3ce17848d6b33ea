"""The `flperf` command; `deepspeed flperf/cli.py COMMAND …` runs one of them on many processes."""

import difflib
import sys

from flperf import train
from flperf.commands import doctor, encode, estimate, import_config
from flperf.commands import trained as forecasting
from flperf.commands.common import command_parser, run_command


def index(arguments: list[str]) -> None:
    parser = command_parser(
        "index",
        "Probe every file that a Kinetics CSV names, or that a folder of class folders holds, and write an index for dataset.train: "
        "what each file is, and which are unusable. The same command goes on after an interruption.",
        "flperf index --csv data/demo/train.csv --labels data/demo/labels.csv --out data/demo/train.index.csv",
        "flperf index --folder /data/k400/train --labels /data/k400/labels.csv --out /data/k400/train.index.csv",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--csv", metavar="FILE", help="rows of 'path class_index'; paths are relative to it")
    source.add_argument("--folder", metavar="DIR", help="one folder a class; or videos without classes")
    parser.add_argument("--labels", metavar="FILE", help="rows of 'index name', which must name every class; --folder writes it if missing")
    parser.add_argument("--out", required=True, metavar="FILE", help="the index, a CSV with a header; dataset.train takes it")
    parser.add_argument("--threads", type=int, help="files probed at once (default: twice the cores)")
    options = parser.parse_args(arguments)
    from flperf.data.index import summary, write_index

    print(summary(write_index(options.csv or options.folder, options.labels, options.out, options.threads)))


def import_weights(arguments: list[str]) -> None:
    """Loads torch, which the other commands' help need not wait for."""
    from flperf.commands.import_weights import import_weights

    import_weights(arguments)


COMMANDS = {
    "doctor": (doctor.doctor, "say what this machine has for a run, and what is missing"),
    "estimate": (estimate.estimate, "say what a run would need, and how fast it might be, on devices that are not here"),
    "train": (train.train, "train a head on one process (use the deepspeed launcher for more)"),
    "index": (index, "probe a dataset's files once: what they are, and which are unusable"),
    "encode": (encode.encode, "write a dataset's latents down, to train from them without an encoder"),
    "evaluate": (forecasting.evaluate, "judge a trained head beside the trivial forecasts"),
    "sample": (forecasting.sample, "write a trained head's forecasts of validation clips"),
    "locator": (forecasting.locator, "train what finds the bouncing shapes in latents, to judge forecasts by"),
    "export": (forecasting.export, "write a trained head as one safetensors file"),
    "import-weights": (import_weights, "take from a FutureLatents checkpoint what a head of ours can start from"),
    "import-config": (import_config.import_config, "turn a FutureLatents configuration into one of ours"),
}


EXAMPLES = """for example:
  flperf doctor
  flperf train --config configs/demo.yaml
  flperf evaluate --checkpoint experiment/demo
  flperf export --checkpoint experiment/demo --out demo.safetensors"""


def overview() -> str:
    listing = "\n".join(f"  {name:14} {what}" for name, (_, what) in COMMANDS.items())
    return f"usage: flperf COMMAND …\n\ncommands:\n{listing}\n\n{EXAMPLES}\n\n`flperf COMMAND --help` says more."


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]  # the launcher's; the environment has it
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
    elif arguments[0] in COMMANDS:
        run_command(COMMANDS[arguments[0]][0], arguments[1:])
    else:
        nearest = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(COMMANDS)}"
        sys.exit(f"flperf: unknown command {arguments[0]!r}: {hint}")


if __name__ == "__main__":
    main()
