"""Predicted cost of the flow-matching kernels, from their machine code: `python -m benchmarks.kernel_report`. It needs
no GPU.

Each kernel is compiled ahead of time as for a call on CUDA tensors, and its cubin is disassembled. Its loop over tiles
gives bytes and instructions per element. The predicted time on a chip is the longest of memory traffic / bandwidth and,
for each pipe of a processor, instructions / rate. The aim is arithmetic below 70% of the memory time. The memory then
hides it even where a processor doesn't reach these rates. `--all` adds every specialisation that a configuration can
launch.
"""

import argparse
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
from flperf_kernels.launching import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.kernel_cases import Case, every, headline

ROOM = 0.7  # share of the memory time below which arithmetic should stay


@dataclasses.dataclass(frozen=True)
class Chip:
    """Bandwidth and clock by the data sheet: the clock gives the quoted dense bf16 peak (312, 989, 2250 TFLOP/s)."""

    name: str
    capability: int
    processors: int
    clock: float  # Hz
    bandwidth: float  # B/s
    float_lanes: int  # fp32 instructions that an SM starts per cycle


CHIPS = (
    Chip("A100", 80, 108, 1.41e9, 2.039e12, 64),
    Chip("H100", 90, 132, 1.83e9, 3.35e12, 128),
    Chip("B200", 100, 148, 1.85e9, 8.0e12, 128),
)

# Lanes that an SM can start per cycle (CUDA programming guide, throughput of native arithmetic). The guide doesn't list
# wide integer products: half the rate of a 32-bit product is assumed. A packed fp32 pair takes one issue slot and two
# lanes.
ISSUE_LANES, INTEGER_LANES, PRODUCT_LANES, SPECIAL_LANES = 128, 64, 64, 16
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of an SM, the same on all three
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


# ----------------------------------------------------------------------------------------------------------------------
# Compilation


@dataclasses.dataclass(frozen=True)
class Code:
    """Resources of a compiled kernel, and how often each SASS opcode occurs in it."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    warps: int
    capability: int
    loops: int
    setup: Counter  # opcodes outside the loop over tiles
    loop: Counter

    @property
    def occupancy(self) -> float:
        """Share of an SM's warps that are resident. Registers are allocated to a warp by 256s, and the driver adds 1
        KiB of shared memory to a block."""
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // self.warps
        by_shared = SHARED_BYTES[self.capability] // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, BLOCKS, WARPS // self.warps) * self.warps / WARPS


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def specialise(launch: Launch, capability: int):
    """Compile for a compute capability. As in a launch, Triton derives types, alignment and constants from the
    arguments."""
    kernel, options = launch.kernel, launch.options | dict(debug=False)
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, *bind(**launch.arguments, **options))
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=backend.target, options=parsed.__dict__)


@functools.cache
def compile_case(case: Case, capability: int) -> Code:
    return disassemble(specialise(case.launch(), capability), capability)


def disassemble(compiled, capability: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        listing, usage = tool("cuobjdump", "-sass", cubin.name), tool("cuobjdump", "-res-usage", cubin.name)
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?(\S+?)\s*(?:\s(.*?))?;", listing, re.MULTILINE)
    code = [(int(address, 16), opcode, operands) for address, opcode, operands in found if opcode != "NOP"]
    # A backward branch closes a loop. The branch to itself after the last EXIT is padding.
    targets = [
        (int(operands.split("0x")[-1], 16), at)
        for at, opcode, operands in code
        if opcode.startswith("BRA") and "0x" in operands
    ]
    loops = [(start, end) for start, end in targets if start < end]
    padding = {at for start, at in targets if start == at}
    inside = Counter(opcode for at, opcode, _ in code if any(start <= at <= end for start, end in loops))
    everything = Counter(opcode for at, opcode, _ in code if at not in padding)
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Code(
        registers=number["REG"], stack_bytes=number["STACK"], local_bytes=number["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps, capability=capability, loops=len(loops), setup=everything - inside,
        loop=inside,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Prediction


def kind(opcode: str) -> str:
    """integer | float | special | memory | other, of a SASS opcode."""
    stem = opcode.split(".")[0]
    if stem in ("MUFU", "I2F", "F2I", "F2F"):
        return "special"
    if stem in ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDC", "LDCU", "ULDC"):
        return "memory"
    if stem in (
        "IMAD",
        "IADD",
        "IADD3",
        "VIADD",
        "LOP3",
        "SHF",
        "PRMT",
        "LEA",
        "ISETP",
        "SEL",
        "I2FP",
        "IABS",
        "VIMNMX",
        "IMNMX",
    ):
        return "integer"
    return "float" if re.match(r"F|H[A-Z]+2", stem) else "other"


def lanes(opcode: str) -> dict[str, int]:
    """Lanes of each pipe that a thread's instruction occupies."""
    stem, used = opcode.split(".")[0], {"issue": 1}
    if kind(opcode) == "special":
        used["special"] = 1
    elif stem == "IMAD":
        used["product"] = used["fma"] = 2 if re.search(r"WIDE|HI", opcode) else 1
    elif re.match(r"F(ADD|MUL|FMA)|FHADD|FHFMA|HFMA2", stem):
        used["fma"] = 2 if stem.endswith("2") and stem != "HFMA2" else 1
    elif kind(opcode) in ("integer", "float") or stem in ("MOV", "PLOP3"):
        used["integer"] = 1
    return used


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted cost of one element on one chip."""

    bytes_moved: float
    instructions: dict[str, float]  # by kind
    pipe: str
    arithmetic: float  # s
    memory: float  # s

    @property
    def ratio(self) -> float:
        return self.arithmetic / self.memory


def cost(case: Case, chip: Chip) -> Cost:
    code, arguments = compile_case(case, chip.capability), case.launch().arguments
    elements = arguments["R"] * arguments["C"] / (32 * code.warps)  # of a thread, in each iteration
    b, n, d = case.size
    # Columns beyond d cost time too.
    useful = d / (-(-d // arguments["C"]) * arguments["C"]) if arguments["MASK"] == "rows" else 1.0
    weight = Counter({opcode: count / elements / useful for opcode, count in code.loop.items()})
    for opcode, count in code.setup.items():
        weight[opcode] += count / elements / useful / arguments["steps"]
    rates = dict(
        issue=ISSUE_LANES, integer=INTEGER_LANES, product=PRODUCT_LANES, special=SPECIAL_LANES, fma=chip.float_lanes
    )
    busy, kinds = Counter(), Counter()
    for opcode, count in weight.items():
        kinds[kind(opcode)] += count
        for pipe, used in lanes(opcode).items():
            busy[pipe] += used * count / rates[pipe]
    pipe = max(busy, key=busy.get)
    accesses = [
        (re.search(r"\.(64|128)\b|$", opcode)[1] or 32, n)
        for opcode, n in code.loop.items()
        if opcode[:3] in ("LDG", "STG")
    ]
    moved = sum(int(bits) // 8 * n for bits, n in accesses) / elements
    return Cost(moved, dict(kinds), pipe, busy[pipe] / (chip.processors * chip.clock), moved / chip.bandwidth)


def report(cases: list[Case]) -> str:
    kinds = ("integer", "float", "special", "memory", "other")
    head = f"{'':36} chip   regs  occ | B/elem bound | instructions an element: " + " ".join(
        f"{name[:7]:>7}" for name in (*kinds, "sum")
    )
    lines = [head + " |  memory us  arithmetic us (pipe)    ratio"]
    for case in cases:
        elements = case.size[0] * case.size[1] * case.size[2]
        for chip in CHIPS:
            code, c = compile_case(case, chip.capability), cost(case, chip)
            counts = [c.instructions.get(name, 0) for name in kinds]
            verdict = "ARITHMETIC-BOUND" if c.ratio > 1 else "memory-bound"
            verdict += f", arithmetic above {ROOM:.0%} of memory" if c.ratio >= ROOM else ""
            lines.append(
                f"{str(case):36.36} {chip.name:5} {code.registers:5} {code.occupancy:4.0%}"
                f" | {c.bytes_moved:6.2f} {case.bytes_bound:5} | {'':24}"
                + " ".join(f"{count:7.2f}" for count in (*counts, sum(counts)))
                + f" | {elements * c.memory * 1e6:9.1f} {elements * c.arithmetic * 1e6:10.1f} ({c.pipe:7}) "
                f"{c.ratio:8.0%}  {verdict}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every specialisation (half an hour)")
    print(report(every() if parser.parse_args().all else headline()))
