"""Sets of module names in short: patterns with counts for people, one regular expression for machines.

A denoiser has hundreds of target modules that differ in the number of their block alone. Listed in full they bloat logs and the
metadata of exported files.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")
Numbers = tuple[str, ...]


def matched(target: str, names: Iterable[str], presets: Mapping[str, Sequence[str]]) -> set[str]:
    """Those of `names` that a target of an adapter is for: a preset's by their last parts, or what a regular expression fully matches.

    Raises re.error for what is neither.
    """
    if target in presets:
        suffixes = tuple(f".{suffix}" for suffix in presets[target])
        return {name for name in names if name.endswith(suffixes)}
    expression = re.compile(target)
    return {name for name in names if expression.fullmatch(name)}


def count_by_pattern(names: Iterable[str]) -> dict[str, int]:
    """`{"blocks.*.attn1.to_out.0": 30, ...}`: a number that varies within the set is a star."""
    counts = {}
    for skeleton, rows in _by_skeleton(names).items():
        columns = [set(column) for column in zip(*rows, strict=True)]
        counts[_filled(skeleton, ["*" if len(column) > 1 else min(column) for column in columns])] = len(rows)
    return counts


def matching_expression(names: Iterable[str]) -> str:
    """A regular expression that fully matches `names` and no other name: `blocks\\.(?:0|1)\\.(?:attn\\.to_k|attn\\.to_q)|...`."""
    tails: dict[str, list[str]] = defaultdict(list)
    for skeleton, rows in sorted(_by_skeleton(names).items()):
        for head, tail in _expressions(skeleton, rows):
            tails[head].append(tail)
    return "|".join(head + (found[0] if len(found) == 1 else f"(?:{'|'.join(found)})") for head, found in tails.items())


def _by_skeleton(names: Iterable[str]) -> dict[str, set[Numbers]]:
    """Names by skeleton, in which every number is a star, to the numbers of each name."""
    groups: dict[str, set[Numbers]] = defaultdict(set)
    for name in names:
        groups[_NUMBER.sub("*", name)].add(tuple(_NUMBER.findall(name)))
    return groups


def _filled(skeleton: str, numbers: Iterable[str]) -> str:
    parts = iter(numbers)
    return re.sub(r"\*", lambda _: next(parts), skeleton)


def _expressions(skeleton: str, rows: set[Numbers]) -> list[tuple[str, str]]:
    """(head, tail) of the expressions for `rows`; the head ends with the last number that varies."""
    columns = [sorted(set(column), key=int) for column in zip(*rows, strict=True)]
    if math.prod(len(column) for column in columns) != len(
        rows
    ):  # blocks of unequal depth: one expression for each value
        first = next(i for i, column in enumerate(columns) if len(column) > 1)
        return [
            found
            for value in columns[first]
            for found in _expressions(skeleton, {row for row in rows if row[first] == value})
        ]
    skeleton = _filled(skeleton, ["*" if len(column) > 1 else column[0] for column in columns])
    head, star, tail = skeleton.rpartition("*")
    varying = (f"(?:{'|'.join(column)})" for column in columns if len(column) > 1)
    return [(_filled(re.escape(head + star).replace(r"\*", "*"), varying), re.escape(tail))]
