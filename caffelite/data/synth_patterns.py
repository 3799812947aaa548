"""The shapes and textures that the synthetic classes are made of, as signed distances drawn for many images at once.

A pattern is a function of local coordinates `u`, `v` (n, size, size) and a generator; it returns an array of that shape,
negative inside the figure (or on the foreground of the texture), in units of `u` and `v`. Shapes fill a circle of radius 1;
textures repeat with period 1. A distance needs to be right near zero only, where it becomes a soft edge one pixel wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Field = Any  # a float32 array (n, size, size), or (n, 1, 1) for one number an image; Python's own numbers do not widen it
Pattern = Callable[[Field, Field, np.random.Generator], Field]

TURN = 2 * math.pi


def uniform(rng: np.random.Generator, count: int, low: float, high: float) -> Field:
    """One draw an image, shaped (count, 1, 1)."""
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _box(u: Field, v: Field, half_width: Field, half_height: Field) -> Field:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _cell(x: Field) -> Field:
    """Distance from the middle of the unit cell that x lies in, -0.5 to 0.5."""
    return x - np.floor(x) - 0.5


# --- shapes ------------------------------------------------------------------------------------------------------------


def ring(u: Field, v: Field, rng: np.random.Generator) -> Field:
    width = uniform(rng, len(u), 0.14, 0.26)
    return np.abs(np.hypot(u, v) - (1 - width)) - width


def star(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Five points: the plane folded onto one tenth of a turn, cut by the edge from an outer to an inner corner."""
    sector = TURN / 5
    angle = np.abs(np.mod(np.arctan2(v, u), sector) - sector / 2)  # 0 in the valley, sector / 2 at the point
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    inner = uniform(rng, len(u), 0.38, 0.48)
    point_x, point_y = math.cos(sector / 2), math.sin(sector / 2)
    edge_x, edge_y = point_x - inner, point_y
    return ((x - inner) * edge_y - y * edge_x) / np.hypot(edge_x, edge_y)


def cross(u: Field, v: Field, rng: np.random.Generator) -> Field:
    arm = uniform(rng, len(u), 0.2, 0.36)
    return np.minimum(_box(u, v, 1.0, arm), _box(u, v, arm, 1.0))


def triangle(u: Field, v: Field, rng: np.random.Generator) -> Field:
    third = TURN / 3
    angle = np.mod(np.arctan2(v, u), third) - third / 2
    return np.hypot(u, v) * np.cos(angle) - 0.52


def crescent(u: Field, v: Field, rng: np.random.Generator) -> Field:
    shift = uniform(rng, len(u), 0.4, 0.55)
    return np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - shift, v))


def heart(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """A square on its corner with half discs on its two upper sides."""
    half = 0.5
    x, y = (u + v) * 0.70710678, (v - u) * 0.70710678
    x, y = x + 0.2, y + 0.2
    lobes = np.minimum(np.hypot(x - half, y) - half, np.hypot(x, y - half) - half)
    return np.minimum(_box(x, y, half, half), lobes)


def arrow(u: Field, v: Field, rng: np.random.Generator) -> Field:
    neck = uniform(rng, len(u), -0.05, 0.2)
    width = uniform(rng, len(u), 0.14, 0.24)
    head = np.maximum(neck - u, (np.abs(v) - (1 - u) * 0.85) * 0.76)
    shaft = np.maximum(np.abs(u - (neck - 1) / 2) - (neck + 1) / 2 - 0.02, np.abs(v) - width)
    return np.minimum(head, shaft)


def flower(u: Field, v: Field, rng: np.random.Generator) -> Field:
    petals = rng.integers(6, 9, (len(u), 1, 1)).astype(np.float32)
    radius = 0.78 + 0.2 * np.cos(petals * np.arctan2(v, u))
    return (np.hypot(u, v) - radius) * 0.75


def frame(u: Field, v: Field, rng: np.random.Generator) -> Field:
    width = uniform(rng, len(u), 0.1, 0.18)
    return np.abs(np.maximum(np.abs(u), np.abs(v)) - (0.85 - width)) - width


def bow_tie(u: Field, v: Field, rng: np.random.Generator) -> Field:
    slope = uniform(rng, len(u), 0.6, 0.9)
    return np.maximum(np.abs(u) - 0.95, (np.abs(v) - slope * np.abs(u) - 0.04) * 0.78)


# --- textures ----------------------------------------------------------------------------------------------------------


def stripes(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return np.abs(_cell(u)) - uniform(rng, len(u), 0.18, 0.3)


def checks(u: Field, v: Field, rng: np.random.Generator) -> Field:
    a, b = np.abs(_cell(u)) - 0.25, np.abs(_cell(v)) - 0.25
    return np.where((a < 0) == (b < 0), -1, 1).astype(np.float32) * np.minimum(np.abs(a), np.abs(b))


def dots(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return np.hypot(_cell(u), _cell(v)) - uniform(rng, len(u), 0.24, 0.36)


def waves(u: Field, v: Field, rng: np.random.Generator) -> Field:
    height, length = uniform(rng, len(u), 0.25, 0.4), uniform(rng, len(u), 0.3, 0.45)
    bent = v + height * np.sin(TURN * length * u)
    return (np.abs(_cell(bent)) - uniform(rng, len(u), 0.18, 0.28)) * 0.8


def bricks(u: Field, v: Field, rng: np.random.Generator) -> Field:
    joint = uniform(rng, len(u), 0.38, 0.42)
    shifted = u * 0.5 + np.mod(np.floor(v), 2) * 0.5
    return np.maximum(np.abs(_cell(v)) - joint, (np.abs(_cell(shifted)) - (joint + 0.5) / 2) * 2)


def weave(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """A basket: square cells hold three strips each, lying and standing in turn."""
    across = np.mod(np.floor(u * 0.5) + np.floor(v * 0.5), 2) < 1
    along: Field = np.where(across, u, v)
    return (np.abs(_cell(along * 1.5)) - uniform(rng, len(u), 0.26, 0.34)) / 1.5


def ripples(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Rings around a centre that lies in the picture."""
    centre_u, centre_v = uniform(rng, len(u), -1, 1), uniform(rng, len(u), -1, 1)
    return np.abs(_cell(np.hypot(u - centre_u, v - centre_v))) - uniform(rng, len(u), 0.18, 0.3)


def rays(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Wedges around a centre that lies in the picture."""
    count = rng.integers(7, 13, (len(u), 1, 1)).astype(np.float32)
    u, v = u - uniform(rng, len(u), -1, 1), v - uniform(rng, len(u), -1, 1)
    wedge = np.abs(_cell(np.arctan2(v, u) * count / TURN)) - uniform(rng, len(u), 0.2, 0.3)
    return wedge * np.hypot(u, v) * TURN / count


def honeycomb(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Six-sided cells: the nearer of two shifted lattices of centres, measured across the flats."""
    tall = math.sqrt(3.0)

    def flats(x: Field, y: Field) -> Field:
        across: Field = np.abs(_cell(x))
        up: Field = np.abs(_cell(y / tall)) * tall
        return np.maximum(across, across * 0.5 + up * 0.8660254)

    u, v = u * 0.7, v * 0.7
    return (np.minimum(flats(u, v), flats(u + 0.5, v + tall / 2)) - uniform(rng, len(u), 0.37, 0.42)) / 0.7


def blotches(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Irregular spots: a sum of waves of like length in random directions, cut at a level."""
    total = np.zeros_like(u)
    for _ in range(6):
        angle, shift = uniform(rng, len(u), 0, TURN), uniform(rng, len(u), 0, TURN)
        length = uniform(rng, len(u), 0.55, 0.8)
        total += np.cos(TURN * length * (np.cos(angle) * u + np.sin(angle) * v) + shift)
    return (uniform(rng, len(u), 0.3, 1.2) - total) * 0.09


SHAPES: dict[str, Pattern] = {f.__name__: f for f in (ring, star, cross, triangle, crescent, heart, arrow, flower, frame, bow_tie)}
TEXTURES: dict[str, Pattern] = {f.__name__: f for f in (stripes, checks, dots, waves, bricks, weave, ripples, rays, honeycomb, blotches)}
