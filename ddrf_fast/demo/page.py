"""The page to try the network: two images in, fused and restored ones out, degraded beforehand if wished.

It is served to the machine itself unless told otherwise, and neither it nor its server speaks to another
host.
"""

import contextlib
import html
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read when Gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.data import from_float
from ddrf_fast.data.thermal import ThermalRange
from ddrf_fast.demo.sample import SAMPLE_INFRARED, SAMPLE_VISIBLE
from ddrf_fast.demo.trial import Damage, Trial, measure_fused, measure_restored, read, try_pair, unit
from ddrf_fast.inference import Fuser
from ddrf_fast.inference.pictures import Picture

Pixels = NDArray[np.uint8]

_COMPARISONS = {
    "Visible | fused": ("visible", "fused"),
    "Infrared | fused": ("infrared", "fused"),
    "Visible | restored": ("visible", "visible-restored"),
    "Infrared | restored": ("infrared", "infrared-restored"),
}
_PICTURES = {
    "Fused": "fused",
    "Restored visible": "visible-restored",
    "Restored infrared": "infrared-restored",
}
_BLURS = [
    ("None", "none"),
    ("Defocus", "isotropic"),
    ("In one direction", "anisotropic"),
    ("Camera shake", "motion"),
    ("All of them", "mixed"),
]
_THERMAL_RANGES = [
    ("As stored", "full"),
    ("1st to 99th percentile", "percentile"),
    ("Lowest to highest", "minmax"),
]
_UNITS = {"EN": "bit", "PSNR": "dB"}

_INTRODUCTION = """# Fuse a visible and an infrared image

One picture that shows what both cameras see. The two images must show the same view, pixel by pixel
(registered), and be of one size; 8 or 16 bit, grey or colour. A sample pair is loaded: ✕ makes room for
yours. Nothing is sent anywhere: all is computed by the machine that serves this page.
"""
_EXPLANATIONS = """
Fused images are measured against the two images as they were uploaded, before the page degraded them, and
with the thermal values that were chosen.
More is better in all of them, but noise raises EN and AG as well.

- **EN**, entropy: how much the grey values vary, in bit (0 to 8).
- **AG**, average gradient: how sharp or busy the picture is, in grey levels a pixel.
- **SSIM**, structural similarity to both sources (at most 1).
- **VIF**, visual information fidelity: how much of the sources' detail is in it.
- **PSNR**, closeness to both sources in grey value, in decibels.
- **Qabf**: how much of the sources' edges is in it (0 to 1).

Restored images are measured against the image that was uploaded. *Average of both* is the plainest fusion
there is, of the same images, to compare with.
"""
_CSS = """
.gradio-container { max-width: 1280px !important; }
#layout { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 8fr); grid-template-rows: auto 1fr;
  grid-template-areas: "inputs results" "damage results"; gap: 16px; }
#inputs { grid-area: inputs; }
#results { grid-area: results; }
#damage { grid-area: damage; }
@media (max-width: 800px) {
  #layout { grid-template-columns: minmax(0, 1fr); grid-template-areas: "inputs" "results" "damage"; }
}
.page-file .download { display: none; }
.page-tables { display: flex; flex-wrap: wrap; gap: 16px 40px; align-items: flex-start; }
.page-tables table { border: 0 !important; margin: 0 !important; font-variant-numeric: tabular-nums; }
.page-tables caption { text-align: left; font-weight: 600; padding: 0.4em 0; }
.page-tables tr { border: 0 !important; }
.page-tables :is(th, td) { padding: 0.25em 0.7em !important; text-align: right; font-weight: normal;
  border: 0 !important; border-top: 1px solid var(--border-color-primary) !important; }
.page-tables :is(th, td):first-child { text-align: left; padding-left: 0 !important; white-space: nowrap; }
.page-tables thead tr > * { border-top: 0 !important; vertical-align: bottom; max-width: 6em; }
.page-tables td { white-space: nowrap; }
@media (max-width: 480px) {
  .page-tables { font-size: 0.85em; }
  .page-tables :is(th, td) { padding: 0.25em 0.3em !important; }
}
.page-status { margin: 0; padding: 0.2em 0; }
.page-problem { padding: 0.6em 0.8em; border-radius: 6px; border: 1px solid #b91c1c; background: #fef2f2;
  color: #7f1d1d; overflow-wrap: anywhere; }
"""


def serve(
    fuser: Fuser, *, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = True
) -> None:
    """Serves the page until it is interrupted (Ctrl-C); prints its address.

    Args:
        fuser: the network, and its settings; its thermal range is what the page begins with.
        host: address to listen at; "0.0.0.0" lets the whole network use the page.
        port: to listen at; None: the first free one from 7860 on.
        open_browser: show the page in the user's browser.

    Raises:
        OSError: the port is taken.
    """
    # What people upload goes with the page.
    with tempfile.TemporaryDirectory(prefix="ddrf_fast_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            _check_address(host, port)
            _, address, _ = build_page(fuser).launch(
                server_name=host,
                server_port=port,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                footer_links=[],
                css=_CSS,
                theme=_theme(),
            )
        except OSError as error:
            where = f"{host}:{port}" if port is not None else host
            raise OSError(
                f"the page cannot be served at {where}: {error.strerror or 'no port is free'}"
            ) from error
        with contextlib.suppress(KeyboardInterrupt):
            print(f"{address}   (Ctrl-C ends it)", flush=True)
            threading.Event().wait()


def _check_address(host: str, port: int | None) -> None:
    """Raises an OSError where nothing can listen there; Gradio would try for minutes."""
    family = socket.getaddrinfo(host, None)[0][0]
    socket.create_server((host, port or 0), family=family).close()


def _theme() -> gr.themes.Base:
    """Gradio's own in blue, with fonts that need not be fetched and explanations that stand out enough."""
    theme = gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="ui-monospace")
    return theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")


def build_page(fuser: Fuser) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="ddrf_fast: fuse visible and infrared", analytics_enabled=False) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row(elem_id="layout"):
            with gr.Column(elem_id="inputs"):
                visible, visible_preview = _image_input("Visible image", SAMPLE_VISIBLE)
                infrared, infrared_preview = _image_input("Infrared image", SAMPLE_INFRARED)
                thermal = gr.Dropdown(
                    _THERMAL_RANGES, value=str(fuser.thermal_range), allow_custom_value=True,
                    label="Thermal values",
                    info="which become black and white; type 7000,9500 or 0.5%,99.5% for others",
                )  # fmt: skip
                fuse = gr.Button("Fuse", variant="primary", elem_id="fuse")
                status = gr.HTML(elem_id="status")
            with gr.Column(elem_id="results"):
                comparison = gr.Radio(
                    list(_COMPARISONS), value=next(iter(_COMPARISONS)), label="Compare: drag the line"
                )
                slider = gr.ImageSlider(
                    label="Before and after", show_label=False, format="png", max_height=640,
                    buttons=["fullscreen"], interactive=False, elem_id="slider",
                )  # fmt: skip
                with gr.Row():
                    pictures = [
                        gr.Image(
                            label=label, alt_text=label, format="png", min_width=200,
                            buttons=["download", "fullscreen"], interactive=False, elem_id=name,
                        )
                        for label, name in _PICTURES.items()
                    ]  # fmt: skip
                tables = gr.HTML(elem_id="tables")
                with gr.Accordion("What the measures mean", open=False):
                    gr.Markdown(_EXPLANATIONS)
            with gr.Column(elem_id="damage"):
                settings = _damage_controls()
        latest: gr.State = gr.State(time_to_live=3600)

        def run(
            visible: str | None, infrared: str | None, thermal: str, compared: str, *values: Any
        ) -> Iterator[Any]:
            try:
                trial = _try(fuser, visible, infrared, thermal, values)
                images = {name: _pixels(image) for name, image in trial.images.items()}
                shown = [images[name] for name in _PICTURES.values()]
                yield images, _compared(images, compared), *shown, _summary(trial, fuser), gr.skip()
                # Measuring takes longer than all the rest.
                yield *[gr.skip()] * (len(outputs) - 1), _tables(trial)
            except Exception as error:  # whatever is wrong with one pair must not cost the page
                yield None, None, *[None] * len(pictures), _problem(error), ""

        inputs = [visible, infrared, thermal, comparison, *settings]
        outputs = [latest, slider, *pictures, status, tables]
        page.load(run, inputs, outputs, api_visibility="private")
        fuse.click(run, inputs, outputs, api_visibility="private")
        gr.on(
            [control.change for control in (thermal, *settings)],
            run,
            inputs,
            outputs,
            trigger_mode="always_last",
            show_progress="minimal",
            api_visibility="private",
        )
        comparison.change(
            _compared, [latest, comparison], slider, show_progress="hidden", api_visibility="private"
        )
        for file, preview, chosen in (
            (visible, visible_preview, [visible]),
            (infrared, infrared_preview, [infrared, thermal]),
        ):
            file.change(_preview, chosen, [preview, status], show_progress="hidden", api_visibility="private")
        gr.on(
            [page.load, thermal.change],
            lambda *chosen: _preview(*chosen)[0],  # what there is to tell, the run tells
            [infrared, thermal],
            infrared_preview,
            show_progress="hidden",
            api_visibility="private",
        )
    return page


def _image_input(label: str, sample: Path) -> tuple[gr.File, gr.Image]:
    """Where a file is chosen or dropped, and how it looks; a browser cannot show every format itself."""
    with gr.Row():
        file = gr.File(
            str(sample), label=label, file_types=["image"], height=120, scale=3, min_width=150,
            elem_classes="page-file",
        )  # fmt: skip
        preview = gr.Image(
            str(sample), show_label=False, alt_text=label, format="png", interactive=False, height=120,
            buttons=["fullscreen"], scale=2, min_width=120,
        )  # fmt: skip
    return file, preview


def _damage_controls() -> list[Any]:
    """The controls of :class:`Damage`, in the order of its fields."""
    default = Damage()
    with gr.Accordion("See what it withstands: degrade the images first", open=True):
        modalities = gr.CheckboxGroup(
            [("Visible", "visible"), ("Infrared", "infrared")],
            value=list(default.modalities),
            label="Which image",
        )
        blur = gr.Radio(_BLURS, value=default.blur, label="Blur")
        strength = gr.Slider(
            0.2, 1.4, default.strength, step=0.1, label="Blur strength",
            info="1: a defocus of 0.7 to 2 pixels, a motion of 5 to 17 pixels",
        )  # fmt: skip
        spatial = gr.Checkbox(default.spatial, label="Blur varies over the image")
        noise = gr.Slider(
            0, 75, default.noise, step=1, label="Noise", info="standard deviation in grey levels of 255"
        )
        scale = gr.Radio(
            [("Full", 1), ("1/2", 2), ("1/3", 3), ("1/4", 4)], value=default.scale, label="Resolution",
            info="what is left of width and height, before the image is enlarged again",
        )  # fmt: skip
        darkness = gr.Slider(
            0, 100, 100 * default.darkness, step=5, label="Low light",
            info="how dark the visible scene is, in percent",
        )  # fmt: skip
        seed = gr.Number(
            default.seed, precision=0, minimum=0, maximum=2**31 - 1, label="Seed",
            info="another number draws another blur and other noise",
        )  # fmt: skip
    return [modalities, blur, strength, spatial, noise, scale, darkness, seed]


def _try(
    fuser: Fuser, visible: str | None, infrared: str | None, thermal: str, values: Sequence[Any]
) -> Trial:
    """Does what the controls say."""
    if not visible or not infrared:
        raise ValueError("choose a visible and an infrared image first")
    modalities, blur, strength, spatial, noise, scale, darkness, seed = values
    damage = Damage(tuple(modalities), blur, strength, spatial, noise, scale, darkness / 100, seed or 0)
    return try_pair(fuser, visible, infrared, damage, ThermalRange.parse(thermal))


def _summary(trial: Trial, fuser: Fuser) -> str:
    height, width = trial.images["fused"].shape[2:]
    device = f"the CPU (threads: {torch.get_num_threads()})" if fuser.device.type == "cpu" else fuser.device
    fused = f"Fused {width} × {height} pixels in {1e3 * trial.seconds['fuse']:.0f} ms on {device}."
    return _answer(fused, *_thermal_notes(trial.thermal))


def _thermal_notes(picture: Picture) -> Iterator[str]:
    """What became of the values of an infrared image, or ought to."""
    if picture.bounds:
        low, high = picture.bounds
        yield f"Infrared values from {low:g} to {high:g} became black to white."
    if picture.narrow:
        low, high = picture.narrow
        yield (
            f"The infrared image has 16 bit, but values from {low} to {high} only: choose “1st to 99th "
            "percentile” for its thermal values to spread them."
        )


def _preview(path: str | None, thermal: str | None = None) -> tuple[Pixels | None, str]:
    """How a chosen file looks, and what is wrong with it if it cannot be read.

    Args:
        path: of the file, if one is chosen.
        thermal: the thermal range, of an infrared image.
    """
    if not path:
        return None, ""
    try:
        picture = read(path, None if thermal is None else ThermalRange.parse(thermal))
        told = _answer("Press Fuse when both images are chosen.", *_thermal_notes(picture))
        return _pixels(unit(picture)), told
    except (ValueError, TypeError, OSError) as error:
        return None, _problem(error)


def _compared(images: Mapping[str, Pixels] | None, comparison: str) -> tuple[Pixels, Pixels] | None:
    """The pictures on the left and on the right of the line."""
    if images is None:
        return None
    before, after = _COMPARISONS[comparison]
    return images[before], images[after]


def _pixels(image: Tensor) -> Pixels:
    """Tensor[1, 1 | 3, H, W] as a browser shows it, [H, W] or [H, W, 3]."""
    values = from_float(image[0].permute(1, 2, 0).numpy())
    return values[..., 0] if values.shape[2] == 1 else values


def _answer(*sentences: str) -> str:
    return f'<p role="status" class="page-status">{html.escape(" ".join(sentences))}</p>'


def _problem(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, TypeError, OSError)):
        text = f"{type(error).__name__}: {text}"
    # Where the server keeps uploads says nothing to people.
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}\S*/", "", text)
    return f'<p role="alert" class="page-status page-problem">{html.escape(text)}</p>'


def _tables(trial: Trial) -> str:
    """Times and scores."""
    fused, restored = measure_fused(trial), measure_restored(trial)
    times = {"took": {name: 1e3 * value for name, value in trial.seconds.items()}}
    tables = [_table("Time", times, lambda name, value: f"{value:.1f} ms")]
    for caption, scores in (("Fused image", fused), ("Restored images", restored)):
        if scores:
            tables.append(_table(caption, scores, _score))
    if not fused:
        tables.append("<p>Images this small cannot be measured.</p>")
    return f'<div class="page-tables">{"".join(tables)}</div>'


def _score(name: str, value: float) -> str:
    return f"{value:.2f}" if name in ("EN", "AG", "PSNR") else f"{value:.3f}"


def _table(
    caption: str, columns: Mapping[str, Mapping[str, float]], form: Callable[[str, float], str]
) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    lines = []
    for name in next(iter(columns.values())):
        unit = f", {_UNITS[name]}" if name in _UNITS else ""
        cells = "".join(f"<td>{form(name, values[name])}</td>" for values in columns.values())
        lines.append(f'<tr><th scope="row">{name}{unit}</th>{cells}</tr>')
    return (
        f"<table><caption>{caption}</caption><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )
