from diffusion.config import Params
from diffusion.distributed import is_worker, launch
from diffusion.pipeline.evaluate import evaluate
from stages import arguments, stage


@stage
def main(params: Params) -> None:
    """Score the samples against the references; write metrics/evaluate.json."""
    if params.evaluate.processes > 1 and not is_worker():
        launch(params.evaluate.processes, "stages.evaluate", arguments())
    else:
        evaluate(params)


if __name__ == "__main__":
    main()
