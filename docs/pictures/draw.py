"""The pictures of `docs/method.md`, from the engine's own functions: `python docs/pictures/draw.py [FOLDER]`.

mask.svg is the mask that the kernels' intervals mean, positions.svg the indices by which tokens are rotated,
schedules.svg what a run follows. `flow.svg` is drawn by hand.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from laver_mcore.data.sequence.layout import dialogue_layout
from laver_mcore.objectives.schedules import mask_ratio, momentum

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "laver_mcore", "svg.fonttype": "none", "font.size": 9})

HERE = Path(__file__).parent
TEXT, IMAGE, BLIND = "#4c72b0", "#dd8452", "#eeeeee"
# Two dialogues packed into one row: (tokens of text) and (rows, columns of an image), one after the other.
DIALOGUES = (
    (("text", 2), ("image", 3, 3), ("text", 3)),
    (("text", 1), ("image", 2, 2), ("text", 3)),
)


def mask(path: Path) -> None:
    """Who sees whom: causal in blue, later tokens of the same image in orange."""
    intervals = dialogue_layout(DIALOGUES).intervals
    lo, hi = intervals.row_lo_T[:, None].numpy(), intervals.row_hi_T[:, None].numpy()
    columns = np.arange(len(intervals))
    seen = (lo <= columns) & (columns < hi)
    picture = seen.astype(int) + (seen & (columns > columns[:, None]))
    figure, axes = plt.subplots(figsize=(4.4, 4.2))
    axes.imshow(picture, cmap=matplotlib.colors.ListedColormap([BLIND, TEXT, IMAGE]), interpolation="none")
    axes.set(xlabel="key", ylabel="query", xticks=[], yticks=[], title="two dialogues in one packed row")
    for x in columns[1:] - 0.5:
        axes.axhline(x, color="white", lw=0.6)
        axes.axvline(x, color="white", lw=0.6)
    save(figure, path)


def positions(path: Path) -> None:
    """(t, row, column) of text, an image of 3 x 3 tokens and text again."""
    values = dialogue_layout(DIALOGUES[:1]).positions_3S.numpy()
    figure, axes = plt.subplots(figsize=(6.4, 1.7))
    axes.imshow(values, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        axes.text(x, y, str(value), ha="center", va="center", color="white" if value < 4 else "black")
    axes.set(yticks=range(3), yticklabels=["t", "row", "column"], xticks=[0.5, 6, 12])
    axes.set_xticklabels(["text", "an image of 3 x 3 tokens", "text"])
    axes.tick_params(length=0)
    save(figure, path)


def schedules(path: Path) -> None:
    """Mask ratio and momentum over the paper's stage 2."""
    total, tokens_of_image = 6250, 729
    iterations = np.arange(total)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.4))
    for strategy, color in (("cosine", IMAGE), ("constant", TEXT)):
        masked = [int(mask_ratio(0.05, strategy, i, total) * tokens_of_image) for i in iterations]
        left.plot(iterations, masked, color=color, label=strategy)
        right.plot(iterations, [momentum(0.95, strategy, i, total) for i in iterations], color=color)
    left.set(title=f"masked of {tokens_of_image} tokens", xlabel="iteration")
    right.set(title="teacher's momentum", xlabel="iteration")
    left.legend(frameon=False)
    save(figure, path)


def save(figure: "plt.Figure", path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main(folder: Path) -> None:
    for draw in (mask, positions, schedules):
        draw(folder / f"{draw.__name__}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
