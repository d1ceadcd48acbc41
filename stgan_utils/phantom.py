"""The embedded dataset: dermoscopy-like images of the seven classes, drawn, not photographed. Never evidence.

An image is skin seen through layers that absorb, as real skin is: melanin near the surface (brown), melanin deep down
(blue-grey), blood (red), and keratin or scar on top (white). Every structure that dermatologists look for (`look_for`
in `lesions.py`) adds to one of these layers, with a strength drawn from its class's range. Ranges overlap, features are
often absent, and some lesions take after another class, so that a classifier is neither perfect nor blind.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from stgan_utils.config import UserError
from stgan_utils.layouts import whole_folder
from stgan_utils.lesions import CLASSES, LESIONS

# Absorption of red, green and blue light by one unit of melanin, deep melanin and blood.
PIGMENTS = np.array([[0.50, 0.95, 1.35], [1.15, 0.90, 0.62], [0.16, 1.05, 0.85]], np.float32)
KERATIN = np.array([250, 240, 222], np.float32)
# Fair, pink, lilac (a cool light), orange (tanned or a warm light), beige; a patient's skin is a mixture.
SKIN = np.array([[238, 206, 192], [232, 170, 172], [196, 164, 184], [226, 160, 116], [214, 184, 156]], np.float32)

# What each class looks like: per feature the chance of being there, its lowest and its highest strength. A feature that
# is not there has strength 0. "radius" is in half picture widths, "soft_edge" too.
TABLE = """
           | AKIEC         | BCC           | BKL           | DF            | MEL           | NV            | VASC
radius     | 1.0 .35 .75   | 1.0 .30 .70   | 1.0 .35 .75   | 1.0 .30 .55   | 1.0 .45 .85   | 1.0 .28 .65   | 1.0 .25 .55
oblong     | 1.0 .00 .40   | 1.0 .00 .40   | 1.0 .00 .40   | 1.0 .00 .20   | 1.0 .10 .45   | 1.0 .00 .30   | 1.0 .00 .25
ragged     | 1.0 .25 .60   | 1.0 .15 .45   | 1.0 .15 .50   | 1.0 .05 .20   | 1.0 .30 .80   | 1.0 .05 .25   | 1.0 .05 .25
soft_edge  | 1.0 .10 .22   | 1.0 .06 .18   | 1.0 .02 .07   | 1.0 .10 .22   | 1.0 .04 .14   | 1.0 .05 .18   | 1.0 .02 .08
melanin    | 1.0 .00 .25   | 1.0 .00 .22   | 1.0 .20 .75   | 1.0 .12 .40   | 1.0 .45 1.2   | 1.0 .30 .85   | 1.0 .00 .15
blood      | 1.0 .20 .55   | 1.0 .10 .40   | 1.0 .00 .20   | 1.0 .02 .22   | 1.0 .00 .25   | 1.0 .00 .18   | 1.0 .25 .70
mottled    | 1.0 .10 .35   | 1.0 .10 .35   | 1.0 .15 .45   | 1.0 .05 .20   | 1.0 .40 1.0   | 1.0 .05 .30   | 1.0 .05 .30
lopsided   | 1.0 .00 .30   | 1.0 .00 .30   | 1.0 .00 .35   | 1.0 .00 .15   | 1.0 .20 .90   | 1.0 .00 .25   | 1.0 .00 .20
network    | .05 .10 .30   | .03 .10 .30   | .15 .20 .50   | .80 .20 .60   | .70 .40 1.0   | .65 .30 .90   | .02 .10 .20
atypia     | 1.0 .20 .50   | 1.0 .20 .50   | 1.0 .15 .50   | 1.0 .05 .20   | 1.0 .40 1.0   | 1.0 .05 .30   | 1.0 .10 .30
globules   | .10 .20 .50   | .20 .20 .50   | .15 .20 .50   | .10 .20 .40   | .60 .40 1.0   | .40 .30 .90   | .05 .20 .40
streaks    | .00 .00 .00   | .15 .20 .50   | .03 .20 .40   | .03 .20 .30   | .45 .40 1.0   | .05 .20 .50   | .00 .00 .00
veil       | .00 .00 .00   | .10 .20 .40   | .10 .10 .40   | .02 .10 .30   | .60 .40 1.0   | .04 .10 .40   | .15 .20 .60
nests      | .05 .20 .50   | .65 .40 1.0   | .08 .20 .50   | .02 .10 .30   | .12 .20 .50   | .02 .20 .40   | .08 .20 .50
branching  | .10 .20 .50   | .75 .50 1.0   | .04 .20 .40   | .06 .20 .40   | .08 .20 .50   | .02 .20 .30   | .10 .20 .40
dotted     | .70 .40 1.0   | .15 .20 .50   | .06 .20 .50   | .10 .20 .40   | .15 .20 .60   | .04 .20 .40   | .05 .20 .40
ulcer      | .15 .20 .60   | .25 .40 1.0   | .01 .20 .30   | .00 .00 .00   | .05 .30 .70   | .00 .00 .00   | .05 .20 .40
white_lines| .08 .20 .40   | .40 .30 .80   | .02 .20 .30   | .20 .20 .60   | .15 .20 .50   | .01 .10 .20   | .03 .20 .30
scale      | .75 .30 1.0   | .12 .20 .50   | .20 .20 .60   | .03 .10 .30   | .03 .10 .30   | .01 .10 .20   | .05 .20 .40
cysts      | .03 .20 .50   | .06 .20 .50   | .60 .40 1.0   | .03 .20 .30   | .05 .20 .40   | .04 .20 .50   | .01 .20 .30
comedones  | .02 .20 .40   | .03 .20 .40   | .45 .40 1.0   | .02 .20 .30   | .06 .20 .50   | .04 .20 .40   | .01 .20 .30
ridges     | .04 .20 .40   | .01 .20 .30   | .45 .30 .90   | .02 .20 .30   | .05 .20 .40   | .03 .20 .40   | .01 .20 .30
scar       | .06 .20 .40   | .12 .20 .50   | .03 .20 .40   | .80 .40 .90   | .20 .20 .60   | .03 .20 .30   | .02 .20 .30
lacunae    | .02 .20 .40   | .04 .20 .40   | .01 .20 .30   | .01 .20 .30   | .03 .20 .50   | .01 .20 .30   | .85 .50 1.0
"""


def _features(text):
    """{feature: [(chance, low, high) of each class, in the order of CLASSES]}"""
    rows = [line.split("|") for line in text.strip().splitlines()]
    assert tuple(cell.strip() for cell in rows[0][1:]) == CLASSES
    return {row[0].strip(): [tuple(map(float, cell.split())) for cell in row[1:]] for row in rows[1:]}


FEATURES = _features(TABLE)

# Whom a class is mistaken for.
LOOKALIKE = {"AKIEC": "BKL", "BCC": "AKIEC", "BKL": "MEL", "DF": "NV", "MEL": "NV", "NV": "MEL", "VASC": "BCC"}

# HAM10000's images per class, its 1.34 images per lesion, and (mean, spread) of its patients' age.
HAM10000_COUNTS = dict(zip(CLASSES, (327, 514, 1099, 115, 1113, 6705, 142), strict=True))
IMAGES_PER_LESION = 1.34
AGES = dict(zip(CLASSES, ((66, 11), (67, 13), (64, 13), (51, 14), (61, 15), (46, 16), (51, 18)), strict=True))
SITES = ("back", "lower extremity", "trunk", "upper extremity", "abdomen", "face", "chest", "foot", "neck", "scalp")
STEPS = np.linspace(-1, 1, 9)


def draw(label, size, rng, view=None):
    """One picture: uint8 (size, size, 3), RGB.

    Args:
        label: one of `CLASSES`.
        size: side in pixels, at least 16.
        rng: NumPy generator that the lesion is drawn from; the same state gives the same lesion at any size.
        view: NumPy generator for rotation, position, light, hair and skin texture; by default `rng` goes on.
    """
    strength = _character(label, rng)
    tone, lesion_seed = rng.dirichlet([0.8] * len(SKIN)), rng.integers(2**63)
    frame = _Frame(size, rng if view is None else view)
    melanin, deep, blood, white = _layers(strength, frame, np.random.default_rng(lesion_seed))
    uneven = frame.skin()
    absorbed = np.stack([melanin + 0.4 * uneven, deep, blood + 0.6 * uneven], -1) @ PIGMENTS
    image = tone.astype(np.float32) @ SKIN * np.exp(-absorbed)
    image += (KERATIN - image) * white[..., None]
    return frame.photograph(image)


def _character(label, rng):
    """Strength of each feature: the class's own, more or less mixed with its lookalike's."""
    index, other = CLASSES.index(label), CLASSES.index(LOOKALIKE[label])
    resemblance = rng.uniform(0.25, 0.7) if rng.random() < 0.15 else rng.uniform(0, 0.15)
    dice = rng.random((len(FEATURES), 2, 2))
    strength = {}
    for (name, ranges), pair in zip(FEATURES.items(), dice, strict=True):
        own, foreign = (
            float(low + (high - low) * how_much) * float(there < chance)
            for (chance, low, high), (there, how_much) in zip((ranges[index], ranges[other]), pair, strict=True)
        )
        strength[name] = own + resemblance * (foreign - own)
    return strength


def _smooth(low, high, x):
    """0 below `low`, 1 above `high`, a smooth step between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _layers(s, frame, rng):
    """Melanin, deep melanin, blood and white cover of one lesion, each (size, size); `s`: strength by feature."""
    x, y = frame.x, frame.y
    coarse, medium = frame.noise(rng, 1.5, 5), frame.noise(rng, 5, 14)
    fine, grain = frame.noise(rng, 14, 40), frame.noise(rng, 25, 110, waves=48)

    # Outline: an ellipse that noise has bitten into; `inside` is about the distance to the edge, positive within.
    squeeze = 1 + s["oblong"]
    distance = np.sqrt((x * squeeze**0.5) ** 2 + (y / squeeze**0.5) ** 2)
    inside = s["radius"] - distance + s["ragged"] * (0.15 * coarse + 0.07 * medium + 0.04 * fine + 0.02 * grain)
    body = _smooth(-s["soft_edge"], s["soft_edge"], inside)
    core = _smooth(0, 0.6 * s["radius"], inside)

    def scatter(most, least=2, spread=0.85):
        """Centres of up to `most` things strewn over the lesion, (n, 2)."""
        count = max(least, int(most * rng.uniform(0.5, 1) + 0.5))
        radius, angle = spread * s["radius"] * np.sqrt(rng.random(count)), rng.uniform(0, 2 * math.pi, count)
        return np.stack([radius * np.cos(angle) / squeeze**0.5, radius * np.sin(angle) * squeeze**0.5], 1)

    # Colour: even, mottled, or heavier on one side.
    direction = rng.uniform(0, 2 * math.pi)
    side = np.tanh(2 * (x * math.cos(direction) + y * math.sin(direction)) / s["radius"])
    tint = 1 + s["mottled"] * (0.35 * medium + 0.3 * coarse + 0.2 * fine) + 0.12 * grain + 0.5 * s["lopsided"] * side
    tint = np.clip(tint, 0.15, 2.4)
    melanin = s["melanin"] * body * tint * (0.75 + 0.35 * core)
    blood = s["blood"] * body * (1 + 0.3 * medium + 0.15 * fine + 0.15 * grain)
    deep = np.zeros_like(x)
    white = np.zeros_like(x)

    if s["network"]:
        # Honeycomb: three plane waves; the holes are where they agree. Atypical: bent, uneven, patchy.
        pitch = 2 * math.pi / rng.uniform(0.085, 0.14)
        bend = (0.010 + 0.012 * s["atypia"]) * np.stack([medium + fine, medium - fine])
        turns = rng.uniform(0, 2 * math.pi) + np.arange(3) * 2 * math.pi / 3
        waves = sum(np.cos(pitch * ((x + bend[0]) * math.cos(t) + (y + bend[1]) * math.sin(t))) for t in turns)
        lines = 1 - _smooth(-1.2, 1.0 - 0.6 * s["atypia"] * np.clip(medium, -1, 1), waves + 0.5 * grain)
        patchy = np.clip(1 + 0.9 * s["atypia"] * coarse + 0.25 * fine, 0, 2)
        fading = body * (1 - 0.5 * core) if s["scar"] < 0.3 else body * (1 - core)
        melanin += s["network"] * 0.7 * (lines - 0.35) * patchy * fading * (0.4 + s["melanin"])
    if s["globules"]:
        dots = frame.blobs(scatter(50 * s["globules"] + 12), rng, 0.022 + 0.02 * s["atypia"] * rng.random(), 0.4)
        melanin += s["globules"] * 0.9 * dots * body
    if s["streaks"]:
        # Pseudopods: radial strokes that leave the edge.
        angles = rng.uniform(0, 2 * math.pi) + rng.uniform(0, 2.5 + 2 * s["streaks"], int(6 + 16 * s["streaks"]))
        reach = s["radius"] * rng.uniform(0.95, 1.25, len(angles))
        spokes = [
            [(r * f * math.cos(a), r * f * math.sin(a)) for f in (0.6, 1.0)] for a, r in zip(angles, reach, strict=True)
        ]
        rays = frame.strokes(spokes, rng.uniform(0.03, 0.08, len(spokes)))
        melanin += s["streaks"] * 0.6 * rays * _smooth(-0.25, 0.05, inside) * (1 + 0.3 * grain)
    if s["veil"]:
        cover = _smooth(0.0, 1.4, frame.noise(rng, 2, 9) + 0.8 * core + 0.3 * fine) * body
        deep += s["veil"] * 0.75 * cover
        white += s["veil"] * 0.16 * cover
    if s["nests"]:
        deep += s["nests"] * 1.1 * frame.blobs(scatter(9), rng, 0.06, 0.6) * _smooth(-0.1, 0.1, inside)
    if s["lacunae"]:
        pools = frame.blobs(scatter(16, least=5, spread=0.8), rng, 0.10 * (0.5 + s["radius"]), 0.3, sharp=True)
        dark = np.clip(0.8 + 0.5 * coarse, 0.1, 2)
        blood += s["lacunae"] * 1.2 * pools * (1 + 0.2 * fine + 0.1 * grain)
        deep += s["lacunae"] * 0.55 * pools * dark * rng.uniform(0.1, 1.2)
    if s["dotted"]:
        blood += s["dotted"] * 0.9 * frame.blobs(scatter(45), rng, 0.022, 0.3) * body
    if s["branching"]:
        lines, widths = _tree(rng, s["radius"], int(2 + 3 * s["branching"]))
        blood += s["branching"] * 0.9 * frame.strokes(lines, widths)
    if s["ulcer"]:
        sore = _smooth(0.45, 0.75, frame.blobs(scatter(2, least=1, spread=0.5), rng, 0.13, 0.4) + 0.12 * medium)
        blood += s["ulcer"] * 1.1 * sore
        melanin += s["ulcer"] * 0.4 * sore
    if s["comedones"]:
        melanin += s["comedones"] * 1.3 * frame.blobs(scatter(14), rng, 0.032, 0.4) * body
    if s["ridges"]:
        furrows = 1 - _smooth(0.05, 0.5, np.abs(frame.noise(rng, 9, 20) + 0.2 * grain))
        melanin += s["ridges"] * 0.45 * (furrows - 0.3) * body
    if s["scar"]:
        patch = _smooth(0.15, 0.85, np.exp(-((distance / (0.55 * s["radius"])) ** 2)) + 0.2 * medium)
        white += s["scar"] * 0.5 * patch * (0.8 + 0.2 * fine)
        melanin *= 1 - 0.7 * s["scar"] * patch
    if s["white_lines"]:
        lean = rng.uniform(0, math.pi)
        bars = [
            [centre - half, centre + half]
            for centre in scatter(9)
            for half in [rng.uniform(0.04, 0.11) * np.array([math.cos(lean), math.sin(lean)])]
        ]
        white += s["white_lines"] * 0.4 * frame.strokes(bars, [0.022] * len(bars))
    if s["scale"]:
        white += s["scale"] * 0.5 * _smooth(0.4, 2.2, 0.9 * fine + 0.8 * medium + 0.8 * grain) * body
    if s["cysts"]:
        white += s["cysts"] * 0.6 * frame.blobs(scatter(14), rng, 0.03, 0.4) * body
    return np.clip(melanin, 0, 2.6), deep, np.clip(blood, 0, 2.4), np.clip(white, 0, 0.85)


def _tree(rng, radius, trunks):
    """Arborising vessels: trunks from the edge inwards that fork twice. (polylines, widths)"""
    lines, widths = [], []

    def grow(start, angle, length, width, forks):
        points = [start]
        for _ in range(4):
            angle += rng.normal(0, 0.35)
            points.append(points[-1] + 0.25 * length * np.array([math.cos(angle), math.sin(angle)]))
        lines.append(points)
        widths.append(width)
        if forks:
            for turn in (-1, 1):
                at = points[rng.integers(2, 5)]
                grow(at, angle + turn * rng.uniform(0.4, 1.0), 0.65 * length, 0.65 * width, forks - 1)

    for _ in range(trunks):
        angle = rng.uniform(0, 2 * math.pi)
        start = radius * rng.uniform(0.5, 1.0) * np.array([math.cos(angle), math.sin(angle)])
        grow(start, angle + math.pi + rng.normal(0, 0.5), radius * rng.uniform(0.5, 0.9), 0.028, 2)
    return lines, widths


class _Frame:
    """The camera: where each pixel lies in the lesion's own coordinates (about [-1, 1]), and the light it gets."""

    def __init__(self, size, rng):
        self.size, self.rng = size, rng
        angle, zoom = rng.uniform(0, 2 * math.pi), rng.uniform(0.88, 1.12)
        self.to_lesion = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / zoom
        self.from_lesion = np.linalg.inv(self.to_lesion).T
        self.centre = rng.normal(0, 0.09, 2)  # of the lesion, in the picture
        self.axis = (np.arange(size) + 0.5) * 2 / size - 1
        u, v = self.axis[None, :] - self.centre[0], self.axis[:, None] - self.centre[1]
        self.x = (self.to_lesion[0, 0] * u + self.to_lesion[0, 1] * v).astype(np.float32)
        self.y = (self.to_lesion[1, 0] * u + self.to_lesion[1, 1] * v).astype(np.float32)

    def _to_picture(self, points):
        return np.asarray(points) @ self.from_lesion + self.centre

    def noise(self, rng, low, high, waves=28):
        """Smooth noise, about normal(0, 1), of `low` … `high` radians per unit, octaves alike; turns with the lesion.

        A sum of plane waves: each is an outer product of its values along the two axes, so the sum is one product of
        matrices.
        """
        angle, length = rng.uniform(0, 2 * math.pi, waves), low * (high / low) ** rng.random(waves)
        k = np.stack([length * np.cos(angle), length * np.sin(angle)], 1) @ self.to_lesion
        phase = rng.uniform(0, 2 * math.pi, waves) - k @ self.centre
        across = (self.axis * k[:, :1]).astype(np.float32)
        down = (self.axis * k[:, 1:] + phase[:, None]).astype(np.float32)
        # cos(across + down), summed over the waves
        products = np.concatenate([np.cos(down), -np.sin(down)]).T @ np.concatenate([np.cos(across), np.sin(across)])
        return math.sqrt(2 / waves) * products

    def blobs(self, centres, rng, radius, spread, sharp=False):
        """Round spots, 0 … 1, of about `radius` (times 1 ± `spread`) around `centres` (n, 2); `sharp`: with an edge."""
        radii = radius * rng.uniform(1 - spread, 1 + spread, len(centres))
        radii = np.maximum(radii, 1.1 / self.size)  # never below the pixels
        at = self._to_picture(centres)
        across, down = (
            np.exp(-(((self.axis - at[:, i, None]) / radii[:, None]) ** 2)).astype(np.float32) for i in (0, 1)
        )
        spots = down.T @ across
        return _smooth(0.3, 0.55, spots) if sharp else np.minimum(spots, 1)

    def strokes(self, lines, widths, fixed=False):
        """Lines, 0 … 1: polylines with widths in lesion units (`fixed`: in the picture's own coordinates)."""
        over = 4 if self.size <= 128 else 2
        canvas = Image.new("L", (self.size * over, self.size * over))
        pen = ImageDraw.Draw(canvas)
        for line, width in zip(lines, widths, strict=True):
            points = np.asarray(line) if fixed else self._to_picture(line)
            pixels = ((points + 1) * (self.size * over / 2)).ravel().tolist()
            pen.line(pixels, fill=255, width=max(over // 2, round(width * self.size * over / 2)), joint="curve")
        return np.asarray(canvas.reduce(over), np.float32) / 255

    def skin(self):
        """How unevenly bare skin absorbs, about 0 on average: flushes, furrows, pores."""
        flush, furrows = self.noise(self.rng, 2, 30, waves=40), self.noise(self.rng, 20, 120, waves=60)
        return self.rng.uniform(0.4, 1.4) * (0.05 * flush + 0.035 * furrows)

    def photograph(self, image):
        """Hair, light, vignette and sensor noise; uint8."""
        rng = self.rng
        if rng.random() < 0.3:
            hairs = []
            lie = rng.uniform(0, 2 * math.pi)
            for _ in range(rng.integers(1, 12)):
                angle, start = rng.normal(lie, 0.5), rng.uniform(-1, 1, 2)
                step = rng.uniform(0.2, 0.9) * np.array([math.cos(angle), math.sin(angle)])
                bow = rng.normal(0, 0.3) * np.array([-step[1], step[0]])
                hairs.append(start + np.outer(STEPS, step) + np.outer(STEPS**2, bow))
            shade = rng.uniform(0.25, 0.75) * self.strokes(hairs, rng.uniform(0.008, 0.018, len(hairs)), fixed=True)
            image += (np.array([48, 34, 28], np.float32) - image) * shade[..., None]
        u, v = self.axis[None, :].astype(np.float32), self.axis[:, None].astype(np.float32)
        slope = rng.normal(0, 0.045, 2)
        light = rng.uniform(0.86, 1.08) * (1 + slope[0] * u + slope[1] * v)
        corner = u * u + v * v
        light = light - rng.uniform(0, 0.16) * corner
        if rng.random() < 0.06:  # the tube of the dermatoscope
            light = light * (1 - _smooth(rng.uniform(1.15, 1.3), 1.5, corner) * 0.9)
        image *= light[..., None] * rng.normal(1, 0.025, 3).astype(np.float32)
        image += rng.standard_normal((self.size, self.size, 1), np.float32) * rng.uniform(0.8, 2.5)
        return np.clip(image, 0, 255).astype(np.uint8)


def write_dataset(folder, count, size, seed):
    """Draw a dataset and write it as HAM10000 lies on Kaggle: metadata CSV and two folders of JPEG (quality 95).

    It has HAM10000's imbalance (every class at least 6 images of 4 lesions) and several images of many lesions: the
    same lesion in another rotation, position, light and hair. The same arguments give the same dataset on every machine
    (pixels to within rounding).

    Args:
        folder: new or empty; it appears whole or not at all.
        count: images, at least 140.
        size: side in pixels.
        seed: whole number.

    Raises:
        UserError: too few images, or the folder already holds something.
    """
    folder = Path(folder)
    if count < 140:
        raise UserError(f"The phantom dataset needs at least 140 images, not {count}.")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder for the phantom dataset.")
    rows = _metadata(count, seed)
    with whole_folder(folder) as temporary:
        for number, row in enumerate(rows, 1):
            lesion = int(row["lesion_id"][-7:])
            rng, view = np.random.default_rng([seed, lesion]), np.random.default_rng([seed, lesion, number])
            part = temporary / f"HAM10000_images_part_{1 if number <= count // 2 else 2}"
            part.mkdir(exist_ok=True)
            Image.fromarray(draw(row["dx"].upper(), size, rng, view)).save(part / f"{row['image_id']}.jpg", quality=95)
        pd.DataFrame(rows).to_csv(temporary / "HAM10000_metadata.csv", index=False)


def _metadata(count, seed):
    """Rows of HAM10000's schema."""
    images = {code: max(6, round(count * n / 10015)) for code, n in HAM10000_COUNTS.items()}
    images["NV"] += count - sum(images.values())
    rng = np.random.default_rng([seed, 0])
    labels, of_lesion = [], []
    for code, n in images.items():
        lesions = max(4, round(n / IMAGES_PER_LESION))
        # Every lesion has one image; the others fall where they fall.
        of_lesion += [len(labels) + i for i in (*range(lesions), *rng.integers(lesions, size=n - lesions))]
        labels += [code] * lesions
    numbers = rng.permutation(len(labels)) + 1  # so that an id says nothing of the class
    patients = [
        {
            "age": float(np.clip(5 * round(rng.normal(*AGES[code]) / 5), 5, 85)),
            "sex": ("male", "female")[rng.integers(2)],
            "localization": SITES[rng.integers(len(SITES))],
        }
        for code in labels
    ]
    rows = [
        {
            "lesion_id": f"PHANTOM_{numbers[lesion]:07d}",
            "image_id": f"PHANTOM_{number:07d}",
            "dx": LESIONS[labels[lesion]].dx,
            "dx_type": "drawn",
            **patients[lesion],
            "dataset": "phantom",
        }
        for number, lesion in enumerate(np.array(of_lesion)[rng.permutation(len(of_lesion))], 1)
    ]
    return rows
