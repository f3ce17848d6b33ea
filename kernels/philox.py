"""Counter-based normal noise: the same number for the same (seed, sample, element), on any device and for any split
of the work.

Element e of sample s takes Philox4x32 [Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11] keyed by
the 64-bit seed at the counter (64-bit e // 4, 64-bit s); its four 32-bit outputs become four normals by Box–Muller.
Nothing is stored and nothing is drawn in order, so the noise of a clip survives any block size, grid, rank or
micro-batch, and a second draw is free of memory.

The PyTorch functions are the definition and the CPU path, the Triton functions the same words in registers.
"""

import math

import torch
import triton
import triton.language as tl
from flperf_kernels.launching import launch
from torch import Tensor
from triton.language.extra import libdevice

# Seven rounds are the fewest that pass BigCrush (table 2 of the paper; ten is its default, with a margin). A round is
# one instruction an element, and a B200 has time for only 17 while its memory moves the 4 bytes of an element of the
# noising.
ROUNDS = tl.constexpr(7)
MULTIPLIER_A, MULTIPLIER_B = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
ASSEMBLY_A = tl.constexpr("{ .reg .b64 p; mul.wide.u32 p, $2, 0xD2511F53; mov.b64 {$0, $1}, p; }")
ASSEMBLY_B = tl.constexpr("{ .reg .b64 p; mul.wide.u32 p, $2, 0xCD9E8D57; mov.b64 {$0, $1}, p; }")
WEYL_A, WEYL_B = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)

LOW = 0xFFFFFFFF
# u = (word + 1/2) / 2^32 is never 0, so the logarithm is finite: |normal| <= 6.77
UNIFORM_STEP = tl.constexpr(2.0**-32)
ANGLE_STEP = tl.constexpr(2.0 * math.pi / 2.0**32)
TWO_LN2 = tl.constexpr(2.0 * math.log(2.0))


def philox_words(
    group: Tensor, sample: Tensor, seed: Tensor | int, rounds: int = ROUNDS.value
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (each in int64, since PyTorch has no full uint32) of the counter (group, sample).

    group and sample: int64, of shapes that broadcast to the one of each word; seed: an int or int64, of which all 64
    bits count. A product of two 32-bit numbers wraps to a negative int64, but its bits are right, and shift and mask
    read the halves off them.
    """
    c0, c1, c2, c3 = group & LOW, (group >> 32) & LOW, sample & LOW, (sample >> 32) & LOW
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(rounds):
        a, b = c0 * MULTIPLIER_A.value, c2 * MULTIPLIER_B.value
        c0, c1, c2, c3 = ((b >> 32) & LOW) ^ c1 ^ k0, b & LOW, ((a >> 32) & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + WEYL_A.value) & LOW, (k1 + WEYL_B.value) & LOW
    return c0, c1, c2, c3


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two words (32 bits in int64), of any one shape, to two independent standard normals of that shape in fp32."""
    radius = (-2.0 * (radius_word.float() * UNIFORM_STEP.value + UNIFORM_STEP.value / 2).log()).sqrt()
    angle = angle_word.float() * ANGLE_STEP.value
    return radius * angle.cos(), radius * angle.sin()


def normal_reference(sample: Tensor, count: int, seed: Tensor | int) -> Tensor:
    """The definition of the noise: int64 [b] sample indices to fp32 [b, count]."""
    return _groups(sample, -(-count // 4), seed)[:, :count].contiguous()


def _groups(sample: Tensor, count: int, seed: Tensor | int) -> Tensor:
    # each [b, count]
    w0, w1, w2, w3 = philox_words(torch.arange(count, device=sample.device)[None, :], sample[:, None], seed)
    return torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1).flatten(1)


# On a CPU this one compiled function is all that needs to be fast; the rest of the ops is a few cheap passes. 4 x 512
# x 384 and 4 x 1568 x 1024 elements on 2 cores with AVX-512, ns an element: this 2.8 and 3.2; eager 34; torch.randn
# 10 and 14 (a Mersenne twister on one core); torch.randn compiled 96 (Inductor draws it one number at a time).
# Compiling whole ops would save another 1 to 2 ns, but takes 15 s for every combination of options instead of 10 s
# once. The seed is a tensor, as a number it would be a constant of the code.
_groups_compiled = torch.compile(_groups, dynamic=True)


def philox_normal(sample: Tensor, count: int, *, seed: int) -> Tensor:
    """Standard normal noise, fp32 [b, count], of global sample indices int64 [b]; `seed` is any Python int, taken
    modulo 2^64."""
    seed = signed_64(seed)
    if sample.numel() * count == 0 or torch.compiler.is_compiling():
        return normal_reference(sample, count, seed)
    if sample.is_cuda:
        out = torch.empty(len(sample), count, device=sample.device)
        launch(*normal_launch(sample, out, seed))
        return out
    # By count alone and not by the batch, whose split must not change a bit: eager and compiled code may round a
    # cosine differently.
    if count < 1024:
        return normal_reference(sample, count, seed)
    return _groups_compiled(sample, -(-count // 4), torch.tensor(seed))[:, :count].contiguous()


def signed_64(seed: int) -> int:
    """The same 64 bits as a signed number, which is what int64 tensors and op schemas hold."""
    return (seed + 2**63) % 2**64 - 2**63


# FAST, below: inline assembly and the special-function unit's own log, sine and cosine. The interpreter, which has
# neither, takes the exact operations instead; the difference is about 1e-6 of the radius.


@triton.jit
def _product(x, MULTIPLIER: tl.constexpr, ASSEMBLY: tl.constexpr, FAST: tl.constexpr):
    """Low and high half of x * MULTIPLIER. Left to itself the compiler often splits the one wide product into two
    narrow ones."""
    if FAST:
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,r", [x], (tl.uint32, tl.uint32), True, 1)
    else:
        product = x.to(tl.uint64) * MULTIPLIER
        return product.to(tl.uint32), (product >> 32).to(tl.uint32)


@triton.jit
def draw_words(group, sample, seed, FAST: tl.constexpr):
    """`philox_words` of a block of unsigned group indices (32 bits where the caller knows them to suffice) and a
    scalar sample."""
    c0 = group.to(tl.uint32)
    c1 = tl.zeros_like(c0) if group.dtype == tl.uint32 else (group >> 32).to(tl.uint32)
    c2, c3 = sample.to(tl.uint32), (sample.to(tl.uint64) >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        low_a, high_a = _product(c0, MULTIPLIER_A, ASSEMBLY_A, FAST)
        low_b, high_b = _product(c2, MULTIPLIER_B, ASSEMBLY_B, FAST)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + WEYL_A, k1 + WEYL_B
    return c0, c1, c2, c3


@triton.jit
def _polar(radius_word, angle_word, variance, FAST: tl.constexpr):
    """Box–Muller, the radius times the root of `variance`."""
    uniform = radius_word.to(tl.float32) * UNIFORM_STEP + UNIFORM_STEP / 2
    angle = angle_word.to(tl.float32) * ANGLE_STEP
    if FAST:
        # |log| because the approximate logarithm may come out as a tiny positive number near 1; negating would cost
        # the same.
        radius = tl.sqrt(tl.abs(libdevice.fast_log2f(uniform)) * (TWO_LN2 * variance))
        return radius * libdevice.fast_cosf(angle), radius * libdevice.fast_sinf(angle)
    else:
        radius = tl.sqrt(tl.abs(tl.log2(uniform)) * (TWO_LN2 * variance))
        return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _pack(low, high):
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def draw_normals(group, sample, seed, variance, FAST: tl.constexpr):
    """Noise of [R, G] groups as [R, 4 G] consecutive elements, times the root of `variance`.

    The words are joined before Box–Muller, two of them as one 64-bit number: with a join for each of the four outputs
    the compiler can't give the noise the layout of the loads for free and sends it through shared memory.
    """
    w0, w1, w2, w3 = draw_words(group, sample, seed, FAST)
    pair = tl.join(_pack(w0, w1), _pack(w2, w3))  # [R, G, 2]
    cosine, sine = _polar(pair.to(tl.uint32), (pair >> 32).to(tl.uint32), variance, FAST)
    return tl.join(cosine, sine).reshape(group.shape[0], 4 * group.shape[1])


@triton.jit
def draw_normals_one_by_one(element, sample, seed, variance, FAST: tl.constexpr):
    """Noise at any element offsets, four times the arithmetic: for rows that do not start at a multiple of four."""
    w0, w1, w2, w3 = draw_words((element >> 2).to(tl.uint64), sample, seed, FAST)
    first_pair = (element & 2) == 0
    cosine, sine = _polar(tl.where(first_pair, w0, w2), tl.where(first_pair, w1, w3), variance, FAST)
    return tl.where((element & 1) == 0, cosine, sine)


@triton.jit(do_not_specialize=["seed"])
def normal_kernel(sample, out, count, seed: tl.int64, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """`normal_reference`, BLOCK elements of one sample a program."""
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    element = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    normals = draw_normals(group.to(tl.uint64), tl.load(sample + b), seed, 1.0, FAST)
    tl.store(out + b * count + element, normals, mask=element < count)


def normal_launch(sample: Tensor, out: Tensor, seed: int):
    """Fill out [b, count] with the noise of sample int64 [b]: (kernel, grid, arguments, options) for `launch`."""
    count, block = out.shape[1], 1024
    arguments = dict(sample=sample, out=out, count=count, seed=seed, FAST=not out.is_cpu, BLOCK=block)
    return normal_kernel, (triton.cdiv(count, block), len(sample)), arguments, dict(num_warps=4)
