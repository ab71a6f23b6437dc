"""The one way from a file's pixels to the network's input. Training, evaluation, prediction and the app all use
it.

    slice files -> (S, H, W, 3) uint8 in numeric order -> normalised per volume and channel -> (S, 3, side,
    side) float32

From the uint8 volume on, everything is torch operations that export to ONNX: no sorting, no numpy, no branch
on data.
"""

import torch
import torch.nn.functional as F

CHANNELS = ("pre-contrast", "FLAIR", "post-contrast")
CLIP = 5.0  # deviations; beyond it lie vessels, fat and artefacts
EPSILON = 1e-6
# A checkpoint stores this, so that another version of these functions can tell that it works differently.
DESCRIPTION = {
    "name": "volume-foreground-v1",
    "channels": list(CHANNELS),
    "foreground": "above the channel's mean over the volume",
    "clip": CLIP,
    "resize": "bilinear",
}
SLICE_SIDE = 256  # pixels, of the dataset's and of prepared slices


def description(side: int) -> dict:
    """The preprocessing entry in the checkpoint of a network with images of `side` pixels.

    Averaging over areas gives the figures of earlier versions if slices of 256 pixels are halved or not shrunk.
    For other sides the figures differ, so the entry has another name.
    """
    if side >= SLICE_SIDE or 2 * side == SLICE_SIDE:
        return DESCRIPTION
    return {**DESCRIPTION, "name": "volume-foreground-v2", "resize": "area where it shrinks, else bilinear"}


def volume_statistics(volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel over the volume's foreground: (3,) and (3,) float32.

    volume: (S, H, W, 3) uint8, a whole patient. Foreground is what lies above the channel's mean, so that the
    black around the head does not count. A blank channel has deviation 0. A single slice is a volume of one
    slice. The rule then sees fewer pixels: a slice at the top of the head is stretched in contrast, and its mask
    is less reliable.
    """
    means, deviations = zip(
        *(_moments(volume[..., channel].flatten(1).float()) for channel in range(volume.shape[-1]))
    )
    return torch.stack(means), torch.stack(deviations)


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of one channel, (S, n) float32, over the pixels above its mean.

    One channel at a time needs a third of the memory. Sums go slice by slice, because float32 counts exactly only
    to 16 million: a runtime that adds one number after the other, such as onnxruntime, would lose digits over a
    whole volume.
    """
    foreground = (values > values.mean(dim=1).mean()).float()
    count = foreground.sum(dim=1).sum().clamp(min=1.0)
    mean = (values * foreground).sum(dim=1).sum() / count
    variance = ((values - mean).square() * foreground).sum(dim=1).sum() / count
    return mean, variance.sqrt()


def apply_statistics(slices: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """(S, H, W, 3) uint8 slices of a volume, normalised by that volume's statistics: (S, 3, H, W) float32
    within ±CLIP."""
    planes = (
        slices.permute(0, 3, 1, 2).contiguous().float()
    )  # with each channel in one piece, arithmetic is ten times as fast
    mean, deviation = mean.view(3, 1, 1), deviation.view(3, 1, 1)
    there = (deviation > 0).float()  # a blank channel is 0 everywhere, not noise over epsilon
    return ((planes - mean) / (deviation + EPSILON) * there).clamp(-CLIP, CLIP)


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) float32 to (B, C, *size). Shrinking averages over the area of each new pixel, so that no pixel
    is skipped; enlarging is bilinear.

    From 256 to 128 this is the mean of each 2×2 block. Where the sizes are known and bilinear gives the same,
    torch's own function is used, which is faster. The matrix products also export to ONNX with any h and w.
    """
    sides = list(zip(images.shape[2:], size))
    if all(_holds(n <= m) or _holds(n == 2 * m) for n, m in sides):
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    rows, columns = (
        _weights(length, wanted, images.device) for length, wanted in zip(images.shape[2:], size)
    )
    return torch.matmul(rows, torch.matmul(images, columns.T))


def _holds(fact: bool) -> bool:
    """Whether a fact about two sizes holds. In an exported graph it must hold for all sizes, not only for those
    that it is traced with."""
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(fact)
    return fact


def _weights(length: int, size: int, device: torch.device) -> torch.Tensor:
    """How much of each of `length` old pixels goes into each of `size` new ones, (size, length) float32."""
    old = torch.arange(length, device=device, dtype=torch.float32)[None]
    new = torch.arange(size, device=device, dtype=torch.float32)[:, None]
    step = torch.full((), length / size, device=device)  # old pixels per new one; h and w may be tensors
    covered = torch.minimum((new + 1) * step, old + 1) - torch.maximum(new * step, old)
    centre = ((new + 0.5) * step - 0.5).clamp(min=0).minimum(old.max())
    return torch.where(step > 1, covered.clamp(min=0) / step, (1 - (centre - old).abs()).clamp(min=0))


def network_input(
    slices: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, side: int
) -> torch.Tensor:
    """Slices (B, H, W, 3) uint8 and their volume's statistics to the network's input, (B, 3, side, side)
    float32."""
    return resize(apply_statistics(slices, mean, deviation), (side, side))
