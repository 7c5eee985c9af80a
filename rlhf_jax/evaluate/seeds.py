"""Several seeds as one: the mean of each number, and Student's 95% interval where there are enough."""

from typing import Any

import numpy as np

from rlhf_jax.evaluate import interval


def rows(runs):
    """Rows of metrics of K runs as one list: means, and `<name>_ci95`, the half-width of their interval.

    A name is kept in a row where every run has it; "alarms" counts the runs.
    """
    return [_row(together) for together in zip(*runs, strict=True)]


def _row(together):
    row = {"step": together[0]["step"], "time": sum(each["time"] for each in together)}
    for name in together[0].keys() & set.intersection(*(set(each) for each in together)) - {"step", "time"}:
        values_K = np.array([each[name] for each in together], np.float64)
        if name.endswith("/alarms"):
            row[name] = float(values_K.sum())
            continue
        row |= {name: float(values_K.mean()), f"{name}_ci95": half_width(values_K)}
    return row


def numbers(summaries, stage):
    """The numbers of K summaries as one: means, the interval of a gain over seeds, and each seed's under "seeds"."""
    names = [name for name in summaries[0] if name.startswith(f"{stage}/")]
    plain = [name for name in names if all(isinstance(summary.get(name), int | float) for summary in summaries)]
    values = {name: np.array([summary[name] for summary in summaries], np.float64) for name in plain}
    merged: dict[str, Any] = {name: float(values_K.mean()) for name, values_K in values.items()}
    for name in (name for name in plain if name.endswith("_gain")):
        half = half_width(values[name])
        merged[name.replace("_gain", "_ci95")] = (merged[name] - half, merged[name] + half)
    merged[f"{stage}/seeds"] = {name.split("/")[1]: values_K.tolist() for name, values_K in values.items()}
    return merged


def half_width(values_K):
    """Half the width of the 95% interval of the mean of K values (Student's t); 0 of a single one."""
    return float(values_K.std(ddof=1) * interval.t95(len(values_K))) if len(values_K) > 1 else 0.0
