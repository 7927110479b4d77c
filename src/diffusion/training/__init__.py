"""The training loop: loss, optimiser, EMA, augmentation, checkpoints, identity, previews. Needs sampling, metrics."""
