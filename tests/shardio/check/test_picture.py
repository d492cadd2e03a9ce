"""The picture shows the cells there are."""

import numpy as np
import pytest
import zarr

from shardio.check.picture import draw, limits, unbroken
from shardio.source.synthetic import octahedral


def shown(latitudes, longitudes):
    """West, east, south and north edge of the picture."""
    return *limits(unbroken(np.asarray(longitudes)), 180), *limits(np.asarray(latitudes), 90)


@pytest.mark.parametrize("grid", ["o4", "o32"])
@pytest.mark.parametrize("turn", [0, -180])
def test_the_globe_is_shown_whole(grid, turn):
    latitudes, longitudes, _ = octahedral(grid)
    assert shown(latitudes, longitudes + turn) == (-180, 180, -90, 90)


def test_a_belt_is_shown_around_the_globe():
    longitudes = np.tile(np.arange(0, 360, 10.0), 5)
    assert shown(np.repeat([-20, -10, 0, 10, 20.0], 36), longitudes) == pytest.approx((-180, 180, -21.2, 21.2))


@pytest.mark.parametrize("west", [-170, -30, 0, 100, 170, 340])
def test_a_limited_area_is_shown_closely_also_across_the_dateline(west):
    latitudes, longitudes = np.meshgrid(np.linspace(40, 60, 41), (west + np.linspace(0, 30, 61)) % 360)
    left, right, south, north = shown(latitudes.ravel(), longitudes.ravel())
    assert right - left == pytest.approx(31.8)
    assert left % 360 == pytest.approx((west - 0.9) % 360)
    assert (south, north) == pytest.approx((39.4, 60.6))


def test_one_cell_has_a_picture_too():
    assert shown([10.0], [20.0]) == (19, 21, 9, 11)


def test_a_limited_area_is_drawn(build, tmp_path):
    made = build(tmp_path / "a.zarr", shape=(1, 1, 1, 600), chunks=(1, 1, 1, 600))
    group = zarr.open_group(made.path, mode="r+", use_consolidated=False)
    latitudes, longitudes = np.meshgrid(np.linspace(45, 47, 20), np.linspace(359, 362, 30) % 360, indexing="ij")
    group["latitudes"][...], group["longitudes"][...] = latitudes.ravel(), longitudes.ravel()
    draw(str(made.path), "v_0", None, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
