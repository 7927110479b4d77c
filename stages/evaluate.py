from diffusion.config import Params
from diffusion.judge import judge
from stages import stage


@stage
def main(params: Params) -> None:
    """Score the samples against the references; write metrics/evaluate.json."""
    judge(params)


if __name__ == "__main__":
    main()
