"""`ddrf-fast bench`: how fast this machine fuses, and its two operations beside plain torch.

What is compared is timed in turn, in one process, so that a slow second of the machine hits all of it
(`_measuring.py`). The complete benchmarks, with every peer, are in the project's folder `benchmarks/`.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

import ddrf_fast
from ddrf_fast import collect_env
from ddrf_fast._measuring import Step, Timing, peak_memory, time_in_turn
from ddrf_fast.inference import Fuser

Call = Callable[[], Any]


def measure(
    fuser: Fuser, sizes: Sequence[tuple[int, int]], batch: int = 1, seconds: float = 1.0
) -> dict[str, Any]:
    """All that the command tells.

    Args:
        fuser: the network.
        sizes: (width, height) of the images to fuse.
        batch: how many pairs a call fuses, besides one alone.
        seconds: that each case is timed for.

    Returns:
        "machine", "fuse": a record for each size and batch, with the peak memory (of the whole process on a
        CPU, of what torch has allocated on a CUDA device; None where the system does not tell),
        "operations": a record for each operation with its ratio to plain torch.
    """
    return {
        "machine": machine(fuser.device),
        "fuse": [
            record
            for width, height in sizes
            for record in _fusing(fuser, width, height, sorted({1, batch}), seconds)
        ],
        "operations": [
            _compare(name, *calls, fuser.device, seconds) for name, calls in operations(fuser.device).items()
        ],
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else collect_env.cpu()["model"],
        "type": device.type,
        "threads": torch.get_num_threads(),
        "ddrf_fast": ddrf_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _timed(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, Timing]:
    """What is done once, at the first call, does not count."""

    def step(call: Call) -> Step:
        return lambda _: call()

    for call in calls.values():
        call()
    return time_in_turn({name: step(call) for name, call in calls.items()}, device, seconds)


def _fusing(
    fuser: Fuser, width: int, height: int, batches: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """From tensors of 8 bit on the device to such tensors."""
    records = []
    dtype = str(fuser.network.engine.dtype).removeprefix("torch.")
    for batch in batches:
        visible, infrared = (
            torch.randint(256, (batch, channels, height, width), dtype=torch.uint8, device=fuser.device)
            for channels in (3, 1)
        )

        def call(visible: torch.Tensor = visible, infrared: torch.Tensor = infrared) -> torch.Tensor:
            return fuser(visible, infrared)

        timing = _timed({"fuse": call}, fuser.device, seconds)["fuse"]
        records.append(
            {"width": width, "height": height, "batch": batch, "dtype": dtype}
            | asdict(timing)
            | {
                "images_per_s": 1e3 * batch / timing.median_ms,
                "peak_memory_mib": peak_memory(call, fuser.device),
            }
        )
    return records


def operations(device: torch.device) -> dict[str, tuple[Call, Call]]:
    """At the sizes of the paper: a layer of the network and the degradation, for a pair of 400x400.

    Each as ddrf_fast computes it, and as it is usually written in plain torch.
    """
    x, code = torch.rand(1, 32, 200, 200, device=device), torch.rand(1, 16, device=device)
    bank, attention = torch.rand(8, 32, 48, 3, 3, device=device), torch.rand(1, 8, device=device).softmax(1)
    image, kernels = torch.rand(1, 1, 400, 400, device=device), torch.rand(12, 25, 25, device=device)
    weights = torch.rand(1, 12, 8, 8, device=device).softmax(1)

    def plain_dynamic_conv() -> torch.Tensor:
        kernel = (attention[0] @ bank.flatten(1)).unflatten(0, bank.shape[1:])
        return F.conv2d(torch.cat((x, code[:, :, None, None].expand(-1, -1, 200, 200)), 1), kernel, padding=1)

    def plain_degrade() -> torch.Tensor:
        padded = F.pad(image, (12, 12, 12, 12), mode="reflect")
        blurred = F.conv2d(padded, kernels.flip(1, 2)[:, None])
        shares = F.interpolate(weights, size=(400, 400), mode="bilinear", align_corners=True)
        return (blurred * shares).sum(dim=1, keepdim=True)

    return {
        "dynamic_conv": (
            lambda: ddrf_fast.dynamic_conv(x, bank, attention, code=code, padding=1),
            plain_dynamic_conv,
        ),
        "degrade": (lambda: ddrf_fast.degrade(image, kernels, weights, grid=True), plain_degrade),
    }


def _compare(name: str, ours: Call, plain: Call, device: torch.device, seconds: float) -> dict[str, Any]:
    """Both in turn, without gradients."""
    with torch.inference_mode():
        timings = _timed({"ddrf_fast": ours, "plain torch": plain}, device, seconds)
    fast, slow = timings["ddrf_fast"], timings["plain torch"]
    return {
        "operation": name,
        **asdict(fast),
        "plain_torch_ms": slow.median_ms,
        "ratio": slow.median_ms / fast.median_ms,
    }


def table(results: Mapping[str, Any]) -> str:
    """What :func:`measure` found, for people."""
    about = results["machine"]
    lines = [
        f"{about['device']}, threads: {about['threads']}, torch {about['torch']}, "
        f"ddrf_fast {about['ddrf_fast']}",
        "",
        f"{'fuse':14} {'batch':>5} {'dtype':>9} {'median ms':>10} {'spread ms':>10} {'images/s':>9} "
        f"{'peak MiB':>9}",
    ]
    for r in results["fuse"]:
        size, peak = f"{r['width']}x{r['height']}", r["peak_memory_mib"]
        lines.append(
            f"{size:14} {r['batch']:5} {r['dtype']:>9} {r['median_ms']:10.2f} {r['iqr_ms']:10.2f} "
            f"{r['images_per_s']:9.1f} {'-' if peak is None else round(peak):>9}"
        )
    lines += [
        "",
        f"{'operation':20} {'median ms':>10} {'spread ms':>10} {'plain torch ms':>15} {'faster by':>9}",
    ]
    for r in results["operations"]:
        lines.append(
            f"{r['operation']:20} {r['median_ms']:10.2f} {r['iqr_ms']:10.2f} "
            f"{r['plain_torch_ms']:15.2f} {r['ratio']:9.2f}"
        )
    return "\n".join(lines)
