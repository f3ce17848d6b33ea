"""Counts what the kernels between products and attention read and write in a block of the reference size.

    python -m benchmarks.pass_report            # encoder block, and blocks of the predictor and the DiT
    python -m benchmarks.pass_report --kernels  # also each kernel

Inductor generates its code for an H100, without a GPU: shapes are traced on tensors without memory, and the device is
described by the constants below. A count is the bytes that a kernel reads and writes, each tensor once, over those of
one activation `b n d` in bf16: a pass. Of queries, keys and values in one tensor, Inductor counts all where a kernel
reads two, so forward passes are one too many. Columns: all left to Inductor, and with flperf's own kernels.
"""

import argparse
import math
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

B, N, D, HEADS = 8, 4096, 1024, 8  # clips, tokens of context or target, width, attention heads of a head
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    gcnArchName="",
)
Kernel = tuple[str, float]  # its operations, and passes


class _Compiled(Exception):
    """Ends a call: there is nothing to run."""


# ----------------------------------------------------------------------------------------------------------------------
# Attention as an operator of its own, as on CUDA: it returns tensors in the layout of its inputs


@torch.library.custom_op("pass_report::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_attention.register_fake
def _(query, key, value):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("pass_report::attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@_backward.register_fake
def _(grad, query, key, value, out, sums):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _differentiate(ctx, grad, _):
    return torch.ops.pass_report.attention_backward(grad, *ctx.saved_tensors)


_attention.register_autograd(
    _differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output)
)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.pass_report.attention(query, key, value)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Inductor for a device that is not there


@contextmanager
def described_device() -> Iterator[None]:
    """Inductor and Triton find an H100, as far as generating code asks for it."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch import config as functorch
    from torch._inductor import config
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    device = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    answers: dict[Any, dict[str, Any]] = {
        CudaInterface: dict(
            device=lambda index: ExitStack(),
            get_device_properties=lambda device=None: H100,
            current_device=lambda: 0,
            device_count=lambda: 1,
            is_available=lambda: True,
            get_compute_capability=lambda device=None: 90,
            get_raw_stream=lambda index: 0,
            synchronize=lambda device=None: None,
            is_triton_capable=lambda device=None: True,
            raise_if_triton_unavailable=lambda device=None: None,
            is_bf16_supported=lambda including_emulation=False: True,
        ),
        CudaInterface.Worker: dict(get_device_properties=lambda device=None: H100, current_device=lambda: 0),
    }
    with ExitStack() as stack:
        for owner, functions in answers.items():
            for name, function in functions.items():
                stack.enter_context(patch.object(owner, name, staticmethod(function)))
        for name in ("get_device_properties", "get_device_capability", "current_device"):
            answer = {"get_device_properties": H100, "get_device_capability": (9, 0), "current_device": 0}[name]
            stack.enter_context(patch.object(torch.cuda, name, lambda device=None, answer=answer: answer))
        stack.enter_context(patch("torch.utils._triton.triton_hash_with_backend", lambda: ""))
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1))
        stack.enter_context(functorch.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False))
        stack.enter_context(patch.object(driver, "_active", device))
        yield


def on_cuda(graph: torch.fx.GraphModule, inputs: list) -> tuple[FakeTensorMode, list]:
    """Let a graph that was traced on the CPU compute on CUDA; returns its inputs there."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = torch.device("cuda", 0)
    with mode, torch.no_grad():
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) if isinstance(x, Tensor) else x
            for x in inputs
        ]
        values, remaining = {}, iter(moved)
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": device}
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "get_attr":
                values[node] = getattr(graph, node.target)
            elif node.op == "call_function":
                arguments, named = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments, **named)
            node.meta["val"] = values.get(node)
    graph.recompile()
    return mode, moved


def kernels_of(function: Callable, *inputs: Any, unit: int) -> list[list[Kernel]]:
    """The kernels of each graph, forward and then backward. unit: bytes of a pass."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, graph
    from torch._inductor.virtualized import V

    found: list[list[Kernel]] = []

    def generate(lowering: Any) -> types.ModuleType:
        lowering.codegen()
        found.append([kernel for node in lowering.scheduler.nodes if (kernel := describe(node, unit))])
        module = types.ModuleType("generated")
        vars(module).update(call=None, __file__="")
        return module

    def lower(traced: torch.fx.GraphModule, examples: list, **options: Any) -> Callable:
        mode, moved = on_cuda(traced, examples)
        with tracing(TracingContext(mode)), V.set_fake_mode(mode):
            compile_fx.compile_fx_inner(traced, moved, **options)

        def run(*_: Any) -> None:
            raise _Compiled

        vars(run)["_boxed_call"] = True
        return run

    def backend(traced: torch.fx.GraphModule, examples: list) -> Callable:
        return compile_fx.compile_fx(traced, examples, inner_compile=lower)

    torch._dynamo.reset()
    with patch.object(graph.GraphLowering, "compile_to_module", generate), suppress(_Compiled):
        torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*inputs)
    return found


def describe(node: Any, unit: int) -> Kernel | None:
    """None for products and attention."""
    name = getattr(node.node, "python_kernel_name", "") or ""
    passes = node.get_read_write_buffers_sizes() / unit
    if "flperf" in name:
        return name.rsplit(".", 2)[-2], passes
    if not name and hasattr(node, "get_nodes") and type(node).__name__ != "ExternKernelSchedulerNode":
        origins = {origin.target for part in node.get_nodes() for origin in part.node.get_origins()}
        return " ".join(sorted({str(target).split(".")[1] for target in origins}))[:100], passes
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=grad)


def without_memory(module: nn.Module, trained: bool = True) -> nn.Module:
    """Its parameters in bf16, without memory (in a mode of fake tensors)."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(empty(*parameter.shape, grad=False), requires_grad=trained))
    return module


def tables(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    cosine, sine = (empty(tokens, 1, width, dtype=torch.float32, grad=False) for _ in range(2))
    return cosine, sine


def encoder() -> list[list[Kernel]]:
    from transformers import VJEPA2Config
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Layer

    from flperf.models.backbones import vjepa2

    layer = VJEPA2Layer(VJEPA2Config(), 0.0, hidden_size=D, num_attention_heads=16, mlp_ratio=4.0)
    block = without_memory(vjepa2.Block(layer), trained=False)
    x = empty(2 * B, N, D, grad=False)
    with torch.no_grad():
        return kernels_of(block, x, *tables(N, D // 16), unit=2 * x.numel())


def predictor() -> list[list[Kernel]]:
    from flperf.models.heads.layers import Block

    block, x = without_memory(Block(D, HEADS, 4.0)), empty(B, 2 * N, D)
    return kernels_of(block, x, tables(2 * N, D // HEADS // 2), unit=2 * x.numel())


def dit() -> list[list[Kernel]]:
    """The block and its projection of the context."""
    from flperf.models.heads.layers import Block, KeysValues

    block = without_memory(Block(D, HEADS, 4.0, cross_attention=True, modulated=True))
    projection, rotary = without_memory(KeysValues(D, HEADS)), tables(N, D // HEADS // 2)
    x, memory = empty(B, N, D), tuple(empty(B, N, HEADS, D // HEADS) for _ in range(2))
    own = kernels_of(block, x, rotary, memory, empty(B, D), unit=2 * x.numel())
    context = kernels_of(projection, x, rotary, unit=2 * x.numel())
    return [a + b for a, b in zip(own, context, strict=True)]


BLOCKS: dict[str, Callable[[], list[list[Kernel]]]] = {"encoder": encoder, "predictor": predictor, "DiT": dit}


def count(name: str, fused: bool) -> list[list[Kernel]]:
    """The kernels of a block, forward and then backward."""
    from flperf.models.backbones import vjepa2
    from flperf.models.heads import fused as functions
    from flperf.models.heads import layers

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        patch.object(layers, "attention", attention),
        patch.object(vjepa2, "attention", attention),
        patch.object(functions.Fusable, "fuses", lambda layer, x: fused),
        described_device(),
        mode,
    ):
        return BLOCKS[name]()


def passes(kernels: list[Kernel]) -> float:
    return math.fsum(kernel[1] for kernel in kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true", help="print each kernel, too")
    shown = parser.parse_args().kernels
    warnings.simplefilter("ignore")
    print(f"{'passes over b n d':24}{'Inductor':>10}{'fused':>10}")
    for name in BLOCKS:
        ways = [count(name, fused) for fused in ((False, True) if name != "encoder" else (False,))]
        for index, direction in enumerate(("forward", "backward")[: len(ways[0])]):
            print(f"{name + ', ' + direction:24}" + "".join(f"{passes(way[index]):10.1f}" for way in ways))
            for way in ways if shown else []:
                print("\n".join(f"    {size:6.2f}  {origins}" for origins, size in way[index] if size >= 0.05), "\n")


if __name__ == "__main__":
    main()
