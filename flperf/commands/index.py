"""`flperf index`: probe the files of a dataset once."""

from flperf.commands.common import command_parser


def index(arguments: list[str]) -> None:
    parser = command_parser(
        "index",
        "Probe every file that a Kinetics CSV names, or that a folder of class folders holds, and write an "
        "index for dataset.train: "
        "what each file is, and which are unusable. The same command goes on after an interruption.",
        "flperf index --csv data/demo/train.csv --labels data/demo/labels.csv --out data/demo/train.index.csv",
        "flperf index --folder /data/k400/train --labels /data/k400/labels.csv --out /data/k400/train.index.csv",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--csv", metavar="FILE", help="rows of 'path class_index'; paths are relative to it")
    source.add_argument("--folder", metavar="DIR", help="one folder a class; or videos without classes")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="rows of 'index name', which must name every class; --folder writes it if missing",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the index, a CSV with a header; dataset.train takes it"
    )
    parser.add_argument("--threads", type=int, help="files probed at once (default: twice the cores)")
    options = parser.parse_args(arguments)
    from flperf.data.index import summary, write_index

    print(summary(write_index(options.csv or options.folder, options.labels, options.out, options.threads)))
