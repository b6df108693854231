"""The share of high frequencies of a latent, as CMLoRA measures it (arXiv 2502.04923, section 3)."""

import numpy


def high_frequencies(x, share=0.2):
    """x [c,h,w]: ring means of |DFT| of the channel mean, over the largest: mean from share * R on."""
    f = numpy.abs(numpy.fft.fftshift(numpy.fft.fft2(numpy.asarray(x, "f8").mean(0))))
    h, w = f.shape
    yy, xx = numpy.mgrid[0:h, 0:w]
    radius = numpy.sqrt((yy - h // 2) ** 2.0 + (xx - w // 2) ** 2.0).astype(int)
    rings = [f[radius == r].mean() for r in range(radius.max() + 1)]
    first = share * radius.max()
    return float(numpy.mean([v for r, v in enumerate(rings) if r >= first]) / max(rings))
