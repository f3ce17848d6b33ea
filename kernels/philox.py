"""Counter-based normal noise: the same number for the same (seed, sample, element), on any device and for any split of
the work.

Element e of sample s takes Philox4x32 [Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11] with the
64-bit seed as its key and (64-bit e // 4, 64-bit s) as its counter. Box–Muller turns its four 32-bit outputs into
four normals. There is no state, so the noise of a clip doesn't depend on block size, grid, rank or micro-batch, and
drawing it again takes no memory.

The PyTorch functions define the noise and run on a CPU. The Triton functions compute the same in registers.
"""

import math

import torch
import triton
import triton.language as tl
from flperf_kernels.launching import Launch
from torch import Tensor
from triton.language.extra import libdevice

# Seven rounds are the fewest that pass BigCrush (table 2 of the paper, whose default of ten leaves a margin). A round
# costs one instruction an element. A B200 has time for 17 while its memory moves the 4 bytes of an element noised.
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
    """Four 32-bit words of the counter (group, sample), each in int64, since PyTorch lacks arithmetic in uint32.

    group and sample: int64, of shapes that broadcast to the shape of each word; seed: an int or int64, of which all 64
    bits count.
    """
    # A product of two 32-bit numbers may wrap to a negative int64, but its bits are right.
    c0, c1, c2, c3 = group & LOW, (group >> 32) & LOW, sample & LOW, (sample >> 32) & LOW
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(rounds):
        a, b = c0 * MULTIPLIER_A.value, c2 * MULTIPLIER_B.value
        c0, c1, c2, c3 = ((b >> 32) & LOW) ^ c1 ^ k0, b & LOW, ((a >> 32) & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + WEYL_A.value) & LOW, (k1 + WEYL_B.value) & LOW
    return c0, c1, c2, c3


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two words (32 bits in int64) of one shape to two independent standard normals of that shape in fp32."""
    radius = (-2.0 * (radius_word.float() * UNIFORM_STEP.value + UNIFORM_STEP.value / 2).log()).sqrt()
    angle = angle_word.float() * ANGLE_STEP.value
    return radius * angle.cos(), radius * angle.sin()


def normal_reference(sample: Tensor, count: int, seed: Tensor | int) -> Tensor:
    """The definition of the noise: int64 [b] sample indices to fp32 [b, count]."""
    return _draw_groups(sample, -(-count // 4), seed)[:, :count].contiguous()


def _draw_groups(sample: Tensor, groups: int, seed: Tensor | int) -> Tensor:
    """The first groups of four elements, fp32 [b, 4 groups]."""
    words = philox_words(torch.arange(groups, device=sample.device)[None, :], sample[:, None], seed)  # each [b, groups]
    return torch.stack((*box_muller(*words[:2]), *box_muller(*words[2:])), dim=-1).flatten(1)


# On a CPU, compiling this one function is enough: the rest of the ops is a few cheap passes. ns an element for 4 x
# 512 x 384 and 4 x 1568 x 1024 elements on 2 cores with AVX-512: this 2.8 and 3.2; eager 34; torch.randn 10 and 14 (a
# Mersenne twister on one core); compiled torch.randn 96 (Inductor draws one number at a time). Compiling whole ops
# would save another 1 to 2 ns, but takes 15 s for each combination of options rather than 10 s once. The seed is
# passed as a tensor, since an int would be compiled in as a constant.
_draw_groups_compiled = torch.compile(_draw_groups, dynamic=True)


def philox_normal(sample: Tensor, count: int, *, seed: int) -> Tensor:
    """Standard normal noise, fp32 [b, count], of global sample indices int64 [b]. The seed is any int, modulo 2^64."""
    seed = signed_64(seed)
    if sample.numel() * count == 0 or torch.compiler.is_compiling():
        return normal_reference(sample, count, seed)
    if sample.is_cuda:
        out = torch.empty(len(sample), count, device=sample.device)
        normal_launch(sample, out, seed).run()
        return out
    # Eager and compiled code may round a cosine differently. The choice depends on the count alone, so that splitting a
    # batch changes no bit.
    if count < 1024:
        return normal_reference(sample, count, seed)
    return _draw_groups_compiled(sample, -(-count // 4), torch.tensor(seed))[:, :count].contiguous()


def signed_64(seed: int) -> int:
    """The low 64 bits of a seed as a signed number, as int64 tensors and op schemas hold it."""
    return (seed + 2**63) % 2**64 - 2**63


# FAST: inline assembly, and the special-function unit's logarithm, sine and cosine. The interpreter has neither and
# takes the exact operations. They differ by about 1e-6 of the radius.


@triton.jit
def _product(x, MULTIPLIER: tl.constexpr, ASSEMBLY: tl.constexpr, FAST: tl.constexpr):
    """Low and high half of x * MULTIPLIER. Without assembly the compiler often makes two narrow products of the wide
    one."""
    if FAST:
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,r", [x], (tl.uint32, tl.uint32), True, 1)
    else:
        product = x.to(tl.uint64) * MULTIPLIER
        return product.to(tl.uint32), (product >> 32).to(tl.uint32)


@triton.jit
def draw_words(group, sample, seed, FAST: tl.constexpr):
    """`philox_words` of a block of unsigned group indices and a scalar sample. Indices that fit may be 32-bit."""
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
    """Box–Muller, times the root of `variance`."""
    uniform = radius_word.to(tl.float32) * UNIFORM_STEP + UNIFORM_STEP / 2
    angle = angle_word.to(tl.float32) * ANGLE_STEP
    if FAST:
        # |log|, as the approximate logarithm of a number near 1 may be slightly positive; negating would cost the same.
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

    The words are joined before Box–Muller, two of them as one 64-bit number. If all four outputs were joined, the
    compiler would send the noise through shared memory to give it the layout of the loads.
    """
    w0, w1, w2, w3 = draw_words(group, sample, seed, FAST)
    pair = tl.join(_pack(w0, w1), _pack(w2, w3))  # [R, G, 2]
    cosine, sine = _polar(pair.to(tl.uint32), (pair >> 32).to(tl.uint32), variance, FAST)
    return tl.join(cosine, sine).reshape(group.shape[0], 4 * group.shape[1])


@triton.jit
def draw_normals_one_by_one(element, sample, seed, variance, FAST: tl.constexpr):
    """Noise at any element offsets, for rows that don't start at a multiple of four. Costs four times the
    arithmetic."""
    w0, w1, w2, w3 = draw_words((element >> 2).to(tl.uint64), sample, seed, FAST)
    first_pair = (element & 2) == 0
    cosine, sine = _polar(tl.where(first_pair, w0, w2), tl.where(first_pair, w1, w3), variance, FAST)
    return tl.where((element & 1) == 0, cosine, sine)


@triton.jit(do_not_specialize=["seed"])
def normal_kernel(sample, out, count, seed: tl.int64, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """`normal_reference`; a program draws BLOCK elements of one sample."""
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    element = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    normals = draw_normals(group.to(tl.uint64), tl.load(sample + b), seed, 1.0, FAST)
    tl.store(out + b * count + element, normals, mask=element < count)


def normal_launch(sample: Tensor, out: Tensor, seed: int) -> Launch:
    """`normal_kernel`, which fills out [b, count] with the noise of sample int64 [b]."""
    count, block = out.shape[1], 1024
    arguments = dict(sample=sample, out=out, count=count, seed=seed, FAST=not out.is_cpu, BLOCK=block)
    return Launch(normal_kernel, (triton.cdiv(count, block), len(sample)), arguments, dict(num_warps=4))
