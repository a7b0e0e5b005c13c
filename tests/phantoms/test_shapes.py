import numpy as np
import pytest

from dissect_monai.phantoms.shapes import Array, Shapes, blend, minus, posed, ripples, rotation


def grid(size: int = 24, spacing: float = 5.0) -> Array:
    """Points around the origin, which is one of them."""
    line = (np.arange(size) - size // 2) * spacing
    return np.stack(np.meshgrid(line, line, line, indexing="ij")).astype(np.float32)


def shapes(seed: int = 0, points: Array | None = None) -> Shapes:
    return Shapes(grid() if points is None else points, np.random.default_rng(seed))


def test_a_ball_has_its_exact_distance() -> None:
    ball = shapes().ellipsoid((5, -10, 0), (30, 30, 30), vary=0)
    expected = np.linalg.norm(grid() - np.reshape([5, -10, 0], (3, 1, 1, 1)), axis=0) - 30
    centre = expected == -30
    np.testing.assert_allclose(ball[~centre], expected[~centre], atol=1e-3)
    assert ball[centre] < 0


def test_a_tilted_ellipsoid_has_its_surface_and_volume() -> None:
    points = grid(48, 2.5)
    local = np.einsum("ij,j...->i...", rotation((20, -30, 40)).T, points)
    solid = shapes(points=points).ellipsoid((0, 0, 0), (20, 30, 45), tilt=(20, -30, 40), vary=0)
    inside = np.linalg.norm(local / np.reshape((20, 30, 45), (3, 1, 1, 1)), axis=0) < 1
    assert ((solid < 0) != inside).mean() < 1e-4
    assert (solid < 0).sum() * 2.5**3 == pytest.approx(4 / 3 * np.pi * 20 * 30 * 45, rel=0.02)


def test_a_tube_is_round_and_tapers() -> None:
    tube = shapes().tube([(0, 0, -40), (0, 0, 40)], (20, 10), vary=0)
    x, y, z = grid()
    between = np.abs(z) <= 40
    np.testing.assert_allclose(tube[between], (np.hypot(x, y) - 15 + z / 8)[between], atol=1e-3)
    assert tube[12, 12, 0] == pytest.approx(0, abs=1e-3)  # 60 mm below, at the end of the round cap


def test_a_column_is_the_same_at_every_height() -> None:
    column = shapes().column((10, 0), (30, 20), vary=0)
    np.testing.assert_allclose(column, np.broadcast_to(column[..., :1], column.shape), atol=0.2)
    assert column[12 + 7, 12, 0] < 0 < column[12 + 9, 12, 0]


def test_blend_holds_its_solids_and_minus_keeps_away_from_them() -> None:
    first, second = (shapes().ellipsoid((x, 0, 0), (25, 25, 25), vary=0) for x in (-20, 20))
    union = blend(10, first, second)
    assert (union <= np.minimum(first, second)).all()
    apart = np.abs(first - second) > 10
    np.testing.assert_array_equal(union[apart], np.minimum(first, second)[apart])
    rest = minus(first, second, gap=6)
    np.testing.assert_array_equal(rest < 0, (first < 0) & (second > 6))


def test_ripples_have_zero_mean_unit_variance_and_their_wavelength() -> None:
    points = grid(48, 5.0)
    field, other = ripples(points, 30, np.random.default_rng(0), num_fields=2)
    assert (field.mean(), field.std()) == pytest.approx((0, 1), abs=0.1)
    assert abs(np.corrcoef(field.ravel(), other.ravel())[0, 1]) < 0.6
    gradient = np.stack(np.gradient(ripples(points, 60, np.random.default_rng(0))[0], 5.0))
    assert np.sqrt((gradient**2).sum(0).mean()) == pytest.approx(2 * np.pi / 60, rel=0.15)


def test_solids_and_poses_vary_with_the_seed_but_little() -> None:
    balls = [shapes(seed).ellipsoid((0, 0, 0), (30, 30, 30)) < 0 for seed in range(20)]
    sizes = [ball.sum() for ball in balls]
    assert 0.03 < np.std(sizes) / np.mean(sizes) < 0.4
    assert all(ball[12, 12, 12] for ball in balls)
    moved = [posed(grid(), np.random.default_rng(seed)) - grid() for seed in range(20)]
    assert 3 < np.mean([np.linalg.norm(shift, axis=0).mean() for shift in moved]) < 30


def test_rotation_is_orthonormal_and_turns_about_x_first() -> None:
    turn = rotation((25, -40, 70))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)
    np.testing.assert_allclose(rotation((90, 0, 90)) @ (0, 1, 0), (0, 0, 1), atol=1e-12)
    np.testing.assert_allclose(rotation((90, 0, 90)) @ (1, 0, 0), (0, 1, 0), atol=1e-12)
