"""The kernels' machine code, compiled ahead of time for sm_80, sm_90 and sm_100 without a GPU."""

import re

import pytest
import torch
from flperf_kernels import philox
from flperf_kernels.bias_gradients import gelu_launch, heads_launches
from flperf_kernels.flow_matching_triton import scale_launch, sum_launch
from flperf_kernels.residual_norm import backward_launch

from benchmarks import kernel_report
from benchmarks.kernel_cases import Case, covering, every

CHIPS = pytest.mark.parametrize("chip", kernel_report.CHIPS, ids=lambda chip: chip.name)


def assert_lean(code: kernel_report.Code, occupancy: float = 0.5, wide: bool = True, loops: int = 1) -> None:
    """No spills, local memory or atomics; one loop, or `loops` where the assembler may unroll it, with loads and stores
    of 128 bits; and enough resident warps."""
    assert code.stack_bytes == 0 and code.local_bytes == 0, "registers spill"
    used = [opcode for opcode in code.setup | code.loop if opcode.startswith(("LDL", "STL", "ATOM", "RED"))]
    assert not used, f"local memory or atomics: {used}"
    assert 1 <= code.loops <= loops
    narrow = [opcode for opcode in code.loop if opcode[:3] in ("LDG", "STG") and ".128" not in opcode]
    assert not narrow or not wide, f"tiles must move 128 bits at a time: {narrow}"
    assert code.occupancy >= occupancy


@CHIPS
@pytest.mark.parametrize("case", covering(every()), ids=str)
def test_flow_matching(case, chip):
    assert_lean(kernel_report.compile_case(case, chip.capability))


@pytest.mark.machine_code
@CHIPS
def test_every_specialisation_of_flow_matching(chip):
    for case in every():
        try:
            assert_lean(kernel_report.compile_case(case, chip.capability))
        except AssertionError as error:
            raise AssertionError(str(case)) from error


@CHIPS
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 1024), (torch.bfloat16, 768), (torch.float32, 1024)], ids=str
)
def test_fused_backward_passes(chip, dtype, width):
    """The norm with a gate needs more registers, for four tensors and four sums of a row. Rows of 768 are padded to
    1,024, and so not moved 128 bits at a time."""
    meta = dict(dtype=dtype, device="meta")
    x, gate = torch.empty(8, 4096, width, **meta), torch.empty(8, width, **meta)
    rows, hidden = x.flatten(0, 1), torch.empty(8 * 4096, 4 * width, **meta)
    parts, table = [x.view(8, 4096, -1, 128)] * 3, torch.empty(4096, 1, 64, device="meta")
    launches = {
        "gated norm": (backward_launch(x, x, x, x, gate, gate, 1.0, 1e-6, x, x), 0.25),
        "norm": (backward_launch(x, x, x, None, None, gate[:1], 0.0, 1e-6, x, None), 0.25),
        "gate": (backward_launch(x, None, None, x, gate, None, 0.0, 0.0, None, x), 0.5),
        "gelu": (gelu_launch(hidden, hidden, hidden), 0.5),
    }
    heads, _ = heads_launches(parts, table, table, 2, torch.empty(len(rows), 3 * width, **meta))
    launches |= {"rotated": (heads[0], 0.5), "not rotated": (heads[2], 0.5)}
    for name, (launch, occupancy) in launches.items():
        code = kernel_report.disassemble(kernel_report.specialise(launch, chip.capability), chip.capability)
        try:
            assert_lean(code, occupancy, wide=width == 1024, loops=2)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}; {code}") from error


@CHIPS
def test_the_small_kernels(chip):
    meta = dict(device="meta")
    values, gradient = torch.empty(8, 256, **meta), torch.empty(8, 4096, 1024, dtype=torch.bfloat16, **meta)
    for launch in (
        philox.normal_launch(torch.empty(8, dtype=torch.int64, **meta), values, 1234),
        sum_launch(values, torch.empty(8, **meta)),
        scale_launch(gradient, torch.empty((), **meta), 1.0),
    ):
        code = kernel_report.disassemble(kernel_report.specialise(launch, chip.capability), chip.capability)
        assert code.stack_bytes == 0 and code.local_bytes == 0 and code.occupancy >= 0.5


# Arithmetic as a share of the memory time, by chip. A B200 moves the bytes of an element in the time of 17
# instructions. Drawing four normals takes more than 70% of that time by itself. A norm reduces over the token twice.
# That costs more arithmetic, but less time than a pass of its own, which would double that of the noising.
ARITHMETIC = {
    "none": {"A100": kernel_report.ROOM, "H100": kernel_report.ROOM, "B200": 1.1},
    "layer": {"A100": 0.95, "H100": 0.85, "B200": 1.75},
}


@CHIPS
@pytest.mark.parametrize("op", ["noise", "loss"])
@pytest.mark.parametrize("per_channel, norm", [(False, "none"), (True, "none"), (True, "layer")])
def test_flow_matching_is_memory_bound(op, per_channel, norm, chip):
    case = Case(op, per_channel=per_channel, norm=norm)
    cost = kernel_report.cost(case, chip)
    assert cost.bytes_moved == case.bytes_bound
    assert cost.ratio < ARITHMETIC[norm][chip.name]


@CHIPS
def test_no_number_replaces_a_nan(chip):
    """By default the hardware's minimum and maximum drop NaN, which would make the loss of a broken step look
    finite."""
    case = Case("loss", norm="l2", loss="smooth_l1")
    assembly = kernel_report.specialise(case.launch(), chip.capability).asm["ptx"]
    limits = re.findall(r"\b(?:min|max)\.\S*f32", assembly)
    assert limits and all(".NaN." in limit for limit in limits), limits


@pytest.mark.parametrize("op", ["noise", "loss"])
@pytest.mark.parametrize("size", [(2, 37, 199), (2, 2**22, 1024), (1, 2**26, 1024)], ids=str)
def test_unusual_sizes_compile(op, size):
    """Rows that don't start at a multiple of four; samples whose offsets need more than 31 bits, and whose groups of
    four elements need more than 32."""
    launch = Case(op, per_channel=True, size=size).launch()
    compiled = kernel_report.specialise(launch, 90)
    assert compiled.src.signature["total"] == ("i64" if size[1] > 37 else "i32")
    assert launch.arguments["SMALL"] == (size[1] < 2**26)
