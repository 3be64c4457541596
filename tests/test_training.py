"""Training on real pairs: it learns, repeats itself, and writes a file that loads."""

import shutil

import pytest
import torch

from ddrf_fast.models import load_model, read_metadata
from ddrf_fast.training import TrainingConfig, train
from ddrf_fast.training.crops import RandomCrops, ValidationCrops, load_pairs
from ddrf_fast.training.module import TrainingModule

pytest.importorskip("lightning")
TINY = {"crop": 32, "batch_size": 2, "width": 8, "num_kernels": 2, "device": "cpu", "progress_bar": False}


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """Three real pairs."""
    target = tmp_path_factory.mktemp("pairs")
    for kind in ("ir", "vis"):
        (target / kind).mkdir()
        for path in sorted((data_dir / "roadscene" / "train" / kind).iterdir())[:3]:
            shutil.copy(path, target / kind)
    return str(target)


def test_crops_repeat_and_stay_registered(folder):
    pairs, kept = load_pairs([folder], 32, 1)
    assert len(pairs) == 2 and len(kept) == 1 and kept[0].name not in [pair.name for pair in pairs]
    crops = RandomCrops(pairs, 32, 20, seed=1)
    assert all(image.shape == (1, 32, 32) for image in crops[3])
    for first, second in zip(crops[3], RandomCrops(pairs, 32, 20, seed=1)[3], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(crops[3][0], crops[4][0])
    # The same image as all three: whatever is cut and turned, it stays so.
    same = [pair._replace(images=pair.images[:1].expand(3, -1, -1, -1)) for pair in pairs]
    for item in RandomCrops(same, 32, 20, seed=1):
        assert torch.equal(item[0], item[1]) and torch.equal(item[0], item[2])
    assert max(ValidationCrops(kept)[0][0].shape) <= 256


def test_unfit_data_is_told(folder, tmp_path):
    with pytest.raises(ValueError, match="at least one folder"):
        load_pairs([], 32, 1)
    with pytest.raises(ValueError, match="smaller than the crop of 1024"):
        load_pairs([folder], 1024, 1)
    with pytest.raises(ValueError, match="leave none"):
        load_pairs([folder], 32, 3)
    with pytest.raises(ValueError, match="crop must be even"):
        TrainingConfig(crop=33)


def test_known_parts_of_the_degradations():
    module = TrainingModule(
        TrainingConfig(sharp_fraction=1.0, noiseless_fraction=1.0, width=8, num_kernels=2)
    )
    image = torch.rand(2, 1, 32, 32)
    for spatial in (False, True):
        degraded, codes, recipe = module.degradation(image, seed=0, spatial=spatial)
        torch.testing.assert_close(degraded, image)
    # The network knows the basis in which its codes are given.
    torch.testing.assert_close(
        module.model.encode(recipe.kernels[:, 0], torch.zeros(2)), codes[:, :, 0, 0], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("spatial_fraction", [0.0, 1.0])
def test_overfits_one_batch(folder, spatial_fraction):
    torch.manual_seed(0)
    config = TrainingConfig(spatial_fraction=spatial_fraction, **TINY)
    module = TrainingModule(config)
    crops = RandomCrops(load_pairs([folder], 32, 0)[0], 32, 2, seed=0)
    batch = [torch.stack(images) for images in zip(*crops, strict=True)]
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    history = []
    for _ in range(40):
        losses = module.losses(*batch, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append(losses["loss"].item())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert history[-1] < 0.85 * history[0]


def test_training_writes_repeatable_weights_and_their_record(folder, tmp_path):
    paths = [
        train(
            TrainingConfig(data=(folder,), output=str(tmp_path / name), steps=3, validation_pairs=1, **TINY)
        )
        for name in ("first.safetensors", "second.safetensors")
    ]
    first, second = (load_model(path) for path in paths)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    config, record = read_metadata(paths[0])
    assert config.width == 8 and record["steps"] == 3 and len(record["loss_curve"]) == 3
    assert record["config"]["seed"] == 0 and len(record["training_pairs"]) == 2
    assert record["validation"]["restored_visible_psnr"] > 5
    images = [torch.rand(1, 1, 20, 20)] * 2
    assert torch.equal(first(*images).fused, second(*images).fused)
