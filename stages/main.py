import sys

from diffusion.config import Params
from diffusion.pipeline.experiment import reproduce
from stages import stage


@stage
def main(params: Params) -> None:
    """Run the whole pipeline with DVC.

    With params.yaml as it is, that is `dvc repro`. Options, or another file, make it a DVC experiment in a temporary
    folder, which leaves params.yaml and the results here as they are.
    """
    sys.exit(reproduce(params))


if __name__ == "__main__":
    main()
