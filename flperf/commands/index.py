"""`flperf index`: probe the files of a dataset once."""

from flperf.commands.common import command_parser


def index(arguments: list[str]) -> None:
    parser = command_parser(
        "index",
        "Probe each file of a Kinetics CSV, or of a folder with one subfolder per class, and write an index for "
        "dataset.train: the properties of each file, and which files are unusable. The same command resumes after an "
        "interruption.",
        "flperf index --csv data/demo/train.csv --labels data/demo/labels.csv --out data/demo/train.index.csv",
        "flperf index --folder /data/k400/train --labels /data/k400/labels.csv --out /data/k400/train.index.csv",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--csv", metavar="FILE", help="rows of 'path class_index'; paths are relative to it")
    source.add_argument("--folder", metavar="DIR", help="one subfolder per class, or videos without classes")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="rows of 'index name' with every class; --folder writes it if missing",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the index, a CSV with a header; dataset.train takes it"
    )
    parser.add_argument("--threads", type=int, help="files probed at once (default: twice the cores)")
    options = parser.parse_args(arguments)
    from flperf.data.index import summary, write_index

    print(summary(write_index(options.csv or options.folder, options.labels, options.out, options.threads)))
