"""`flperf index`: probe the files of a dataset once."""

import argparse
from typing import TYPE_CHECKING

from flperf.commands.common import command_parser
from flperf.errors import UserError

if TYPE_CHECKING:
    from flperf.data.video_folders import Listing


def index(arguments: list[str]) -> None:
    parser = command_parser(
        "index",
        "Probe each video of a folder or of annotations, and write an index for dataset.train: the properties of each "
        "file, and which files are unusable. The same command resumes after an interruption. The exit status is 1 if "
        "no file is usable.",
        "flperf index --folder /data/k400/train --labels /data/k400/labels.csv --out /data/k400/train.index.csv",
        "flperf index --csv data/demo/train.csv --labels data/demo/labels.csv --out data/demo/train.index.csv",
        "flperf index --kinetics k700/train.csv --videos k700 --labels k700/labels.csv --out k700/train.index.csv",
        "flperf index --ssv2 ssv2/labels --videos ssv2/videos --split train --out ssv2/train.index.csv",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--csv", metavar="FILE", help="rows of 'path class_index'; paths are relative to it")
    source.add_argument("--folder", metavar="DIR", help="one subfolder per class, or videos without classes")
    source.add_argument("--kinetics", metavar="CSV", help="Kinetics' own annotations (label,youtube_id,time_start,…)")
    source.add_argument("--ssv2", metavar="DIR", help="Something-Something v2's annotations (labels.json, …)")
    parser.add_argument("--videos", metavar="DIR", help="the videos of --kinetics or --ssv2, in any subfolders")
    parser.add_argument(
        "--split", metavar="NAME", help="the split of --ssv2, or of a CSV of --kinetics that holds several"
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="rows of 'index name' with every class; written if missing, except for --csv",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the index, a CSV with a header; dataset.train takes it"
    )
    parser.add_argument("--threads", type=int, help="files probed at once (default: twice the cores)")
    options = parser.parse_args(arguments)
    from flperf.data.index import check_options, summary, write_index

    check_options(
        options.out, {"--csv": options.csv, "--kinetics": options.kinetics, "--labels": options.labels}, options.threads
    )
    listing = list_clips(options)
    rows = write_index(listing, options.out, options.threads)
    print(summary(rows, listing.left_out))
    if all(row.error for row in rows):
        raise UserError(f"{options.out}: none of its files is usable; its column 'error' gives the reasons")


def list_clips(options: argparse.Namespace) -> "Listing":
    """The files of the source that the options name. Raises `UserError` for options that don't belong together."""
    from flperf.data import annotation_formats, index, video_folders

    official = options.kinetics if options.ssv2 is None else options.ssv2
    if official is not None and options.videos is None:
        raise UserError("--videos: is not set; point it to the folder of the videos")
    for option in ("videos", "split"):
        if getattr(options, option) is not None and official is None:
            raise UserError(f"--{option}: belongs to --kinetics and --ssv2 only; leave it out")
    if options.csv is not None:
        return index.read_listed(options.csv, options.labels)
    if options.folder is not None:
        return video_folders.read_folder(options.folder, options.labels, options.threads)
    read = annotation_formats.read_kinetics if options.ssv2 is None else annotation_formats.read_ssv2
    return read(official, options.videos, options.split, options.labels)
