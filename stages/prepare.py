from diffusion.config import Params
from diffusion.pipeline import prepare
from stages import stage


@stage
def main(params: Params) -> None:
    """Write the images of data.source as arrays, split them into train and validation, record their digest."""
    prepare.prepare(params)


if __name__ == "__main__":
    main()
