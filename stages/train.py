from diffusion.config import Params
from diffusion.distributed import is_worker, launch
from diffusion.pipeline.train import train_model
from stages import arguments, stage


@stage
def main(params: Params) -> None:
    """Train, or resume, and keep the EMA weights that are best by train.best_by in models/."""
    if params.train.processes > 1 and not is_worker():
        launch(params.train.processes, "stages.train", arguments())
    else:
        train_model(params)


if __name__ == "__main__":
    main()
