from diffusion.config import Params
from diffusion.pipeline.weights import write_card
from stages import stage


@stage
def main(params: Params) -> None:
    """Look for the weights of FID's network, fetch them if they are wanted; write data/weights.json.

    `make weights` looks again: references and scores are made again if there are other weights than before.
    """
    write_card(params)


if __name__ == "__main__":
    main()
