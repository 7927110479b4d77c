from diffusion.config import Params
from diffusion.distributed import is_worker, launch
from diffusion.pipeline.sample import sample
from stages import arguments, stage


@stage
def main(params: Params) -> None:
    """Generate images from noise with the trained model; save every one in samples/."""
    if params.sample.processes > 1 and not is_worker():
        launch(params.sample.processes, "stages.sample", arguments())
    else:
        sample(params)


if __name__ == "__main__":
    main()
