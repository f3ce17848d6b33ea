"""flperf's parts in a loop of plain PyTorch, without its engine:

    python docs/plain_loop.py configs/shapes/predictor.yaml

It uses the dataset, the frozen encoder, latents `b t h w d`, a head and an objective. It leaves out what the engine
adds: ZeRO, averaged weights, evaluation, checkpoints.
"""

import sys

import torch

from flperf.config import Config, load_config
from flperf.data import BatchShare, Preprocessing, open_dataset, prepare_dataset
from flperf.models.encoder import build_encoder, encode_clip
from flperf.models.heads import build_head
from flperf.models.latents import Normaliser, latent_geometry
from flperf.objectives.build import build_objective


def train(config: Config, device: torch.device) -> list[float]:
    """Train a head for `trainer.max_steps` steps (default 100); returns the loss of each step."""
    prepare_dataset(config)
    preprocessing = Preprocessing.of(config.backbone)
    dataset = open_dataset(config, preprocessing, config.seed)
    encoder = build_encoder(
        config.backbone, preprocessing, dtype=torch.float32, device=device, compile=config.engine.compile
    )
    geometry = latent_geometry(config, *encoder.latent_shape(config.dataset.n_frames))
    head = build_head(config.model, geometry, seed=config.seed, compile=config.engine.compile).to(device)
    objective = build_objective(config, geometry)
    normalise = Normaliser("layer", torch.float32)  # needs no statistics, unlike the default
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.trainer.learning_rate, weight_decay=config.trainer.weight_decay
    )

    losses = []
    size = config.trainer.batch_size
    batches = dataset.train_batches(0, BatchShare(rank=0, world_size=1, micro_batch_size=size, batch_size=size), device)
    for _ in range(config.trainer.max_steps or 100):
        batch = next(batches)  # video: uint8 b f h w c
        context, target = encode_clip(encoder, batch.video.to(device), geometry, config.backbone.encode)  # b t h w d
        loss = objective.loss(head, normalise(context), normalise(target), batch.sample.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), config.trainer.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    batches.close()  # ends the decoding threads
    return losses


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} CONFIG [section.key=value …]")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for step, loss in enumerate(train(load_config(sys.argv[1], sys.argv[2:]), device), start=1):
        print(f"step {step}: loss {loss:.4f}")
