from diffusion.config import Params
from diffusion.draw import draw
from stages import stage


@stage
def main(params: Params) -> None:
    """Generate images from noise with the trained model; save every one in samples/."""
    draw(params)


if __name__ == "__main__":
    main()
