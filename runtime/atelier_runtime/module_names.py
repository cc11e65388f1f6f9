"""Sets of module names in short: patterns with counts for people, one regular expression for machines.

A denoiser has hundreds of target modules that differ in the number of their block alone. Listed in full they bloat logs and the
metadata of exported files.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


def count_by_pattern(names: Iterable[str]) -> dict[str, int]:
    """`{"blocks.*.attn1.to_out.0": 30, ...}`: a number that varies within the set is a star."""
    counts = {}
    for skeleton, rows in _grouped(names).items():
        columns = [set(column) for column in zip(*rows, strict=True)]
        counts[_filled(skeleton, ["*" if len(column) > 1 else next(iter(column)) for column in columns])] = len(rows)
    return counts


def matching_expression(names: Collection[str], among: Collection[str]) -> str:
    """A regular expression that fully matches `names` and nothing else of `among`, which must contain them."""
    universe = _grouped(among)
    parts = []
    for skeleton, rows in sorted(_grouped(names).items()):
        everything = universe[skeleton]
        columns = [
            _column(set(chosen), set(every))
            for chosen, every in zip(zip(*rows, strict=True), zip(*everything, strict=True), strict=True)
        ]
        expression = _filled(re.escape(skeleton).replace(r"\*", "*"), columns)
        matched = {row for row in everything if re.fullmatch(expression, _filled(skeleton, row))}
        if matched != rows:  # numbers that vary together, such as a block and its only layer
            expression = "|".join(re.escape(_filled(skeleton, row)) for row in sorted(rows))
        parts.append(expression)
    return "|".join(parts)


def _grouped(names: Iterable[str]) -> dict[str, set[tuple[str, ...]]]:
    """Names by skeleton, in which every number is a star, to the numbers of each name."""
    groups: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        groups[_NUMBER.sub("*", name)].add(tuple(_NUMBER.findall(name)))
    return groups


def _filled(skeleton: str, numbers: Iterable[str]) -> str:
    parts = iter(numbers)
    return re.sub(r"\*", lambda _: next(parts), skeleton)


def _column(chosen: set[str], every: set[str]) -> str:
    """Expression for one number of a skeleton."""
    if len(chosen) == 1:
        return next(iter(chosen))
    if chosen == every:
        return r"\d+"
    return f"(?:{'|'.join(sorted(chosen, key=int))})"
