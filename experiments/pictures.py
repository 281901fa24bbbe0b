"""Pictures of what several runs scored."""

from collections.abc import Sequence
from pathlib import Path

from experiments.tasks.task import Score
from lora_jax.evaluate import Accuracy


def bars(path: str | Path, scores: Sequence[tuple[str, Score, Score]]) -> bool:
    """Draw (name, before, after) as bars with intervals, `before` as a mark; False, no matplotlib.

    Bars start at zero.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 1.2 + 0.5 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    percent = all(isinstance(after, Accuracy) for _, _, after in scores)
    scale = 100.0 if percent else 1.0
    for place, (_, before, after) in enumerate(scores):
        drawn = axes.barh(place, scale * after.value, height=0.6, xerr=_arms(after, scale))
        drawn[0].set_color("#9ecae1")
        words = f"{scale * after.value:.1f}" if percent else f"{after.value:.4g}"
        axes.text(0, place, f"  {words}", va="center")
        line = axes.vlines(scale * before.value, place - 0.4, place + 0.4, "0.2", "dashed")
        if not place:
            line.set_label("before training")
    axes.set_yticks(range(len(scores)), [name for name, _, _ in scores])
    axes.invert_yaxis()
    axes.set_xlabel(scores[0][2].name + (", %" if percent else "") + "; 95 % intervals")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize="small")
    figure.savefig(path, format="png", dpi=120)
    return True


def _arms(score: Score, scale: float) -> list[list[float]] | None:
    """How far the interval reaches below and above."""
    if score.low is None or score.high is None:
        return None
    return [[scale * (score.value - score.low)], [scale * (score.high - score.value)]]
