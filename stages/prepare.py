from diffusion import data
from diffusion.config import Params
from stages import stage


@stage
def main(params: Params) -> None:
    """Split the training images into train and validation, record the data's digest."""
    data.prepare(params.data.val_images, params.seed)


if __name__ == "__main__":
    main()
