"""Effects of image acquisition: noise, speckle, blur, vignetting, stains.

Images are float32 in [0, 1], grey [S, S] or colour [S, S, 3]; fields are float32 [S, S].
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

Field = NDArray[np.floating[Any]]

# Optical densities in red, green and blue: of haematoxylin and eosin (Ruifrok and Johnston 2001, normalised), and of
# red blood cells, whose deep red the vector of eosin cannot represent.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.10, 1.10, 0.95]], dtype=np.float32)


def smooth_noise(rng: np.random.Generator, size: int, cells: int, cells_down: int | None = None) -> Field:
    """Noise [S, S] of about unit variance with `cells` grains across and `cells_down` (by default as many) down."""
    coarse = rng.standard_normal((cells_down or cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def grain(rng: np.random.Generator, image: Field, amount: float) -> Field:
    """Add independent Gaussian noise, the same in all colours."""
    noise = rng.standard_normal(image.shape[:2], dtype=np.float32) * np.float32(amount)
    return image + (noise if image.ndim == 2 else noise[..., None])


def soften(image: Field, pixels: float) -> Field:
    """Apply a Gaussian blur of a standard deviation in pixels, without mixing colours."""
    sigma = (pixels, pixels, 0)[: image.ndim]
    blurred: Field = gaussian_filter(image, sigma, truncate=2.5)
    return blurred


def rician(rng: np.random.Generator, image: Field, amount: float) -> Field:
    """Add the noise of MRI magnitude images: Gaussian in both channels of the complex signal."""
    real, imaginary = rng.standard_normal((2, *image.shape), dtype=np.float32) * np.float32(amount)
    magnitude: Field = np.hypot(image + real, imaginary)
    return magnitude


def speckle(rng: np.random.Generator, image: Field, *, amount: float, across: int, down: int) -> Field:
    """Apply the multiplicative noise of coherent imaging: the magnitude of a complex Gaussian field.

    across, down: number of grains along the image's sides. amount: from 0 for no speckle to 1 for full speckle.
    """
    # Dividing by 1.1 brings the mean of the magnitude near 1.
    size = image.shape[0]
    rayleigh = np.hypot(smooth_noise(rng, size, across, down), smooth_noise(rng, size, across, down)) / 1.1
    noisy: Field = image * np.float32(1 - amount) + image * np.float32(amount) * rayleigh
    return noisy


def radial(size: int, centre: tuple[float, float] | None = None) -> Field:
    """Distance of each pixel from `centre` (pixel XY, by default the image's centre), in half image sides."""
    x, y = centre if centre is not None else (size / 2, size / 2)
    axis = np.arange(size, dtype=np.float32)
    distance: Field = np.hypot((axis - np.float32(x))[None, :], (axis - np.float32(y))[:, None])
    return distance * np.float32(2 / size)


def vignette(image: Field, strength: float) -> Field:
    """Darken the image towards its corners."""
    fall = 1 - np.float32(strength) * radial(image.shape[0]) ** 2 / 2
    return image * (fall if image.ndim == 2 else fall[..., None])


def stain(densities: Field) -> Field:
    """Colours [S, S, 3] under white light, by the Beer-Lambert law, of densities [S, S, 3] in the order of STAINS."""
    colour: Field = np.exp(-(densities @ STAINS)) * np.float32(0.98)
    return colour


def to_uint8(image: Field) -> NDArray[np.uint8]:
    """Convert grey or colour in [0, 1] to uint8 [S, S, 3]; other values are clipped."""
    levels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2) if levels.ndim == 2 else levels
