"""Plausible mistakes in lesson 6's exercises; its tests have to notice each."""

import math


def e1_wilson__plus_and_minus(correct, rows):
    p = correct / rows
    half = 1.96 * math.sqrt(p * (1 - p) / rows)
    return p - half, p + half


def e1_wilson__half_not_divided(correct, rows):
    z, p = 1.96, correct / rows
    middle = (p + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z * math.sqrt(p * (1 - p) / rows + z**2 / (4 * rows**2))
    return middle - half, middle + half


def e1_rows_needed__rounded(accuracy, half_width):
    return round(1.96**2 * accuracy * (1 - accuracy) / half_width**2)


def e1_rows_needed__width_not_squared(accuracy, half_width):
    return math.ceil(1.96**2 * accuracy * (1 - accuracy) / half_width)


def e2_flips__every_change(before, after, truth):
    changed = [(new, true) for old, new, true in zip(before, after, truth) if old != new]
    fixed = sum(new == true for new, true in changed)
    return fixed, len(changed) - fixed


def e2_flips__right_after_and_before(before, after, truth):
    return sum(a == t for a, t in zip(after, truth)), sum(b == t for b, t in zip(before, truth))


def e2_chance__one_sided(fixed, broken):
    n = fixed + broken
    return sum(math.comb(n, k) for k in range(min(fixed, broken) + 1)) / 2**n


def e2_chance__of_this_split_alone(fixed, broken):
    return math.comb(fixed + broken, fixed) / 2 ** (fixed + broken)


def e2_chance__above_one(fixed, broken):
    n = fixed + broken
    return 2 * sum(math.comb(n, k) for k in range(min(fixed, broken) + 1)) / 2**n


def e3_leaked__word_by_word(train, held_out):
    seen = set(train)
    return [place for place, text in enumerate(held_out) if text in seen]


def e3_leaked__only_case(train, held_out):
    seen = {text.lower().strip() for text in train}
    return [place for place, text in enumerate(held_out) if text.lower().strip() in seen]


def e3_stop_at__compared_with_the_one_before(points, patience):
    rises, seen = 0, []
    for point in points:
        rises = rises + 1 if seen and point[1] >= seen[-1][1] else 0
        seen.append(point)
        if rises == patience:
            break
    return seen[-1][0], min(seen, key=lambda point: point[1])[0]


def stopped(points, patience):
    """The right step to stop at."""
    best, waited = math.inf, 0
    for step, loss in points:
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == patience:
            return step
    return points[-1][0]


def e3_stop_at__saves_the_last(points, patience):
    return stopped(points, patience), stopped(points, patience)


def e3_stop_at__best_of_all(points, patience):
    return stopped(points, patience), min(points, key=lambda point: point[1])[0]
