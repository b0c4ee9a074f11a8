"""Mean average precision once more, plain and slow, as a reference for the vectorised one."""

from __future__ import annotations

from collections.abc import Mapping

Row = tuple[float, float, int, float]  # start, end, class, score
Stretch = tuple[float, float]


def tiou(a: Row, b: Row) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / union if union > 0 else 0.0


def average_precision(
    truth: Mapping[str, list[Row]],
    predictions: Mapping[str, list[Row]],
    label: int,
    threshold: float,
    ambiguous: Mapping[str, list[Stretch]],
) -> float:
    instances = {n: [r for r in rows if r[2] == label] for n, rows in truth.items()}
    count = sum(map(len, instances.values()))
    # All predictions by falling score; of equal ones those of earlier recordings come first.
    order = [(row, name) for name in truth for row in predictions.get(name, []) if row[2] == label]
    order.sort(key=lambda pair: -pair[0][3])
    taken: set[tuple[str, int]] = set()
    precision, recall = [], []
    hits = misses = 0
    for row, name in order:
        best, best_tiou = None, threshold
        for n, instance in enumerate(instances[name]):
            overlap = tiou(row, instance)
            free = (name, n) not in taken
            if free and (overlap > best_tiou or (best is None and overlap >= threshold)):
                best, best_tiou = n, overlap
        if best is not None:
            taken.add((name, best))
            hits += 1
        elif any(min(row[1], e) - max(row[0], s) > 0 for s, e in ambiguous.get(name, [])):
            continue
        else:
            misses += 1
        precision.append(hits / (hits + misses))
        recall.append(hits / count)
    area = previous = 0.0
    for n, reached in enumerate(recall):
        area += (reached - previous) * max(precision[n:])
        previous = reached
    return area


def mean_average_precision(
    truth: Mapping[str, list[Row]],
    predictions: Mapping[str, list[Row]],
    thresholds: list[float],
    ambiguous: Mapping[str, list[Stretch]],
) -> dict[float, float]:
    labels = sorted({row[2] for rows in truth.values() for row in rows})
    if not labels:
        return dict.fromkeys(thresholds, 0.0)
    return {
        threshold: sum(
            average_precision(truth, predictions, label, threshold, ambiguous) for label in labels
        )
        / len(labels)
        for threshold in thresholds
    }
