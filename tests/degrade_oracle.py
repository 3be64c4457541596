"""degrade as eq. 1-3 read, for the tests of its compiled kernels: every site's patch is unfolded.

Independent of `ddrf_fast`: padding is torch's own, gradients are autograd's, and the generator is Python
integers. Small inputs only.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

F_PAD = {"reflect": "reflect", "replicate": "replicate", "circular": "circular", "zeros": "constant"}


def philox4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds of Philox 4x32, literally."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product1 >> 32 ^ c1 ^ k0,
            product1 % 2**32,
            product0 >> 32 ^ c3 ^ k1,
            product0 % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def normal(seed: int, sample_id: int, c: int, y: int, x: int) -> float:
    """The noise of one output pixel."""
    words = philox4x32((x // 4, y, c, sample_id % 2**32), (seed % 2**32, seed >> 32))
    first, second = words[:2] if x % 4 < 2 else words[2:]
    radius = math.sqrt(-2.0 * math.log(((first >> 8) + 1) * 2.0**-24))
    angle = 2.0 * math.pi * ((second >> 8) * 2.0**-24)
    return radius * (math.cos(angle) if x % 2 == 0 else math.sin(angle))


@dataclasses.dataclass
class Case:
    """One call of the raw operator."""

    image: Tensor
    kernels: Tensor
    weights: Tensor
    noise_std: Tensor | None = None
    seed: Tensor | None = None
    sample_ids: Tensor | None = None
    gray_noise: Tensor | None = None
    shot_noise: Tensor | None = None
    scale: int = 1
    offset: int = 0
    padding: str = "reflect"
    correlation: bool = False
    weights_at: str = "sample"

    @property
    def out_size(self) -> list[int]:
        return [(n - self.offset + self.scale - 1) // self.scale for n in self.image.shape[2:]]

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.image, self.kernels, self.weights, self.noise_std]

    def replace(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)

    def to(self, **options) -> "Case":
        names = ("image", "kernels", "weights", "noise_std", "shot_noise")
        tensors = (*self.tensors, self.shot_noise)
        return self.replace(
            **{n: t.to(**options) for n, t in zip(names, tensors, strict=True) if t is not None}
        )

    def on(self, device: str) -> "Case":
        case = self.to(device=device)
        return (
            case
            if case.seed is None
            else case.replace(
                **{
                    name: getattr(case, name).to(device)
                    for name in ("seed", "sample_ids", "gray_noise", "shot_noise")
                    if getattr(case, name) is not None
                }
            )
        )

    def forward(self, op) -> Tensor:
        return op(
            *self.tensors,
            self.seed,
            self.sample_ids,
            self.gray_noise,
            self.shot_noise,
            self.scale,
            self.offset,
            self.out_size,
            self.padding,
            self.correlation,
            self.weights_at,
        )

    def backward(self, op, grad: Tensor, mask: int = 15) -> tuple[Tensor, ...]:
        if self.noise_std is None:
            mask &= 7
        return op(
            grad,
            *self.tensors,
            self.seed,
            self.sample_ids,
            self.gray_noise,
            self.scale,
            self.offset,
            self.padding,
            self.correlation,
            self.weights_at,
            mask,
        )


def make(
    batch=2,
    channels=2,
    size=(9, 11),
    bank=3,
    kernel=3,
    *,
    weights_at="sample",
    per_sample=False,
    noise=None,
    grid=(3, 4),
    random_seed=0,
    **options,
) -> Case:
    """A case in float64; a third of the taps are zero. `noise` is None, "number" or "map"."""
    generator = torch.Generator().manual_seed(random_seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    case = Case(
        rand(batch, channels, *size), torch.empty(0), torch.empty(0), weights_at=weights_at, **options
    )
    places = {"sample": (), "image": size, "output": tuple(case.out_size), "grid": grid}[weights_at]
    shape = (*((batch,) if per_sample else ()), bank, kernel, kernel)
    case.kernels = rand(*shape) * (rand(*shape) > 1 / 3) / kernel**2
    case.weights = rand(batch, bank, *places)
    if noise:
        case.noise_std = rand(batch, 1, *(case.out_size if noise == "map" else (1, 1)))
        case.seed = torch.tensor(0x123456789ABCDEF)
        case.sample_ids = torch.arange(batch) + 5
        case.gray_noise = torch.arange(batch) % 2 == 1 if noise == "map" else None
    return case


def definition(case: Case) -> Tensor:
    """out [B, C, H', W'], in the dtype of the case, differentiable."""
    size, radius, step = case.kernels.shape[-1], case.kernels.shape[-1] // 2, case.scale
    rows, columns = case.out_size
    padded = F.pad(case.image, (radius,) * 4, mode=F_PAD[case.padding])[:, :, case.offset :, case.offset :]
    patches = padded.unfold(2, size, step).unfold(3, size, step)[:, :, :rows, :columns]
    kernels = case.kernels if case.kernels.dim() == 4 else case.kernels.expand(len(case.image), -1, -1, -1)
    kernels = kernels if case.correlation else kernels.flip(-2, -1)
    weights = case.weights
    if case.weights_at == "grid":
        weights = F.interpolate(weights, case.image.shape[2:], mode="bilinear", align_corners=True)
    if case.weights_at in ("grid", "image"):
        weights = weights[:, :, case.offset :: step, case.offset :: step]
    if case.weights_at == "sample":
        weights = weights[:, :, None, None].expand(-1, -1, rows, columns)
    out = torch.einsum("bcyxuv,bmuv,bmyx->bcyx", patches, kernels, weights)
    if case.noise_std is None:
        return out
    gray = [False] * len(out) if case.gray_noise is None else case.gray_noise.tolist()
    std = case.noise_std
    if case.shot_noise is not None:
        shot = case.shot_noise[:, None, None, None]
        std = torch.sqrt(std**2 + shot * torch.where(out > 0, out, 0))
    noise = [
        [
            [
                [normal(int(case.seed), int(s), 0 if one else c, y, x) for x in range(columns)]
                for y in range(rows)
            ]
            for c in range(out.shape[1])
        ]
        for s, one in zip(case.sample_ids, gray, strict=True)
    ]
    return out + std * torch.tensor(noise, dtype=out.dtype).reshape(out.shape)


def gradients(case: Case, grad: Tensor) -> tuple[Tensor, ...]:
    """Autograd's gradients of image, kernels, weights and, where there is noise, noise_std."""
    leaves = [t.detach().requires_grad_() for t in case.tensors if t is not None]
    names = ("image", "kernels", "weights", "noise_std")
    out = definition(case.replace(**dict(zip(names, leaves, strict=False))))
    return torch.autograd.grad(out, leaves, grad)
