"""Exact Rossby waves on any grid: data whose every value, at every time, is known in closed form.

Derivation, on a sphere of radius a that turns with Omega; lambda is longitude, phi latitude, mu = sin(phi).
Wind from the stream function: u = -(1/a) dpsi/dphi, v = 1/(a cos(phi)) dpsi/dlambda; vorticity
zeta = laplacian(psi), and a harmonic of degree l has zeta = -l (l+1) / a^2 psi.

  basic flow      psi0 = -a^2 omega0 mu, so u0 = a omega0 cos(phi), zeta0 = 2 omega0 mu
  vorticity       dzeta'/dt + omega0 dzeta'/dlambda + 2 (Omega + omega0) / a^2 dpsi'/dlambda = 0
  wave            psi' = A P_lm(mu) cos(m lambda - nu t + phase) solves it with
                  nu = m omega0 - 2 m (Omega + omega0) / (l (l+1))
  tracer          dT'/dt + omega0 dT'/dlambda + v'/a dTbar/dphi = 0. Here v'/a dTbar/dphi is
                  dTbar/dmu / a^2 dpsi'/dlambda: the vorticity equation with another factor that knows
                  latitude only. Hence, exactly, T' = zeta' dTbar/dmu / (2 (Omega + omega0)).

The equations are linear, so a sum of waves solves them too. Sources: B. Haurwitz (1940), The motion of
atmospheric disturbances on the spherical earth, J. Marine Research 3, 254-267, for the waves and their
speed; for the Legendre recurrences, S. A. Holmes and W. E. Featherstone (2002), J. Geodesy 76, 279-299.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from shardio.errors import ShardioError

EARTH_RADIUS = 6.371e6  # m
EARTH_ROTATION = 7.292e-5  # s-1, Omega
SOLID_BODY_ROTATION = 15.0 / EARTH_RADIUS  # s-1, omega0: 15 m/s at the equator
PLANETARY_GRADIENT = 2.0 * (EARTH_ROTATION + SOLID_BODY_ROTATION)  # s-1, d/dmu of absolute vorticity
EQUATOR_TEMPERATURE = 300.0  # K
POLE_TEMPERATURE_DROP = 45.0  # K; Tbar = EQUATOR_TEMPERATURE - POLE_TEMPERATURE_DROP mu^2

variable_units: dict[str, dict[str, str | bool]] = {
    "psi": {"units": "m2 s-1", "long_name": "stream function", "constant": False},
    "vo": {"units": "s-1", "long_name": "relative vorticity", "constant": False},
    "u": {"units": "m s-1", "long_name": "eastward wind", "constant": False},
    "v": {"units": "m s-1", "long_name": "northward wind", "constant": False},
    "t": {"units": "K", "long_name": "temperature as a passive tracer", "constant": False},
    "lsm": {"units": "1", "long_name": "land-sea mask", "constant": True},
    "latitude": {"units": "degrees_north", "long_name": "latitude", "constant": True},
}

_BLOCK_CELLS = 2**13  # small enough for the two dozen temporaries of a block to stay in cache

Float64 = NDArray[np.float64]
Float64Pair = tuple[Float64, Float64]


def octahedral(name: str) -> tuple[Float64, Float64, NDArray[np.int64]]:
    """Cells of the octahedral reduced Gaussian grid `oN`: 4 N (N + 9) cells, north to south.

    Row i, counted from the nearer pole from 1, lies on the i-th Gaussian latitude and has 4 i + 16 cells
    from longitude 0 eastward (Malardel et al. 2016, A new grid for the IFS, ECMWF Newsletter 146).

    Returns: latitudes [cells] and longitudes [cells] in degrees, and the number of cells of each row [2 N].
    Raises: ShardioError if `name` is not of the form o96 or O96.
    """
    match = re.fullmatch(r"[oO]([1-9][0-9]*)", name)
    if match is None:
        raise ShardioError(
            f"{name!r} names no octahedral grid: give the letter o and the number of latitude rows between "
            "pole and equator, as in o96 (40,320 cells) or o1280 (6,599,680 cells)."
        )
    rows_to_equator = int(match.group(1))
    northern_rows = 4 * np.arange(1, rows_to_equator + 1, dtype=np.int64) + 16
    field_rows = np.concatenate([northern_rows, northern_rows[::-1]])
    latitudes = np.repeat(gaussian_latitudes(rows_to_equator), field_rows)
    longitudes = np.concatenate([360.0 * np.arange(count) / count for count in field_rows])
    return latitudes, longitudes, field_rows


def gaussian_latitudes(rows_to_equator: int) -> Float64:
    """Latitudes whose sines are the roots of the Legendre polynomial of degree n = 2 rows_to_equator.

    Newton's iteration in the colatitude theta, for all northern roots at once: O(n^2), 0.2 s for o2560.
    With x = cos(theta), the recurrence of P is written in differences and in 1 - x = 2 sin^2(theta / 2),
      (k+1) (P_(k+1) - P_k) = k (P_k - P_(k-1)) - (2k+1) (1-x) P_k,
    because x itself no longer resolves theta close to the pole. Accurate to the last bit or two.

    Returns: [2 rows_to_equator] degrees, north to south.
    """
    degree = 2 * rows_to_equator
    # First guess from the large-degree limit; it is at worst 2 % off, in the row next to the pole.
    theta = (np.arange(1, rows_to_equator + 1) - 0.25) * np.pi / (degree + 0.5)
    for _ in range(4):  # each step squares the error: 2e-2, 2e-4, 2e-8, rounding, and one to spare
        one_minus_x = 2.0 * np.sin(theta / 2.0) ** 2
        difference = -one_minus_x
        legendre = 1.0 + difference
        for k in range(1, degree):
            difference = (k * difference - (2 * k + 1) * one_minus_x * legendre) / (k + 1)
            legendre = legendre + difference
        slope = degree * (difference - one_minus_x * legendre) / np.sin(theta)  # dP/dtheta
        theta = theta - legendre / slope
    northern: Float64 = 90.0 - np.degrees(theta)
    return np.concatenate([northern, -northern[::-1]])


@dataclass(frozen=True)
class Harmonic:
    """amplitude P_lm(sin(lat)) cos(m lon + phase), with P normalised to mean square 1 over the sphere."""

    degree: int  # l
    order: int  # m, 1 to l
    amplitude: float
    phase: float  # radians

    @property
    def laplacian(self) -> float:
        """What the Laplacian multiplies it with, m-2."""
        return -self.degree * (self.degree + 1) / EARTH_RADIUS**2

    @property
    def frequency(self) -> float:
        """Angular frequency nu of the Rossby wave of this shape, rad s-1: see the head of this file."""
        return self.order * (SOLID_BODY_ROTATION - PLANETARY_GRADIENT / (self.degree * (self.degree + 1)))

    def turn(self, time_seconds: float) -> tuple[int, float]:
        """(m, angle in radians) of the wave's cos(m lon + angle) at this time."""
        return self.order, self.phase - self.frequency * time_seconds


@dataclass(frozen=True, eq=False)
class RossbyWaves:
    """Six Rossby waves over a solid-body flow, a tracer that they carry, and two constant fields.

    The seed alone decides the waves and the mask; cells only say where to evaluate them, in any order.
    Reading changes nothing in the object: threads may share it.

    Args:
      latitudes, longitudes: [cells], degrees.
      seed: of numpy's default_rng.
    Raises: ShardioError if latitudes and longitudes do not describe the same cells.
    """

    variables: ClassVar[tuple[str, ...]] = tuple(variable_units)

    latitudes: Float64
    longitudes: Float64
    seed: int = 0
    waves: tuple[Harmonic, ...] = field(init=False)  # amplitudes in m2 s-1
    _places: _Places = field(init=False, repr=False)
    _shapes: tuple[Float64Pair, ...] = field(init=False, repr=False)  # of each wave, from _shape
    _land: NDArray[np.float32] = field(init=False, repr=False)  # [cells]

    def __post_init__(self) -> None:
        if self.latitudes.ndim != 1 or self.latitudes.shape != self.longitudes.shape:
            raise ShardioError(
                f"latitudes {self.latitudes.shape} and longitudes {self.longitudes.shape} must both be "
                "[cells]: flatten them, and give one of each per cell."
            )
        random = np.random.default_rng(self.seed)
        waves, places = _draw_waves(random), _Places.of(self.latitudes, self.longitudes)
        shapes = tuple(_shape(wave, places) for wave in waves)
        land = _land_sea_mask(random, places)
        # Past __setattr__, which refuses because the dataclass is frozen.
        vars(self).update(waves=waves, _places=places, _shapes=shapes, _land=land)

    def fields(self, time_seconds: float, cells: slice, out: NDArray[np.floating[Any]]) -> None:
        """Write all variables of a range of cells at one time.

        Sines and Legendre polynomials are computed at construction. What is left are sums and products of
        the values of one cell, rounded alike wherever the cell stands in a block: the bits do not depend
        on how the grid is cut into ranges.

        Args:
          time_seconds: since the time at which each wave has its own `phase`.
          cells: a range of cells, without a step.
          out: float32 [variables, cells], in the order of `variables`, overwritten; float64 works too.
        Raises: ShardioError if `out` has another shape or `cells` has a step.
        """
        first, last, step = cells.indices(self.latitudes.size)
        expected = (len(self.variables), max(last - first, 0))
        if step != 1 or out.shape != expected:
            raise ShardioError(
                f"{cells} of {self.latitudes.size} cells does not fit into out {out.shape}: give a range "
                f"without a step and an array of shape {expected}."
            )
        for block in _blocks(first, last):
            self._write_block(time_seconds, block, out[:, block.start - first : block.stop - first])

    def _write_block(self, time_seconds: float, cells: slice, out: NDArray[np.floating[Any]]) -> None:
        row = self._places.row[cells].astype(np.intp)
        cosine, sine = self._places.cosine[row], self._places.sine[row]  # of latitude
        stream, vorticity, eastward, northward = np.zeros((4, row.size))  # of the waves
        angles = _angles([wave.turn(time_seconds) for wave in self.waves], self._places, cells)
        for wave, shape, (cosine_angle, sine_angle) in zip(self.waves, self._shapes, angles, strict=True):
            over_cosine, slope = shape[0][row], shape[1][row]
            value = over_cosine * cosine_angle
            stream += value
            vorticity += wave.laplacian * value
            eastward -= slope * cosine_angle
            northward -= wave.order * (over_cosine * sine_angle)
        stream *= cosine
        vorticity *= cosine

        a, omega0 = EARTH_RADIUS, SOLID_BODY_ROTATION
        mean_tracer = EQUATOR_TEMPERATURE - POLE_TEMPERATURE_DROP * sine**2
        tracer_gradient = -2.0 * POLE_TEMPERATURE_DROP * sine  # dTbar/dmu
        psi, vo, u, v, t, lsm, latitude = out
        psi[:] = stream - a**2 * omega0 * sine
        vo[:] = vorticity + 2.0 * omega0 * sine
        u[:] = eastward / a + a * omega0 * cosine
        v[:] = northward / a
        t[:] = mean_tracer + vorticity * (tracer_gradient / PLANETARY_GRADIENT)
        lsm[:] = self._land[cells]
        latitude[:] = self.latitudes[cells]


@dataclass(frozen=True)
class _Places:
    """The cells, with the rows that share a latitude found once."""

    row: NDArray[np.int32]  # [cells], row of each cell
    cosine: Float64  # [rows], of latitude
    sine: Float64  # [rows]
    cosine_longitude: Float64  # [cells]
    sine_longitude: Float64  # [cells]

    @staticmethod
    def of(latitudes: Float64, longitudes: Float64) -> _Places:
        row_latitudes, row = np.unique(latitudes, return_inverse=True)
        latitude, longitude = np.radians(row_latitudes), np.radians(longitudes)
        return _Places(row.astype(np.int32), np.cos(latitude), np.sin(latitude), np.cos(longitude), np.sin(longitude))


def _shape(harmonic: Harmonic, places: _Places) -> Float64Pair:
    """How a harmonic varies with latitude, amplitude included, by upward recurrence in the degree.

    Returns: [rows] P_lm / cos(latitude), finite at the poles, where v needs it, and [rows] dP_lm / dlatitude.
    """
    degree, order, sine = harmonic.degree, harmonic.order, places.sine
    sectoral = math.sqrt(2.0 * math.prod((2 * k + 1) / (2 * k) for k in range(1, order + 1)))
    below, current = np.zeros_like(sine), sectoral * places.cosine ** (order - 1)
    for n in range(order + 1, degree + 1):
        factor = math.sqrt((4 * n**2 - 1) / (n**2 - order**2))
        damping = math.sqrt(((n - 1) ** 2 - order**2) / (4 * (n - 1) ** 2 - 1))
        below, current = current, factor * (sine * current - damping * below)
    coupling = math.sqrt((degree**2 - order**2) * (2 * degree + 1) / (2 * degree - 1))
    slope = coupling * below - degree * sine * current
    return harmonic.amplitude * current, harmonic.amplitude * slope


def _angles(turns: list[tuple[int, float]], places: _Places, cells: slice) -> Iterator[Float64Pair]:
    """Cosine and sine [cells] of m longitude + angle for each (m, angle), by the addition theorem alone."""
    cosine, sine = places.cosine_longitude[cells], places.sine_longitude[cells]
    multiples = [(cosine, sine)]
    for _ in range(1, max(m for m, _ in turns)):
        c, s = multiples[-1]
        multiples.append((c * cosine - s * sine, s * cosine + c * sine))
    for m, angle in turns:
        c, s = multiples[m - 1]
        cosine_angle, sine_angle = math.cos(angle), math.sin(angle)
        yield c * cosine_angle - s * sine_angle, s * cosine_angle + c * sine_angle


def _blocks(first: int, last: int) -> Iterator[slice]:
    for start in range(first, last, _BLOCK_CELLS):
        yield slice(start, min(start + _BLOCK_CELLS, last))


def _draw_waves(random: np.random.Generator) -> tuple[Harmonic, ...]:
    """Six different waves of degree 2 to 8: together 10 m/s root mean square, and 30 m/s at their peaks."""
    waves = []
    for degree, order in _draw_pairs(random, range(2, 9), 6):
        wind = random.uniform(3.0, 5.0)  # m/s, root mean square over the sphere
        amplitude = wind * EARTH_RADIUS / math.sqrt(degree * (degree + 1))
        waves.append(Harmonic(degree, order, amplitude, random.uniform(0.0, 2.0 * math.pi)))
    return tuple(waves)


def _draw_pairs(random: np.random.Generator, degrees: range, count: int) -> list[tuple[int, int]]:
    """Different (degree, order) with 1 <= order <= degree."""
    pairs = [(degree, order) for degree in degrees for order in range(1, degree + 1)]
    return [pairs[k] for k in random.choice(len(pairs), count, replace=False)]


def _land_sea_mask(random: np.random.Generator, places: _Places) -> NDArray[np.float32]:
    """Float32 [cells], 0 on sea, 1 on land, smooth between: land is where six low harmonics add up high."""
    pairs, unit_variance = _draw_pairs(random, range(1, 6), 6), 1.0 / math.sqrt(6.0)
    shapes = [_shape(Harmonic(degree, order, unit_variance, 0.0), places) for degree, order in pairs]
    turns = [(order, random.uniform(0.0, 2.0 * math.pi)) for _, order in pairs]
    land = np.empty(places.row.size, np.float32)
    for cells in _blocks(0, land.size):
        row = places.row[cells]
        height = np.zeros(row.size)
        for (over_cosine, _), (cosine_angle, _) in zip(shapes, _angles(turns, places, cells), strict=True):
            height += over_cosine[row] * cosine_angle
        height *= places.cosine[row]
        coast = np.clip((height - 0.4) / 0.2, 0.0, 1.0)  # about 30 % of the sphere is land
        land[cells] = coast**2 * (3.0 - 2.0 * coast)
    return land
