"""How a spatially varying degradation is computed without ddrf_fast.

    strided_conv     every kernel at the strided sites as one convolution 1 -> M, then the weighted sum: the
                     best form in plain torch, which no library uses; multiply-and-sum, einsum, bfloat16
    mix_first        weights per sample only: one kernel per sample first, then a strided grouped convolution
    mix_first_loop   the same, sample by sample
    mix_first_fft    the same by FFT, at full resolution
    filter2d         weights per sample only: grouped convolution at full resolution, then slicing (training
                     code of super-resolution does this)
    product_conv     product convolution, mask after: kernel by kernel at full resolution, then slicing
                     (libraries for inverse problems do this: the formula of deepinv's product_convolution2d
                     with mask_first=False, written out); as convolutions and by FFT
    opencv, scipy    loops over samples, channels and kernels on the CPU (data loaders do this)

Kernels are shared by the batch in every case here. All of them pad by reflection.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Case, Inputs, Provider, Run, Setting

# Beyond this many multiply-adds, at full resolution, a call of the slow peers would take many seconds.
SLOW_PEER_LIMIT = {"cpu": 1e10, "cuda": 2e11}

Formula = Callable[[Case, Inputs], Tensor]


def reflect(case: Case, image: Tensor) -> Tensor:
    return F.pad(image, [case.k // 2] * 4, mode="reflect")


def site_weights(case: Case, t: Inputs) -> Tensor:
    """[B, M, H', W'] (or [B, M, 1, 1]) at the strided sites; a grid is interpolated there only."""
    weights = t["weights"]
    if case.weights == "sample":
        return weights[:, :, None, None]
    if case.weights == "image":
        return weights[:, :, :: case.s, :: case.s]
    if case.weights == "grid":
        rows, columns = (
            _interpolation(size, case.s, cells, weights)
            for size, cells in zip((case.H, case.W), weights.shape[2:], strict=True)
        )
        return rows @ weights @ columns.T
    return weights


def _interpolation(size: int, stride: int, cells: int, like: Tensor) -> Tensor:
    """[sites, cells]: the matrix of linear interpolation, corners on corners."""
    positions = torch.arange(0, size, stride, device=like.device) * ((cells - 1) / (size - 1))
    distance = (positions[:, None] - torch.arange(cells, device=like.device)).abs()
    return (1 - distance).clamp(min=0).to(like.dtype)


def with_noise(t: Inputs, blurred: Tensor) -> Tensor:
    if "noise_std" not in t:
        return blurred
    return blurred + t["noise_std"][:, None, None, None] * torch.randn_like(blurred)


def _blurred_by_all(case: Case, t: Inputs, dtype: torch.dtype | None = None) -> Tensor:
    """[B, C, M, H', W']: every kernel at the strided sites."""
    image, kernels = t["image"], t["kernels"].flip(1, 2)
    if dtype is not None:
        image, kernels = image.to(dtype), kernels.to(dtype)
    out = F.conv2d(reflect(case, image).flatten(0, 1)[:, None], kernels[:, None], stride=case.s)
    return out.unflatten(0, image.shape[:2])


def strided_conv(case: Case, t: Inputs) -> Tensor:
    return (_blurred_by_all(case, t) * site_weights(case, t)[:, None]).sum(dim=2)


def strided_conv_einsum(case: Case, t: Inputs) -> Tensor:
    blurred = _blurred_by_all(case, t)
    if case.weights == "sample":
        return torch.einsum("bcmyx,bm->bcyx", blurred, t["weights"])
    return torch.einsum("bcmyx,bmyx->bcyx", blurred, site_weights(case, t))


def strided_conv_bfloat16(case: Case, t: Inputs) -> Tensor:
    blurred = _blurred_by_all(case, t, torch.bfloat16)
    return (blurred * site_weights(case, t)[:, None]).sum(dim=2)


def _one_kernel_each(t: Inputs) -> Tensor:
    """[B, k, k], in correlation order."""
    return torch.einsum("bm,muv->buv", t["weights"], t["kernels"].flip(1, 2))


def _grouped(case: Case, t: Inputs, stride: int) -> Tensor:
    kernels = _one_kernel_each(t).repeat_interleave(case.C, dim=0)[:, None]
    padded = reflect(case, t["image"]).flatten(0, 1)[None]
    return F.conv2d(padded, kernels, stride=stride, groups=kernels.shape[0])[0].unflatten(0, (case.B, case.C))


def mix_first(case: Case, t: Inputs) -> Tensor:
    return _grouped(case, t, case.s)


def filter2d(case: Case, t: Inputs) -> Tensor:
    return _grouped(case, t, 1)[:, :, :: case.s, :: case.s]


def mix_first_loop(case: Case, t: Inputs) -> Tensor:
    kernels, padded = _one_kernel_each(t), reflect(case, t["image"])
    samples = [
        F.conv2d(padded[b][:, None], kernels[b][None, None], stride=case.s)[:, 0] for b in range(case.B)
    ]
    return torch.stack(samples)


def _product_convolution(case: Case, t: Inputs, convolve: Callable[[int], Tensor]) -> Tensor:
    """Every convolution at full resolution, the mask after it; slicing at the end (or where it must be)."""
    if case.weights == "output":
        weights = t["weights"]
        return sum(weights[:, m : m + 1] * convolve(m)[:, :, :: case.s, :: case.s] for m in range(case.M))
    weights = site_weights(Case(case.name, {**case.shape, "s": 1}), t)
    total = sum(weights[:, m : m + 1] * convolve(m) for m in range(case.M))
    return total[:, :, :: case.s, :: case.s]


def product_conv(case: Case, t: Inputs) -> Tensor:
    padded = reflect(case, t["image"]).flatten(0, 1)[None]
    kernels = t["kernels"].flip(1, 2)
    channels = case.B * case.C

    def convolve(m: int) -> Tensor:
        kernel = kernels[m].expand(channels, 1, case.k, case.k)
        return F.conv2d(padded, kernel, groups=channels)[0].unflatten(0, (case.B, case.C))

    return _product_convolution(case, t, convolve)


def _fast_length(least: int) -> int:
    """The next length with no prime factor above 5."""
    length = least
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1


def _spectra(case: Case, image: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Of the padded image and of the kernels, and the way back from a product to the image's pixels."""
    padded, border = reflect(case, image), case.k - 1
    size = [_fast_length(length) for length in padded.shape[2:]]

    def back(product: Tensor) -> Tensor:
        return torch.fft.irfft2(product, s=size)[:, :, border : border + case.H, border : border + case.W]

    return torch.fft.rfft2(padded, s=size), torch.fft.rfft2(kernels, s=size), back


def product_conv_fft(case: Case, t: Inputs) -> Tensor:
    """The spectrum of the image is shared by all kernels."""
    spectrum, kernel_spectra, back = _spectra(case, t["image"], t["kernels"])
    return _product_convolution(case, t, lambda m: back(spectrum * kernel_spectra[m]))


def mix_first_fft(case: Case, t: Inputs) -> Tensor:
    kernels = torch.einsum("bm,muv->buv", t["weights"], t["kernels"])
    spectrum, kernel_spectra, back = _spectra(case, t["image"], kernels)
    return back(spectrum * kernel_spectra[:, None])[:, :, :: case.s, :: case.s]


def _as_stored(t: Inputs, out: Tensor) -> Tensor:
    """Of uint8 images, clipped and rounded."""
    if t["image"].dtype != torch.uint8 or out.dtype == torch.uint8:
        return out
    return out.round_().clamp_(0, 255).to(torch.uint8)


def opencv(case: Case, t: Inputs) -> Tensor:
    """filter2D on HWC images of float32 or uint8; it correlates, hence the flip."""
    import cv2
    import numpy as np

    images = t["image"].permute(0, 2, 3, 1).contiguous().numpy()
    kernels = np.ascontiguousarray(t["kernels"].numpy()[:, ::-1, ::-1])
    depth = -1 if case.weights == "sample" else cv2.CV_32F  # -1: the image's own

    def blur(image, kernel):
        blurred = cv2.filter2D(image, depth, kernel, borderType=cv2.BORDER_REFLECT_101)
        return blurred.reshape(case.H, case.W, case.C)

    return _as_stored(t, with_noise(t, _loop_over_samples(case, t, images, kernels, blur)))


def scipy(case: Case, t: Inputs) -> Tensor:
    """ndimage.convolve; its "mirror" is the reflection without the edge pixel repeated."""
    import numpy as np
    from scipy import ndimage

    images = t["image"].permute(0, 2, 3, 1).contiguous().numpy()

    def blur(image, kernel):
        planes = [ndimage.convolve(image[..., c], kernel, np.float32, "mirror") for c in range(case.C)]
        return np.stack(planes, axis=2)

    return _as_stored(t, with_noise(t, _loop_over_samples(case, t, images, t["kernels"].numpy(), blur)))


def _loop_over_samples(case: Case, t: Inputs, images, kernels, blur) -> Tensor:
    import numpy as np

    s = case.s
    if case.weights == "sample":
        mixed = np.einsum("bm,muv->buv", t["weights"].numpy(), kernels)
        out = [blur(image, kernel)[::s, ::s] for image, kernel in zip(images, mixed, strict=True)]
    else:
        weights = site_weights(case, t).numpy()
        out = [
            sum(w[..., None] * blur(image, kernel)[::s, ::s] for w, kernel in zip(maps, kernels, strict=True))
            for image, maps in zip(images, weights, strict=True)
        ]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def _per_sample_only(case: Case, setting: Setting) -> str | None:
    return None if case.weights == "sample" else "weights per sample only"


def _full_resolution(case: Case) -> float:
    return case.B * case.C * case.H * case.W * case.M * case.k**2


def _not_too_large(case: Case, setting: Setting) -> str | None:
    # Their backward takes some forty times as long as their forward.
    cost = _full_resolution(case) * (40 if setting.backward else 1)
    return "a call would take many seconds" if cost > SLOW_PEER_LIMIT[setting.device] else None


def _not_for_fft(case: Case, setting: Setting) -> str | None:
    return None if setting.torch_dtype == torch.float32 else "torch has no FFT of low precision"


def _per_sample_fft(case: Case, setting: Setting) -> str | None:
    return _per_sample_only(case, setting) or _not_for_fft(case, setting)


def on_numpy(module: str) -> Callable[[Case, Setting], str | None]:
    def skip(case: Case, setting: Setting) -> str | None:
        if setting.device != "cpu" or setting.dtype != "float32" or setting.backward:
            return "float32 forward on CPUs only"
        try:
            importlib.import_module(module)
        except ImportError:
            return f"{module} is not installed"
        return None if module == "ddrf_fast.numpy" else _not_too_large(case, setting)

    return skip


def _float32_only(case: Case, setting: Setting) -> str | None:
    return None if setting.torch_dtype == torch.float32 else "for comparison with float32"


def _compiled_cases_only(case: Case, setting: Setting) -> str | None:
    return None if case.compiled else "compiled for a few representative cases only"


def _torch(formula: Formula, compiled: bool = False) -> Callable[[Case, Setting], Run]:
    def build(case: Case, setting: Setting) -> Run:
        def run(t: Inputs) -> Tensor:
            return with_noise(t, formula(case, t))

        return torch.compile(run, dynamic=False) if compiled else run

    return build


def _numpy(formula: Formula) -> Callable[[Case, Setting], Run]:
    return lambda case, setting: lambda t: formula(case, t)


PEERS = (
    Provider("strided_conv", _torch(strided_conv)),
    Provider("strided_conv_einsum", _torch(strided_conv_einsum)),
    Provider(
        "strided_conv_bfloat16",
        _torch(strided_conv_bfloat16),
        _float32_only,
        peer=False,
        precision="bfloat16",
    ),
    Provider("mix_first", _torch(mix_first), _per_sample_only),
    Provider("mix_first_loop", _torch(mix_first_loop), _per_sample_only),
    Provider("mix_first_fft", _torch(mix_first_fft), _per_sample_fft),
    Provider("filter2d", _torch(filter2d), _per_sample_only),
    Provider("product_conv", _torch(product_conv), _not_too_large),
    Provider("product_conv_fft", _torch(product_conv_fft), _not_for_fft),
    Provider("opencv_loop", _numpy(opencv), on_numpy("cv2")),
    Provider("scipy_loop", _numpy(scipy), on_numpy("scipy")),
    Provider(
        "compiled_strided_conv", _torch(strided_conv, compiled=True), _compiled_cases_only, warm_up=True
    ),
)
