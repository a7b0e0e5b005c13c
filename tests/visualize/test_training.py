import pytest
import torch

from dissect_monai.visualize import training
from dissect_monai.visualize.training import MASK_COLOR, TILE_SIDE, code_colors, code_figure, show_mask, view_figure


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is enlarged."""
    monkeypatch.setattr(training, "TILE_SIDE", 1)


@pytest.mark.parametrize(("num_embeddings", "embedding_dim"), [(16, 8), (1, 8), (2, 8), (16, 1), (16, 2)])
def test_every_code_has_a_colour(num_embeddings: int, embedding_dim: int) -> None:
    colors = code_colors(torch.randn(num_embeddings, embedding_dim))
    assert colors.shape == (num_embeddings, 3)
    assert ((colors >= 0) & (colors <= 1)).all()


def test_codes_on_a_line_have_their_colours_in_its_order() -> None:
    codes = torch.tensor([0.0, 1, 2, 50]).unsqueeze(1) * torch.tensor([1.0, 2, 3])
    red = code_colors(codes)[:, 0]
    torch.testing.assert_close(red.sort().values, torch.arange(4) / 3)
    assert (red.diff() > 0).all() or (red.diff() < 0).all()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("depth", [(), (3,)])
def test_codes_stand_beside_their_images_and_colour_the_places_that_they_describe(depth: tuple[int, ...]) -> None:
    codebook = torch.randn(4, 3)
    indices = torch.zeros(2, 2, 2, *depth, dtype=torch.long)
    indices[0, 1, 0] = 3  # second along x, first along y
    figure = code_figure(torch.zeros(2, 1, 4, 4, *depth), [indices, indices[:, :1, :1]], [codebook, codebook])
    assert figure.shape == (3, 2 * 4, 3 * 4)
    corners = figure[:, 0, 4 + 3], figure[:, 3, 4]
    there, elsewhere = corners[::-1] if depth else corners  # volumes are seen from below
    assert torch.equal(there, code_colors(codebook)[3])
    assert torch.equal(elsewhere, code_colors(codebook)[0])


@pytest.mark.usefixtures("small")
def test_views_stand_side_by_side_with_x_to_the_right_and_are_clipped() -> None:
    first = torch.arange(6).view(1, 1, 3, 2) / 5 - 0.2  # x, y
    figure = view_figure([first, 1 - first])
    assert figure.shape == (3, 2, 6)
    torch.testing.assert_close(figure[0, :, :3], first[0, 0].T.clamp(0, 1))
    torch.testing.assert_close(figure[2, :, 3:], (1 - first[0, 0].T).clamp(0, 1))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_three_channels_are_colours_and_a_volume_is_shown_by_its_middle_slice(channels: int) -> None:
    images = torch.rand(1, channels, 4, 4, 5)
    figure = view_figure([images])
    assert torch.equal(figure, view_figure([images.flip(2, 3)[..., 2]]))
    assert torch.equal(view_figure([images[..., 0]])[1], images[0, 1 if channels >= 3 else 0, ..., 0].T)


def test_small_images_are_enlarged_smoothly_and_code_maps_by_their_cells() -> None:
    images, indices = torch.rand(2, 1, 48, 24), torch.arange(12).view(2, 3, 2)
    figure = code_figure(images, [indices], [torch.randn(12, 4)])
    assert figure.shape == (3, 2 * TILE_SIDE // 2, 2 * TILE_SIDE)
    codes, smooth = figure[:, :, TILE_SIDE:], figure[0, :, :TILE_SIDE]
    assert len(codes.flatten(1).unique(dim=1).T) == 12
    assert len(smooth.unique()) > 2 * 24 * 48
    assert smooth.mean() == pytest.approx(float(images.mean()), abs=0.01)


@pytest.mark.parametrize("volume", [False, True])
def test_slices_are_seen_from_below(volume: bool) -> None:
    images = torch.rand(2, 1, 200, 210)
    figure = view_figure([images[..., None] if volume else images] * 3, slices=True)
    assert figure.shape == (3, 2 * 210, 3 * 200)
    assert torch.equal(figure[0, :210, :200], images[0, 0].flip(0, 1).T)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_masked_voxels_are_blue_and_all_others_grey(spatial_dims: int) -> None:
    images = torch.rand(2, 1, *[4] * spatial_dims)
    masked = torch.rand(images.shape) < 0.5
    shown = show_mask(images, masked).movedim(1, -1)
    hidden = masked.squeeze(1)
    torch.testing.assert_close(shown[hidden], torch.tensor(MASK_COLOR).expand(int(hidden.sum()), 3))
    torch.testing.assert_close(shown[~hidden], images.squeeze(1)[~hidden].unsqueeze(1).expand(-1, 3))
    assert torch.equal(show_mask(images, None)[:, 2:], images)


def test_what_columns_and_rows_show_is_written_into_the_picture_and_covers_none_of_it() -> None:
    images, captions = torch.rand(2, 1, 300, 300), ["first view", "first view, decoded from its codes, which are many"]
    plain, figure = view_figure([images] * 2), view_figure([images] * 2, captions)
    above = next(row for row in range(figure.shape[1]) if torch.equal(figure[:, row : row + 600], plain))
    below = figure[:, above + 600 :]
    for text in (figure[:, :above, :300], figure[:, :above, 300:], below):
        assert text.max() > 0.9  # white
        assert (text == 0).float().mean() > 0.6  # on black
    other = view_figure([images] * 2, [captions[1], captions[0]])
    assert other.shape == figure.shape
    assert not torch.equal(other, figure)
