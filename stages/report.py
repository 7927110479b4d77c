from diffusion.config import Params
from diffusion.pipeline.report import report
from stages import stage


@stage
def main(params: Params) -> None:
    """Draw curves, schedules and samples into report/, with a page that shows them all."""
    report(params)


if __name__ == "__main__":
    main()
