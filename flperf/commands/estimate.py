"""`flperf estimate`: what a run would need and how fast it might be, on devices that are not here."""

import argparse

from flperf.commands.common import command_parser
from flperf.config import load_config
from flperf.errors import UserError


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "estimate",
        "Estimate a run on devices that are not here: parameters, FLOPs, memory at each ZeRO stage, what is "
        "sent and decoded, and the time "
        "of an update with what bounds it. Nothing is downloaded and no step is taken.",
        "flperf estimate --config configs/references/vjepa2_kinetics_400.yaml --device h100 --nodes 1,4,16,64",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file")
    parser.add_argument(
        "--device", default="h100", help="a100, h100 (default), h200, b200; or cpu: this machine, measured now"
    )
    parser.add_argument("--nodes", default="1", metavar="N[,N…]", help="trainer.batch_size is that of the first")
    parser.add_argument("--devices-per-node", metavar="N", help="default: 8, on a CPU 1")
    return parser.parse_intermixed_args(arguments)


def positive(text: str, option: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(
            f"{option}: {text!r} is not a whole number above 0 (of nodes: several with commas between, such as 1,4,16)"
        )
    return int(text)


def estimate(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    nodes = [positive(number, "--nodes") for number in options.nodes.split(",")]

    # Imported late, so that a mistake in the configuration shows at once.
    from flperf.engine.devices import find_device
    from flperf.estimate.plan import dtype_on, plan
    from flperf.estimate.report import report

    device = find_device(options.device)
    per_node = positive(options.devices_per_node or str(device.devices_per_node), "--devices-per-node")
    if not device.is_gpu and (nodes != [1] or per_node != 1):
        raise UserError("--device cpu: is this machine as one device; leave --nodes and --devices-per-node out")
    print(report(plan(config, dtype_on(device, config), nodes[0] * per_node), device, nodes, per_node))
