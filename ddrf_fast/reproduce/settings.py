"""What the tables are made from."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ddrf_fast.inference import Fuser


@dataclass
class Settings:
    """What the tables are made from.

    Attributes:
        data: folder of the sets, ``SET/test/vis`` and ``SET/test/ir``, and of what other methods made of
            them, ``baselines/SET/METHOD``.
        output: folder for the values of each image and for pictures; None: they are not written.
        weights: a weights file of DDRF-Net; None: the package's own.
        device: as for :func:`ddrf_fast.fuse`.
        sets: names of the sets; none: those of the table that are there.
        limit: use only so many pairs of each set.
        runs: folder of the trainings that are compared, ``EXPERIMENT/ddrfnet.safetensors``.
    """

    data: Path
    output: Path | None = None
    weights: Path | None = None
    device: str = "auto"
    sets: tuple[str, ...] = ()
    limit: int | None = None
    runs: Path | None = None
    fuser: Fuser = field(init=False)

    def __post_init__(self) -> None:
        if not self.data.is_dir():
            raise ValueError(f"data folder {self.data} does not exist")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        self.fuser = Fuser(self.weights, self.device, "float32")  # on any processor the same tables
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)

    @property
    def torch_device(self) -> torch.device:
        """Where the network runs and images are measured."""
        return self.fuser.device

    def chosen(self, usual: tuple[str, ...]) -> list[str]:
        """The sets to use: those asked for, or the usual ones that are there.

        Raises:
            ValueError: a set that was asked for is missing, or none is there.
        """
        names = self.sets or usual
        there = [name for name in names if (self.data / name / "test" / "vis").is_dir()]
        missing = [name for name in self.sets if name not in there]
        if missing or not there:
            raise ValueError(
                f"{self.data} holds no {' and no '.join(f'{n}/test/vis' for n in missing or names)}"
            )
        return there
