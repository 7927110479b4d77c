from diffusion import evaluation
from diffusion.config import Params
from stages import stage


@stage
def main(params: Params) -> None:
    """Compute the statistics of real images that samples are compared with."""
    evaluation.write_references(params)


if __name__ == "__main__":
    main()
