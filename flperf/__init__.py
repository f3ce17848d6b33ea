"""flperf: world models that forecast the rest of a video in the latent space of a frozen encoder."""
