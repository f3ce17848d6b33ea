"""Train a small V-JEPA 2 as a masked autoencoder, so that forecasts can be evaluated on a trained encoder:

    python -m benchmarks.small_encoder --config configs/shapes/predictor.yaml --out data/encoders/shapes

With random weights attention is close to uniform, which shows neither the value of good latents nor the leak of joint
encoding. Three quarters of the tubelets are replaced by a learned token, and a linear layer predicts their pixels from
the encoder's output (SimMIM, arXiv:2111.09886, on tubelets). The model is saved in transformers' format, so
`backbone.weights` takes the folder.
"""

import argparse
import json
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm
from transformers import VJEPA2Config, VJEPA2Model

from flperf.config import load_config
from flperf.data import BatchShare, Preprocessing, open_dataset, prepare_dataset
from flperf.models.encoder import PixelNormalisation

HIDDEN_SHARE = 0.75
CPU = torch.device("cpu")


class MaskedAutoencoder(nn.Module):
    def __init__(self, model: VJEPA2Model):
        super().__init__()
        config = model.config
        self.encoder, self.patch, self.frames = model.encoder, config.patch_size, config.tubelet_size
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.paint = nn.Linear(config.hidden_size, 3 * self.frames * self.patch**2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean squared error, a scalar, of the masked tubelets' pixels. pixels: normalised, `b f c h w`."""
        hidden_state = self.encoder.embeddings(pixels)  # b n d
        hidden = torch.rand(hidden_state.shape[:2], device=pixels.device) < HIDDEN_SHARE
        hidden_state = torch.where(hidden[..., None], self.mask_token, hidden_state)
        for layer in self.encoder.layer:
            hidden_state = layer(hidden_state, None)[0]
        painted = self.paint(self.encoder.layernorm(hidden_state))
        pattern = "b (t f) c (h p) (w q) -> b (t h w) (f c p q)"
        true = rearrange(pixels, pattern, f=self.frames, p=self.patch, q=self.patch)
        return (painted - true)[hidden].square().mean()


def pretrain(config, out: Path, steps: int, batch_size: int) -> float:
    """Train and save the encoder; returns the mean loss of the last tenth of the steps."""
    prepare_dataset(config)
    preprocessing = Preprocessing.of(config.backbone)
    dataset = open_dataset(config, preprocessing, config.seed)
    batches = dataset.train_batches(0, BatchShare(0, 1, batch_size, batch_size), CPU)
    normalise = PixelNormalisation(preprocessing, torch.float32)
    torch.manual_seed(0)
    model = VJEPA2Model(VJEPA2Config(**config.backbone.architecture, attn_implementation="sdpa"))
    autoencoder = MaskedAutoencoder(model)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in (bar := tqdm(range(steps), "masked autoencoder", disable=None)):
        loss = autoencoder(normalise(next(batches).video))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.4f}")
    batches.close()
    model.save_pretrained(out)
    (out / "video_preprocessor_config.json").write_text(
        json.dumps({"crop_size": config.backbone.architecture["crop_size"]})
    )
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="whose dataset and backbone.architecture are taken"
    )
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    loss = pretrain(
        load_config(options.config, options.overrides), Path(options.out), options.steps, options.batch_size
    )
    print(f"{options.out}: loss {loss:.4f} after {options.steps} steps")


if __name__ == "__main__":
    main()
