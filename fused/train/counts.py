"""The numbers of videos and steps that follow from a training's configuration, its data and its processes."""

from fused.train.config import TrainConfig


def micro_batch_videos(config: TrainConfig, processes: int, listed: int, entries: str = "videos") -> int:
    """Return the videos of one micro-batch in one process. `listed` is the number of `entries` of data.train.

    Raises ValueError for a batch_size that does not divide into such micro-batches, and for one of more clips than there are.
    """
    repeats = config.data.repeats
    videos, remainder = divmod(config.batch_size, processes * config.accumulate * repeats)
    if remainder:
        product, values = "processes * accumulate", f"{processes} * {config.accumulate}"
        if repeats > 1:
            product, values = f"{product} * data.repeats", f"{values} * {repeats}"
        raise ValueError(f"batch_size is {config.batch_size}; allowed: a multiple of {product} ({values})")
    if listed * repeats < config.batch_size:
        most = f"up to {f'{repeats} times ' if repeats > 1 else ''}the {listed} {entries} of {config.data.train}"
        raise ValueError(f"batch_size is {config.batch_size}; allowed: {most}")
    return videos


def warmup_steps(config: TrainConfig, steps_per_epoch: int, total: int) -> int:
    """Return the steps of the warm-up. Raises ValueError, with the key, for as many as the `total` of the training, or more."""
    epochs = config.optim.warmup_epochs
    steps = config.optim.warmup_steps if epochs is None else round(epochs * steps_per_epoch)
    if steps >= total:
        key, value = ("warmup_steps", steps) if epochs is None else ("warmup_epochs", f"{epochs}, {steps} steps")
        raise ValueError(f"optim.{key} is {value}; allowed: fewer than the {total} steps of the training")
    return steps
