"""Softmax of a panel's logits, forward and back, a register full at a time: see `softmax_loops`.

C logits of a panel, in registers of L. Arguments are addresses, numbers in float32 if not said otherwise.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ulmfit.nn.kinds import KINDS
from ulmfit.nn.lanes import Lanes, of_addresses
from ulmfit.nn.register_tiles import COLUMNS, LANES, PART

LOWEST = -1e30  # less than any logit; differences of two such numbers are numbers


@cache
def exponentials() -> Any:
    """For compiled loops: products (C,), bias (C,); of their sums, logits, the largest, and the sum of e^(logit - it).

    The powers of e take the products' place.
    """

    def generate(builder: Any, products: Any, bias: Any, largest: Any, total: Any) -> None:
        v = Lanes(builder, LANES)
        logits = [builder.fadd(v.load(products, n), v.load(bias, n)) for n in range(COLUMNS // LANES)]
        first, *others = logits
        for each in others:
            first = v.larger(each, first)
        most = v.most(first)
        everywhere, sums = v.filled(most), v.number(0)
        for n, each in enumerate(logits):
            power = v.power(builder.fsub(each, everywhere))
            v.store(power, products, n)
            sums = builder.fadd(sums, power)
        v.store_one(most, largest)
        v.store_one(v.sum(sums), total)

    return of_addresses(4, generate)


@cache
def merge() -> Any:
    """For compiled loops: largest logits (L,) and their sums (L,), and those of others, of which they become part."""

    def generate(builder: Any, largest: Any, total: Any, of_all: Any, total_of_all: Any) -> None:
        v = Lanes(builder, LANES)
        parts = [(v.load(largest), v.load(total)), (v.load(of_all), v.load(total_of_all))]
        most = v.larger(parts[0][0], parts[1][0])
        one, other = (builder.fmul(sums, v.power(builder.fsub(each, most))) for each, sums in parts)
        v.store(most, of_all)
        v.store(builder.fadd(one, other), total_of_all)

    return of_addresses(4, generate)


@cache
def whole() -> Any:
    """For compiled loops: largest logits (L,) and their sums (L,); the largest of all, and all sums in its terms."""

    def generate(builder: Any, largest: Any, sums: Any, of_all: Any, total: Any) -> None:
        v = Lanes(builder, LANES)
        each = v.load(largest)
        most = v.most(each)
        v.store_one(most, of_all)
        v.store_one(v.sum(builder.fmul(v.load(sums), v.power(builder.fsub(each, v.filled(most))))), total)

    return of_addresses(4, generate)


@cache
def shares() -> Any:
    """For compiled loops: largest logits (L,), the largest of all, 1 / sum of all; what powers of e are worth (L,)."""

    def generate(builder: Any, largest: Any, of_all: Any, one_over_sum: Any, worth: Any) -> None:
        v = Lanes(builder, LANES)
        power = v.power(builder.fsub(v.load(largest), v.everywhere(of_all)))
        v.store(builder.fmul(power, v.everywhere(one_over_sum)), worth)

    return of_addresses(4, generate)


@cache
def gradients(kind: str) -> Any:
    """For compiled loops: what `kind` multiplies at once of the probabilities, of one row or of two.

    Arguments: `exponentials` (C,) of the one and of the other row, and what each is worth there; probabilities (C,) of
    both in numbers of `kind`, and beside each other, all filled in; bias (C,), to which they are added. Of "fp32" there
    is one row; what is beside another may take its powers' place. Parts of pairs are a step of a tile apart.
    """
    pairs, parts = KINDS[kind].neighbours > 1, KINDS[kind].parts

    def generate(
        builder: Any, one: Any, other: Any, worth: Any, of_other: Any, out: Any, other_out: Any, both: Any, bias: Any
    ) -> None:
        v = Lanes(builder, LANES)
        rows = [(one, v.everywhere(worth)), (other, v.everywhere(of_other))]
        for n in range(COLUMNS // LANES):
            found = [builder.fmul(v.load(at, n), share) for at, share in (rows if pairs else rows[:1])]
            total = v.load(bias, n)
            for each in found:
                total = builder.fadd(total, each)
            v.store(total, bias, n)
            for each, at in zip(found, (out, other_out), strict=False):
                v.store_as(kind, each, at, n)
            if pairs:
                v.store_pairs(found[0], found[1], parts, both, PART, n)
            else:
                v.store(found[0], both, n)

    return of_addresses(8, generate)
