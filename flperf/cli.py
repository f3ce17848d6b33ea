"""The `flperf` command; `deepspeed flperf/cli.py COMMAND …` runs one of them on many processes."""

import argparse
import sys

from flperf import doctor, encode, estimate, forecasting, import_config, train
from flperf.command import run_command


def index(arguments: list[str]) -> None:
    """Probe every file that a Kinetics CSV names, and write an index: `flperf index --csv FILE --out FILE`."""
    parser = argparse.ArgumentParser(prog="flperf index", description=index.__doc__)
    parser.add_argument("--csv", required=True, metavar="FILE", help="rows of 'path class_index'; paths are relative to it")
    parser.add_argument("--labels", metavar="FILE", help="rows of 'index name', to check that every class has a name")
    parser.add_argument("--out", required=True, metavar="FILE", help="the index, a CSV with a header; dataset.train takes it")
    parser.add_argument("--threads", type=int, help="files probed at once (default: twice the cores)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    from flperf.data.index import summary, write_index

    print(summary(write_index(options.csv, options.labels, options.out, options.threads)))


COMMANDS = {
    "doctor": (doctor.doctor, "say what this machine has for a run, and what is missing"),
    "estimate": (estimate.estimate, "say what a run would need, and how fast it might be, on devices that are not here"),
    "train": (train.train, "train a head on one process (use the deepspeed launcher for more)"),
    "index": (index, "probe a dataset's files once: what they are, and which are unusable"),
    "encode": (encode.encode, "write a dataset's latents down, to train from them without an encoder"),
    "evaluate": (forecasting.evaluate, "judge a trained head beside the trivial forecasts"),
    "sample": (forecasting.sample, "write a trained head's forecasts of validation clips"),
    "export": (forecasting.export, "write a trained head as one safetensors file"),
    "import-config": (import_config.import_config, "turn a FutureLatents configuration into one of ours"),
}


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]  # the launcher's; the environment has it
    if not arguments or arguments[0] not in COMMANDS:
        listing = "\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())
        wanted_help = not arguments or arguments[0] in ("-h", "--help")
        text = f"usage: flperf COMMAND …\n\ncommands:\n{listing}\n\n`flperf COMMAND --help` says more."
        print(text, file=sys.stdout if wanted_help else sys.stderr)
        sys.exit(0 if wanted_help else 2)
    run_command(COMMANDS[arguments[0]][0], arguments[1:])


if __name__ == "__main__":
    main()
