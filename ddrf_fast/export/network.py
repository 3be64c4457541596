"""Writes DDRF-Net in the formats of this package."""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast._files import replacing
from ddrf_fast._version import __version__
from ddrf_fast.models import DDRFNet

#: The extension of a file of each format.
FORMATS = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
#: What a file may give, by name.
OUTPUTS = {"fused": ("fused",), "all": ("fused", "restored_visible", "restored_infrared")}
#: Rows and columns that an image must have at least: below, the estimators' strided layers have maps of one
#: pixel, for which torch.export makes another program.
MINIMUM_SIZE = 17


def export_model(
    model: DDRFNet,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    outputs: str = "fused",
    clean: bool = False,
) -> Path:
    """Writes a network to a file that runs without its Python code.

    The formats are described in :mod:`ddrf_fast.export`. The file holds the configuration and the version of
    the package as metadata.

    Args:
        model: the network, on the CPU.
        path: the file, ending in .pt2 or .onnx; its folder is created. A file that is there is replaced at
            once or not at all.
        format: "pt2", "aoti" or "onnx"; None: by the extension, and "pt2" for .pt2.
        outputs: "fused", or "all" for the fused and the two restored images.
        clean: the images will be sharp and free of noise: the network is told so, as by
            :class:`~ddrf_fast.Fuser`, and does not estimate their degradation.

    Returns:
        The path.

    Raises:
        ValueError: format or outputs are unknown, the extension does not fit, the model is not on the CPU, or
            a package that the format needs is not installed.

    Example:
        >>> from ddrf_fast.models import load_model
        >>> path = export_model(load_model(), getfixture("tmp_path") / "ddrfnet.pt2")
        >>> fuse = torch.export.load(path).module()
        >>> fuse(torch.rand(3, 1, 40, 50), torch.rand(3, 1, 40, 50)).shape
        torch.Size([3, 1, 40, 50])
    """
    path = Path(path)
    format = resolve_format(path, format)
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs must be {' or '.join(map(repr, OUTPUTS))}, got {outputs!r}")
    if (device := next(model.parameters()).device).type != "cpu":
        raise ValueError(f"model must be on the CPU to be exported, it is on {device}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The writers insist on an extension, so they cannot write to the temporary path of `replacing`.
    with tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
        written = Path(folder) / f"model{FORMATS[format]}"
        with _quiet():
            _WRITERS[format](Images(model, outputs, clean).eval(), written)
        shutil.copyfile(written, temporary)
    return path


def resolve_format(path: Path, format: str | None) -> str:
    """The format meant for a file, as :func:`export_model` describes it; raises what it raises."""
    if format is None:
        named = [name for name, suffix in FORMATS.items() if suffix == path.suffix]
        if not named:
            raise ValueError(f"{path} must end in .pt2 or .onnx, or tell its format")
        format = named[0]
    if format not in FORMATS:
        raise ValueError(f"format must be {', '.join(map(repr, FORMATS))}, got {format!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"{path} must end in {FORMATS[format]} for the format {format!r}")
    return format


def require(*packages: str) -> None:
    """Raises a ValueError if one of these, which not everybody needs, is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install 'ddrf-fast[export]'")


class Images(nn.Module):
    """The network as images in, images out, for clean images or such as they come."""

    clean_code: Tensor | None

    def __init__(self, model: DDRFNet, outputs: str, clean: bool = False) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs
        code = None
        if clean:
            no_blur = F.pad(torch.ones(1, 1, 1), (model.config.kernel_size // 2,) * 4)
            with torch.no_grad():
                code = model.encode(no_blur, torch.zeros(1))
        self.register_buffer("clean_code", code)

    def forward(self, visible: Tensor, infrared: Tensor) -> Tensor | tuple[Tensor, ...]:
        code = None if self.clean_code is None else self.clean_code.expand(visible.shape[0], -1)
        images = tuple(image.clamp(0, 1) for image in self.model(visible, infrared, code, code))
        return images[0] if self.outputs == "fused" else images

    def metadata(self) -> dict[str, str]:
        """What a file tells about itself."""
        return {
            "ddrf_fast_version": __version__,
            "config": json.dumps(dataclasses.asdict(self.model.config)),
            "outputs": ", ".join(OUTPUTS[self.outputs]),
            "clean": json.dumps(self.clean_code is not None),
        }


def _traced(network: Images) -> torch.export.ExportedProgram:
    # Without gradients: the layers then hand their means on, as in inference.
    with torch.no_grad():
        return torch.export.export(network, _example(), dynamic_shapes=_free_shapes())


def _example() -> tuple[Tensor, Tensor]:
    # Sizes of 0 and 1 would be taken for constants.
    return torch.rand(2, 1, 48, 64), torch.rand(2, 1, 48, 64)


def _free_shapes() -> dict[str, dict[int, torch.export.Dim]]:
    free = {
        0: torch.export.Dim("batch", min=1),
        2: torch.export.Dim("height", min=MINIMUM_SIZE),
        3: torch.export.Dim("width", min=MINIMUM_SIZE),
    }
    return {"visible": free, "infrared": free}


def _write_pt2(network: Images, path: Path) -> None:
    files = {"ddrf_fast.json": json.dumps(network.metadata())}
    torch.export.save(_traced(network), path, extra_files=files)


def _write_aoti(network: Images, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        _traced(network),
        package_path=str(path),
        inductor_configs={"aot_inductor.metadata": network.metadata()},
    )


def _write_onnx(network: Images, path: Path) -> None:
    require("onnx", "onnxscript")
    from ddrf_fast.export.onnx import translations

    with torch.no_grad():
        program = torch.onnx.export(
            network,
            _example(),
            dynamic_shapes=_free_shapes(),
            input_names=["visible", "infrared"],
            output_names=list(OUTPUTS[network.outputs]),
            custom_translation_table=translations(),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(network.metadata())
    program.save(path)


_WRITERS: dict[str, Callable[[Images, Path], None]] = {
    "pt2": _write_pt2,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about itself, and that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            # Both images have the same free sizes, which then keep the names of the first.
            warnings.filterwarnings("ignore", message=".*axis name.*will not be used", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)
