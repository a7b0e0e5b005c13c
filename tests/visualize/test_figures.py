from __future__ import annotations

import pytest
import torch

from dissect_monai.visualize.training import MASK_COLOR, code_colors, code_figure, show_mask, view_figure


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


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_codes_stand_beside_their_images(spatial_dims: int) -> None:
    images = torch.rand(2, 1, *[8] * spatial_dims)
    indices = [torch.randint(16, (2, *[side] * spatial_dims)) for side in (4, 2)]
    figure = code_figure(images, indices, [torch.randn(16, 4), torch.randn(16, 4)], min_side=8)
    assert figure.shape == (3, 2 * 8, 3 * 8)
    assert ((figure >= 0) & (figure <= 1)).all()


def test_a_code_colours_the_place_that_it_describes() -> None:
    codebook = torch.randn(4, 3)
    indices = torch.zeros(1, 2, 2, dtype=torch.long)
    indices[0, 1, 0] = 3  # second along x, first along y
    codes = code_figure(torch.zeros(1, 1, 4, 4), [indices], [codebook], min_side=1)[:, :, 4:]
    colors = code_colors(codebook)
    assert torch.equal(codes[:, 0, 3], colors[3])
    assert torch.equal(codes[:, 3, 0], colors[0])


def test_views_stand_side_by_side_with_x_to_the_right() -> None:
    first = torch.arange(6).view(1, 1, 3, 2) / 10  # x, y
    figure = view_figure([first, 1 - first], min_side=1)
    assert figure.shape == (3, 2, 6)
    torch.testing.assert_close(figure[0, :, :3], first[0, 0].T)
    torch.testing.assert_close(figure[2, :, 3:], 1 - first[0, 0].T)


def test_a_volume_is_shown_by_its_middle_slice() -> None:
    volume = torch.zeros(1, 1, 4, 4, 5)
    volume[..., 2] = 1
    assert torch.equal(view_figure([volume], min_side=1), torch.ones(3, 4, 4))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels_can_be_shown(channels: int) -> None:
    images = torch.rand(1, channels, 4, 4)
    figure = view_figure([images], min_side=1)
    assert torch.equal(figure[0], images[0, 0].T)
    assert torch.equal(figure[1], images[0, 1 if channels >= 3 else 0].T)


def test_values_out_of_range_are_clipped() -> None:
    assert torch.equal(
        view_figure([torch.tensor([-1.0, 2]).view(1, 1, 2, 1)], min_side=1)[0, 0], torch.tensor([0.0, 1])
    )


def test_small_images_are_enlarged_smoothly_and_code_maps_by_their_cells() -> None:
    images, indices = torch.rand(2, 1, 48, 24), torch.arange(12).view(2, 3, 2)
    figure = code_figure(images, [indices], [torch.randn(12, 4)])
    assert figure.shape == (3, 2 * 64, 2 * 128)  # 24 rows become 64, 48 columns 128
    codes, smooth = figure[:, :, 128:], figure[0, :, :128]
    assert len(codes.flatten(1).unique(dim=1).T) == 12
    assert len(smooth.unique()) > 2 * 24 * 48
    assert smooth.mean() == pytest.approx(float(images.mean()), abs=0.01)


@pytest.mark.parametrize("side", [128, 224])
def test_images_that_are_large_enough_stay_as_they_are(side: int) -> None:
    images = torch.rand(1, 1, side, 40)
    assert torch.equal(view_figure([images])[0], images[0, 0].T)


def test_a_gap_is_white_and_parts_neighbours() -> None:
    figure = view_figure([torch.zeros(2, 1, 4, 6)] * 3, min_side=1, gap=2)
    assert figure.shape == (3, 2 * (6 + 2), 3 * (4 + 2))
    assert (figure[:, :6, :4] == 0).all()
    assert (figure[:, 6:8] == 1).all()
    assert (figure[:, :, 4:6] == 1).all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_masked_voxels_are_blue_and_all_others_grey(spatial_dims: int) -> None:
    images = torch.rand(2, 1, *[4] * spatial_dims)
    masked = torch.rand(images.shape) < 0.5
    shown = show_mask(images, masked).movedim(1, -1)
    hidden = masked.squeeze(1)
    torch.testing.assert_close(shown[hidden], torch.tensor(MASK_COLOR).expand(int(hidden.sum()), 3))
    torch.testing.assert_close(shown[~hidden], images.squeeze(1)[~hidden].unsqueeze(1).expand(-1, 3))
    assert torch.equal(show_mask(images, None)[:, 2:], images)
