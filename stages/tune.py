from diffusion.config import Params
from diffusion.tuning.search import tune
from stages import stage


@stage
def main(params: Params) -> None:
    """Search learning rate and schedules with Optuna; write the trials and the best of them to tuning/."""
    tune(params)


if __name__ == "__main__":
    main()
