"""Quality measures of fused and restored images, as batched torch functions with named conventions.

Fusion papers print "SSIM" or "PSNR" by definitions that differ several times on the same image; here each
function says which one it is, and takes the others by name:

- ``"standard"``: what the publication of the measure, or most image processing software, means by it.
- ``"vifb"``: the benchmark VIFB of Zhang et al. (colour is measured channel by channel there).
- ``"tang"``: the MATLAB code of Tang et al. ("General Evaluation Metric", that of 2026; in the one
  that came with SeAFusion, SSIM is another measure, MEF-SSIM).
- ``"cddfuse"``: the Python evaluator of CDDFuse, which many later repositories copy.

Measures whose documentation shows no table are the same in all of them. What they take and give is alike:

- An image is Tensor[B, 1, H, W], or Tensor[H, W] for a batch of one; all images of a call have one shape.
  Floating values are in [0, 1], integer values in [0, 255]. Colour images are measured on their luminance
  (:func:`ddrf_fast.data.rgb_to_ycbcr`).
- The result is Tensor[B], one value for each image; a data set's figure is the mean over its images.
- Inside, values are in [0, 255]. float32, float16 and bfloat16 images are computed in float32, uint8 and
  float64 images in float64; autocast changes nothing.
- ValueError or TypeError names an image of another shape, dtype or range.
"""

from ddrf_fast.metrics._images import CONVENTIONS, Convention
from ddrf_fast.metrics.edges import qabf
from ddrf_fast.metrics.evaluate import (
    FUSION_METRICS,
    MEASURES,
    RESTORATION_METRICS,
    Measure,
    check_metrics,
    evaluate,
    evaluate_restored,
    paper_mean,
)
from ddrf_fast.metrics.fidelity import psnr, ssim
from ddrf_fast.metrics.information import entropy, mutual_information
from ddrf_fast.metrics.naturalness import niqe
from ddrf_fast.metrics.sharpness import average_gradient, spatial_frequency, standard_deviation
from ddrf_fast.metrics.visual_information import vif, viff

__all__ = [
    "CONVENTIONS",
    "FUSION_METRICS",
    "MEASURES",
    "RESTORATION_METRICS",
    "Convention",
    "Measure",
    "average_gradient",
    "check_metrics",
    "entropy",
    "evaluate",
    "evaluate_restored",
    "mutual_information",
    "niqe",
    "paper_mean",
    "psnr",
    "qabf",
    "spatial_frequency",
    "ssim",
    "standard_deviation",
    "vif",
    "viff",
]
