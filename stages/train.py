from diffusion.config import Params
from diffusion.fit import fit
from stages import stage


@stage
def main(params: Params) -> None:
    """Train, or resume, and keep the EMA weights with the best validation loss in models/."""
    fit(params)


if __name__ == "__main__":
    main()
