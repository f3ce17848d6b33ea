"""`flperf estimate`: memory and speed of a run on other devices than those of this machine."""

import argparse

from flperf.commands.common import add_overrides, command_parser
from flperf.config import load_config
from flperf.errors import UserError


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "estimate",
        "Estimate a run on other devices than those of this machine: parameters, FLOPs, memory at each ZeRO stage, "
        "communication, decoding, and the time of an update with its bottleneck. Nothing is downloaded or trained.",
        "flperf estimate --config configs/references/vjepa2_kinetics_400.yaml --device h100 --nodes 1,4,16,64",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    add_overrides(parser)
    parser.add_argument(
        "--device", default="h100", help="a100, h100 (default), h200, b200; or cpu: this machine, measured now"
    )
    parser.add_argument(
        "--nodes", default="1", metavar="N[,N…]", help="numbers of nodes; trainer.batch_size belongs to the first"
    )
    parser.add_argument("--devices-per-node", metavar="N", help="default: 8, on a CPU 1")
    return parser.parse_intermixed_args(arguments)


def positive(text: str, option: str) -> int:
    """The number that `text` holds. Raises `UserError`, naming the option, if it is not a whole number above 0."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"{option}: {text!r} is not a whole number above 0 (--nodes takes several, such as 1,4,16)")
    return int(text)


def estimate(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    nodes = [positive(number, "--nodes") for number in options.nodes.split(",")]

    # Imported late, so that mistakes in the configuration are reported before torch is loaded.
    from flperf.engine.devices import find_device
    from flperf.estimate.report import report
    from flperf.estimate.workload import build_workload, dtype_on

    device = find_device(options.device)
    per_node = positive(options.devices_per_node or str(device.devices_per_node), "--devices-per-node")
    if not device.is_gpu and (nodes != [1] or per_node != 1):
        raise UserError("--device cpu: is this machine as one device; omit --nodes and --devices-per-node")
    workload = build_workload(config, dtype_on(device, config), nodes[0] * per_node)
    print(report(workload, device, nodes, per_node))
