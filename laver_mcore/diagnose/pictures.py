"""Pictures of a reading: attention over the image, Gram matrices, states in two dimensions."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from laver_mcore.diagnose import measures
from laver_mcore.diagnose.reading import Reading
from laver_mcore.diagnose.reconstruction import Reconstruction


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def attention_maps(image: Image.Image, models: Mapping[str, Reading]) -> bytes:
    """The picture, and over it each layer's attention of the answer's first token; a row per model."""
    layers = max(len(reading.maps) for reading in models.values())
    figure = Figure(figsize=(1.7 * layers, 1.9 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), layers, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (name, reading) in zip(axes, models.items(), strict=True):
        for layer, (axis, weights) in enumerate(zip(row, reading.maps, strict=False), start=1):
            axis.imshow(image.convert("L"), cmap="gray", extent=(0, 1, 0, 1))
            axis.imshow(weights.view(reading.grid), alpha=0.5, cmap="magma", extent=(0, 1, 0, 1))
            axis.set_title(f"{name}, {layer}", fontsize=7)
    return _png(figure)


def gram_matrices(models: Mapping[str, Reading]) -> bytes:
    """Cosines of the picture's tokens in the last layer."""
    figure = Figure(figsize=(2.6 * len(models), 2.8), layout="constrained")
    for axis, (name, reading) in zip(
        figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True
    ):
        shown = axis.imshow(measures.gram(reading.visual[-1]), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(name, fontsize=8)
        figure.colorbar(shown, ax=axis, shrink=0.7)
    return _png(figure)


def reconstructions(reconstruction: Reconstruction, most: int = 8) -> bytes:
    """Pictures, what the student saw of them, and the teacher's tokens nearest to what it made of the rest."""
    shown = reconstruction.pictures()[:most]
    figure = Figure(figsize=(1.5 * len(shown) + 0.6, 5.0), layout="constrained")
    axes = figure.subplots(3, len(shown), squeeze=False)
    for row, (line, title) in enumerate(zip(axes, ("picture", "seen", "nearest"), strict=True)):
        for axis, pictures in zip(line, shown, strict=True):
            axis.imshow(pictures[row], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, fontsize=8)
    return _png(figure)


def _principal(states_ND: torch.Tensor) -> np.ndarray:
    """Coordinates along the two directions of largest variance."""
    centred = states_ND.double() - states_ND.double().mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    return (left[:, :2] * values[:2]).numpy()


def scatter(models: Mapping[str, Sequence[Reading]], seed: int = 0) -> bytes:
    """Visual and text states of the last layer by PCA and by t-SNE; a row per model."""
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(7, 3.2 * len(models)), layout="constrained")
    for row, (name, readings) in zip(
        figure.subplots(len(models), 2, squeeze=False), models.items(), strict=True
    ):
        kinds = [torch.cat([getattr(r, kind)[-1] for r in readings]) for kind in ("visual", "text")]
        states = torch.cat(kinds)
        nearby = min(30.0, (len(states) - 1) / 3)
        tsne = TSNE(perplexity=nearby, init="pca", random_state=seed).fit_transform(states.numpy())
        for axis, title, places in zip(row, ("PCA", "t-SNE"), (_principal(states), tsne), strict=True):
            for kind, start, part in (("visual", 0, kinds[0]), ("text", len(kinds[0]), kinds[1])):
                axis.scatter(*places[start : start + len(part)].T, s=6, label=kind)
            axis.set_title(f"{name}: {title}", fontsize=8)
        row[0].legend(fontsize=7)
    return _png(figure)
