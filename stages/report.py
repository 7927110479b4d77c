from diffusion import figures
from diffusion.config import Params
from stages import stage


@stage
def main(params: Params) -> None:
    """Draw curves, schedules and samples into report/, with a page that shows them all."""
    figures.report(params)


if __name__ == "__main__":
    main()
