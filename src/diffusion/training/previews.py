"""Pictures during training: EMA samples from the same noise every time, and a strip of the denoising."""

import json
from hashlib import sha256
from pathlib import Path

import torch

from diffusion.atomic import write_json
from diffusion.code_digest import code_digests, file_digest
from diffusion.data import grids
from diffusion.sampling import generation, panels
from diffusion.training.loop import Trainer
from diffusion.training.scoring import preview_config

STRIP_IMAGES = 6
STRIP_COLUMNS = 9


def write_previews(trainer: Trainer) -> list[Path]:
    """Write previews/step_<step>.png (a grid) and step_<step>_denoising.png (a strip) into the trainer's folder.

    previews.json beside them records what made those of each step.
    """
    train, seed, config = trainer.config.train, trainer.config.seed, preview_config(trainer.config.train)
    at_once = 2 * train.micro_batch if train.micro_batch else config.num_images  # as validation, which fits
    parts = [
        panels.stages(trainer.denoiser(), config, seed, some, trainer.device, STRIP_COLUMNS)
        for some in generation.cut(range(config.num_images), at_once)
    ]
    frames = torch.cat(parts, dim=1).numpy()
    pictures = _pictures(trainer)
    grids.save_png(grids.grid(frames[-1], columns=8, scale=grids.zoom(frames)), pictures[0])
    grids.save_png(grids.strip(frames[:, :STRIP_IMAGES], scale=grids.zoom(frames)), pictures[1])
    write_json(_record(trainer), {**_made_by(trainer), str(trainer.progress.step): _way(trainer)})
    return pictures


def has_previews(trainer: Trainer) -> bool:
    """Whether there are pictures of the step that the training is at, and they are as they would be made now."""
    made_by = _made_by(trainer).get(str(trainer.progress.step))
    return made_by == _way(trainer) and all(path.exists() for path in _pictures(trainer))


def outdated_previews(trainer: Trainer) -> list[int]:
    """Steps whose pictures would be others now; their weights are gone, unless the training is at that step."""
    steps = {int(path.stem.split("_")[1]) for path in (trainer.folder / "previews").glob("step_*.png")}
    made_by, way = _made_by(trainer), _way(trainer)
    return sorted(step for step in steps if made_by.get(str(step)) != way)


def _pictures(trainer: Trainer) -> list[Path]:
    name = f"step_{trainer.progress.step:06d}"
    return [trainer.folder / "previews" / f"{name}{kind}.png" for kind in ("", "_denoising")]


def _record(trainer: Trainer) -> Path:
    return trainer.folder / "previews.json"


def _made_by(trainer: Trainer) -> dict[str, str]:
    """`_way` by step; those of an earlier version have none."""
    try:
        return dict(json.loads(_record(trainer).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _way(trainer: Trainer) -> str:
    """16 hex digits of the code and the params that previews depend on, beside the weights."""
    config = preview_config(trainer.config.train).model_dump(mode="json")
    del config["device"]
    code = code_digests("sampling/panels.py", "data/grids.py"), file_digest(Path(__file__))
    return sha256(json.dumps([code, config], sort_keys=True).encode()).hexdigest()[:16]
