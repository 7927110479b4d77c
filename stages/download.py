from diffusion.config import Params
from diffusion.data.download import cifar10
from stages import stage


@stage
def main(params: Params) -> None:
    """Fetch CIFAR-10 from the first source that works, verify it, write data/cifar10/{train,test}.npz.

    Does nothing if data.source names other images.
    """
    cifar10.download(params.data)


if __name__ == "__main__":
    main()
