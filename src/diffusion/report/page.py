"""The report stage: every figure of a run, and one page that shows them with the scores."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from diffusion import paths
from diffusion.atomic import write_text
from diffusion.config import DiffusionConfig, ModelConfig
from diffusion.data.dataset import real_images
from diffusion.data.npz import load_samples
from diffusion.errors import UserError
from diffusion.metrics.names import shown
from diffusion.model.schedules import configured_schedule
from diffusion.model.unet import UNet
from diffusion.params_file import checked
from diffusion.report import diagrams, figures
from diffusion.sampling import panels

NOISED_IMAGES = 5
SHOWN_PREVIEWS = 6

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Diffusion: report</title>
<style>
  :root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --line: #d8dee4; --paper: #fff; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --paper: #0d1117; }
  }
  body { margin: 2rem auto; max-width: 72rem; padding: 0 1.25rem; background: var(--paper); color: var(--ink);
         font: 16px/1.5 system-ui, sans-serif; }
  h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
  p, dt, figcaption { color: var(--faint); } img { max-width: 100%; height: auto; border-radius: 6px; }
  dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; margin: 1.5rem 0; }
  dt { font-size: .85rem; } dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
  .row { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.25rem; margin: 1.25rem 0; }
  figure { margin: 0; }
  table { border-collapse: collapse; font-size: .9rem; margin-bottom: 1.5rem; }
  td, th { text-align: left; padding: .25rem 1.5rem .25rem 0;
  border-bottom: 1px solid var(--line); font-weight: normal; } th { color: var(--faint); }
</style>
<h1>Diffusion</h1>
<p>{{ summary }}</p>
<dl>{% for name, value in headline %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% for title, picture in pictures %}
<h2>{{ title }}</h2>
<img src="{{ picture }}" alt="{{ title }}">
{% endfor %}
{% if previews %}
<h2>During training</h2>
<p>Samples of the averaged weights from the same noise, and stages of their denoising.</p>
{% endif %}
{% for kind, row in previews %}
<div class="row">
{% for name, picture in row %}
<figure><img src="{{ picture }}" alt="{{ kind }}, {{ name }}" loading="lazy">
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
<h2>How the scores were made</h2>
{% for rows in about %}
<table>
{% for key, value in rows %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endfor %}
</html>
""")


def write_page(card: dict[str, Any], folder: Path) -> None:
    """All of report/; network and schedule are the ones of the model that drew, which params.yaml may not have."""
    evaluated, imported = read_json(paths.EVALUATE_METRICS), card.get("weights") == "imported"
    scores = {name: value for name, value in evaluated.items() if name != "about"}
    real, generated = real_images("train"), load_samples(paths.SAMPLES_NPZ)
    diffusion, net = _made_with(card)
    distances = {about["metric"] for about in evaluated["about"] if about.get("measure") == "frechet"}
    comparison = ", ".join(f"{name} {shown(scores[name])}" for name in sorted(distances & scores.keys()))
    figures.schedules(diffusion, folder / "schedules.png")
    figures.noising_strip(real[:NOISED_IMAGES], configured_schedule(diffusion), folder / "noising.png")
    figures.save(diagrams.schedules_noising_figure(real[0], diffusion.num_steps), folder / "noising_by_schedule.png")
    figures.save(diagrams.unet_figure(net), folder / "unet.png")
    figures.comparison(real, generated, comparison, folder / "real_and_generated.png")
    pictures = {
        "Real and generated": folder / "real_and_generated.png",
        **_copies(evaluated["about"], real, generated),
        "From noise to image": paths.SAMPLES / "denoising.png",
        **_of_classes(),
        **({} if imported else _curves(folder)),
        "The forward process": folder / "noising.png",
        "Noise schedules": folder / "schedules.png",
        "Noise by schedule": folder / "noising_by_schedule.png",
        "The network": folder / "unet.png",
    }
    page = PAGE.render(
        summary=f"{diffusion.schedule} schedule, {diffusion.prediction} prediction, {len(generated):,} samples",
        headline=[
            *((name, shown(value)) for name, value in scores.items()),
            *([] if imported else _of_training(read_json(paths.TRAIN_METRICS))),
            ("parameters", f"{sum(p.numel() for p in net.parameters()):,}"),
        ],
        pictures=[(title, _embedded(path)) for title, path in pictures.items()],
        previews=[] if imported else _previews(),
        about=[_rows(details) for details in evaluated["about"]],
    )
    write_text(folder / "index.html", page)


def _made_with(card: dict[str, Any]) -> tuple[DiffusionConfig, UNet]:
    """The diffusion section and the network, with weights of no meaning, of the model that drew the samples."""
    try:
        trained = card["trained"]
        diffusion, model = trained["diffusion"], trained["model"]
        return checked(DiffusionConfig, diffusion), UNet(checked(ModelConfig, model))
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{paths.SAMPLES_CARD} does not fit this version ({error}): run `dvc repro`") from None


def _curves(folder: Path) -> dict[str, Path]:
    """How the training went."""
    figures.loss_curve(_read_csv(paths.LOSS_CSV), _read_csv(paths.VAL_LOSS_CSV), folder / "loss.png")
    found = {"Loss": folder / "loss.png"}
    if rows := _read_csv(paths.FD_CSV):
        found["fd_lite0 during training"] = folder / "fd_lite0.png"
        figures.save(figures.distance_figure(rows), folder / "fd_lite0.png")
    return found


def _copies(about: list[dict[str, Any]], real: np.ndarray, generated: np.ndarray) -> dict[str, Path]:
    """The closest pairs of samples and training images, as each extractor sees them."""
    found = {}
    for one in about:
        if pairs := one.get("pairs"):
            path = paths.REPORT / f"{one['metric']}.png"
            samples, training = (generated[[p[0] for p in pairs]], real[[p[1] for p in pairs]])
            labels = [f"{distance:.2f}" for _, _, distance in pairs]
            figures.pairs(samples, training, labels, path)
            found[f"Samples above their nearest training images, {one['metric']} (below {one['threshold']:.2f})"] = path
    return found


def _of_classes() -> dict[str, Path]:
    """Pictures that only a conditional model has."""
    titles = {
        "Samples by class: a row each": paths.SAMPLES / "classes.png",
        f"Guidance {', '.join(f'{g:g}' for g in panels.GUIDANCES)}, the same noise": paths.SAMPLES / "guidance.png",
    }
    return {title: path for title, path in titles.items() if path.exists()}


def _of_training(trained: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("best validation loss", f"{trained['best_val_loss']:.4f}"),
        ("images seen", f"{trained['images_seen']:,}"),
        ("images per second", f"{trained['images_per_second']:,.0f}"),
        ("training time", f"{trained['train_seconds'] / 60:.1f} min"),
    ]


def _rows(details: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested details as flat rows."""
    rows: list[tuple[str, Any]] = []
    for key, value in details.items():
        if key == "pairs":  # they have a picture
            continue
        rows += _rows(value, f"{key} ") if isinstance(value, dict) else [(prefix + key.replace("_", " "), value)]
    return rows


def _previews() -> list[tuple[str, list[tuple[str, str]]]]:
    """A row of grids and a row of strips, of at most SHOWN_PREVIEWS steps evenly spread over the training."""
    grids = sorted(paths.PREVIEWS.glob("step_*[0-9].png"))
    picked = {round(i * (len(grids) - 1) / (SHOWN_PREVIEWS - 1)) for i in range(SHOWN_PREVIEWS)} if grids else set()
    shown = [grids[i] for i in sorted(picked)]
    names = [f"step {int(path.stem.split('_')[1]):,}" for path in shown]
    strips = [path.with_stem(f"{path.stem}_denoising") for path in shown]
    return [
        (kind, [(name, _embedded(path)) for name, path in zip(names, row, strict=True)])
        for kind, row in (("samples", shown), ("denoising", strips))
    ]


def _embedded(picture: Path) -> str:
    """A picture as a data URI: the page can be sent to somebody as one file."""
    try:
        return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{picture} cannot be read ({error.strerror}): run `dvc repro`") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): run `dvc repro`") from None
    return content


def _read_csv(path: Path) -> list[dict[str, float]]:
    try:
        with path.open() as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): run `dvc repro`") from None
