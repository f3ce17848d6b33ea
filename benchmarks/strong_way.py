"""A strong way to train a head on a frozen V-JEPA 2: what a good engineer writes in an afternoon with PyTorch and
transformers.

The encoder is transformers' own, in the compute dtype, under no_grad. The heads have the architecture of flperf's,
written plainly, with as many parameters: fp32 weights under bf16 autocast, scaled_dot_product_attention, and nothing
that is not in PyTorch. Encoder and head are each compiled as a whole. The optimizer is fused AdamW. Clips come from a
DataLoader whose workers decode with decord and resize bytes; they are normalised on the device. No step reads its loss.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from flperf.config import Config, Model
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import FrameSampling
from flperf.engine.process import compute_dtype
from flperf.models.backbones.pretrained import load_transformer
from flperf.models.latents import LatentGeometry


def rotary_angles(frames: range, height: int, width: int, head_dim: int) -> Tensor:
    """Angles of a rotary embedding over t, h and w, [n, k/2]."""
    pairs = head_dim // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    grid = torch.cartesian_prod(torch.tensor(list(frames)), torch.arange(height), torch.arange(width)).float()
    frequencies = [10_000.0 ** (-torch.arange(count) / max(count, 1)) for count in counts]
    return torch.cat([grid[:, axis, None] * frequencies[axis] for axis in range(3)], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """`b a n k` rotated by [n, k/2]."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Attention of x to `context`, or to itself."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, angles: Tensor, context: Tensor | None = None, context_angles: Tensor | None = None):
        source = x if context is None else context
        query, key, value = (
            linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, y in ((self.query, x), (self.key, source), (self.value, source))
        )
        key = rotate(key, angles if context_angles is None else context_angles)
        mixed = F.scaled_dot_product_attention(rotate(query, angles), key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


def mlp(dim: int, ratio: float) -> nn.Sequential:
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class PredictorBlock(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        dim = model.hidden_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attention, self.mlp = Attention(dim, model.num_heads), mlp(dim, model.mlp_ratio)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class Predictor(nn.Module):
    """Context tokens and mask tokens attend to one another; the mask tokens become the forecast."""

    def __init__(self, model: Model, geometry: LatentGeometry):
        super().__init__()
        dim = model.hidden_dim
        self.geometry = geometry
        self.project, self.project_norm = nn.Linear(geometry.dim, dim), nn.LayerNorm(dim, eps=1e-6)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(PredictorBlock(model) for _ in range(model.depth))
        self.norm, self.out = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, geometry.dim)
        frames = range(geometry.context_frames + geometry.target_frames)
        angles = rotary_angles(frames, geometry.height, geometry.width, dim // model.num_heads)
        self.register_buffer("angles", angles)

    def forward(self, context: Tensor) -> Tensor:
        """Context latents `b m c` to target latents `b n c`."""
        tokens = self.project_norm(self.project(context))
        masks = self.mask_token.expand(len(context), self.geometry.target_tokens, -1).to(tokens.dtype)
        x = torch.cat([tokens, masks], dim=1)
        for block in self.blocks:
            x = block(x, self.angles)
        return self.out(self.norm(x[:, self.geometry.context_tokens :]))


class DiTBlock(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        dim = model.hidden_dim
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(3))
        self.self_attention, self.cross_attention = (Attention(dim, model.num_heads) for _ in range(2))
        self.mlp, self.modulation = mlp(dim, model.mlp_ratio), nn.Linear(dim, 9 * dim)

    def forward(self, x: Tensor, angles: Tensor, context: Tensor, context_angles: Tensor, condition: Tensor) -> Tensor:
        modulations = self.modulation(F.silu(condition))[:, None].chunk(9, dim=-1)
        branches = (
            lambda y: self.self_attention(y, angles),
            lambda y: self.cross_attention(y, angles, context, context_angles),
            self.mlp,
        )
        for number, (norm, branch) in enumerate(zip(self.norms, branches, strict=True)):
            shift, scale, gate = modulations[3 * number : 3 * number + 3]
            x = x + gate * branch(norm(x) * (1 + scale) + shift)
        return x


class DiT(nn.Module):
    """Noised target tokens, modulated by tau, read the context by cross-attention; the output is a velocity."""

    FEATURES = 256

    def __init__(self, model: Model, geometry: LatentGeometry):
        super().__init__()
        dim = model.hidden_dim
        self.project, self.project_norm = nn.Linear(geometry.dim, dim), nn.LayerNorm(dim, eps=1e-6)
        self.noised = nn.Linear(geometry.dim, dim)
        self.tau = nn.Sequential(nn.Linear(self.FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(DiTBlock(model) for _ in range(model.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, geometry.dim)
        for linear in (self.modulation, self.out, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        frames = range(geometry.context_frames + geometry.target_frames)
        angles = rotary_angles(frames, geometry.height, geometry.width, dim // model.num_heads)
        self.register_buffer("context_angles", angles[: geometry.context_tokens])
        self.register_buffer("angles", angles[geometry.context_tokens :])

    def forward(self, context: Tensor, noised: Tensor, tau: Tensor) -> Tensor:
        """context `b m c`, noised `b n c` at tau [b] to the velocity `b n c`."""
        frequencies = 10_000.0 ** (-torch.arange(self.FEATURES // 2, device=tau.device) / (self.FEATURES // 2))
        angles = 1000 * tau[:, None] * frequencies
        condition = self.tau(torch.cat([angles.cos(), angles.sin()], dim=-1))
        tokens = self.project_norm(self.project(context))
        x = self.noised(noised)
        for block in self.blocks:
            x = block(x, self.angles, tokens, self.context_angles, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        return self.out(self.norm(x) * (1 + scale) + shift)


class StrongStep:
    """A training step. A call takes the next of `batches`, uint8 video `b f h w c`, and returns the loss, a scalar on
    the device. `mode` is `backbone.encode`: one would encode the whole clip at once, "joint"."""

    def __init__(
        self,
        config: Config,
        geometry: LatentGeometry,
        batches: Iterator[Tensor],
        device: torch.device,
        *,
        mode: str = "joint",
        compile: bool = True,
    ):
        self.config, self.geometry, self.batches, self.device, self.mode = config, geometry, batches, device, mode
        self.dtype = compute_dtype(config.engine.precision, device)
        preprocessing = Preprocessing.of(config.backbone)
        model = load_transformer(VJEPA2Model, VJEPA2Config, config.backbone, crop_size=preprocessing.size[0])
        self.encoder = model.encoder.to(device, self.dtype).requires_grad_(False).eval()
        self.mean, self.std = (
            torch.tensor(x, device=device)[:, None, None] / preprocessing.rescale
            for x in (preprocessing.mean, preprocessing.std)
        )
        torch.manual_seed(config.seed)
        self.is_dit = config.model.head == "dit"
        self.head = (DiT if self.is_dit else Predictor)(config.model, geometry).to(device)
        decayed = [p for p in self.head.parameters() if p.ndim > 1]
        plain = [p for p in self.head.parameters() if p.ndim <= 1]
        trainer = config.trainer
        groups = [{"params": decayed, "weight_decay": trainer.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, trainer.learning_rate, tuple(trainer.betas), fused=True)
        self.encode, self.loss = (torch.compile(f, disable=not compile) for f in (self._encode, self._loss))

    def __call__(self) -> Tensor:
        video = next(self.batches).to(self.device, non_blocking=True)
        context, target = self.latents_of(video)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.loss(context, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.trainer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def latents_of(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `b f h w c` to latents of context and target, `b n c` each."""
        tokens = self.geometry.context_tokens
        if self.mode == "joint":
            latents = self.encode(video)
            return latents[:, :tokens], latents[:, tokens:]
        frames = video.shape[1] * tokens // (tokens + self.geometry.target_tokens)
        context, target = video[:, :frames], video[:, frames:]
        if context.shape == target.shape:
            context, target = self.encode(torch.cat([context, target])).chunk(2)
            return context, target
        return self.encode(context), self.encode(target)

    def _encode(self, video: Tensor) -> Tensor:
        """uint8 `b f h w c` to latents `b n c`, with zero mean and unit variance in each token."""
        pixels = (video.permute(0, 1, 4, 2, 3) - self.mean) / self.std
        latents = self.encoder(pixels.to(self.dtype)).last_hidden_state
        return F.layer_norm(latents.float(), latents.shape[-1:]).to(self.dtype)

    def _loss(self, context: Tensor, target: Tensor) -> Tensor:
        if not self.is_dit:
            return F.mse_loss(self.head(context).float(), target.float())
        noise, tau = torch.randn_like(target), torch.rand(len(target), device=target.device)
        t = tau[:, None, None].to(target.dtype)
        velocity = self.head(context, torch.lerp(noise, target, t), tau)
        return F.mse_loss(velocity.float(), (target - noise).float())


class VideoFiles(torch.utils.data.Dataset):
    """Clips of video files, uint8 `f h w c`, from random starts; decoded by decord, resized on bytes."""

    def __init__(self, paths: list[str], frame_sampling: FrameSampling, preprocessing: Preprocessing, length: int):
        self.paths, self.frame_sampling, self.preprocessing, self.length = paths, frame_sampling, preprocessing, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        import decord

        reader = decord.VideoReader(self.paths[index % len(self.paths)], num_threads=1)
        wanted = self.frame_sampling.frames(range(len(reader)), torch.rand(()).item())
        frames = torch.from_numpy(reader.get_batch(wanted).asnumpy()).permute(0, 3, 1, 2)
        geometry = self.preprocessing.geometry(*frames.shape[2:])
        (top, left), (height, width) = geometry.offset, self.preprocessing.size
        resized = F.interpolate(frames, geometry.resized, mode="bilinear", antialias=True)
        return resized[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).contiguous()


def video_batches(
    paths: list[str], frame_sampling: FrameSampling, preprocessing: Preprocessing, batch: int, workers: int
) -> Iterator[Tensor]:
    """uint8 `b f h w c` in pinned memory, read ahead by worker processes, without end."""
    files = VideoFiles(paths, frame_sampling, preprocessing, 1_000_000 * batch)
    loader = torch.utils.data.DataLoader(
        files, batch, num_workers=workers, pin_memory=torch.cuda.is_available(), persistent_workers=True
    )
    return iter(loader)
