from diffusion.config import Params
from diffusion.distributed import is_worker, launch
from diffusion.pipeline.reference import write_references
from stages import arguments, stage


@stage
def main(params: Params) -> None:
    """Compute the statistics of real images that samples are compared with."""
    if params.evaluate.processes > 1 and not is_worker():
        launch(params.evaluate.processes, "stages.reference", arguments())
    else:
        write_references(params)


if __name__ == "__main__":
    main()
