import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer, sliding_window_inference
from torch import Tensor, nn

from dissect_monai.inferers import AutocastInferer, WindowInferer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv3d(1, 3, 3, padding=1).requires_grad_(False)


def volume(*shape: int) -> Tensor:
    return torch.randn(1, 1, *(shape or (8, 8, 8)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(8, 8, 8), (11, 9, 6), (3, 8, 12)])
@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_it_is_monais_sliding_window_whatever_the_layout_of_the_network(shape: tuple[int, ...], overlap: float) -> None:
    expected = sliding_window_inference(
        volume(*shape), (6, 6, 6), 4, network(), overlap=overlap, mode="gaussian", padding_mode="constant"
    )
    inferer, laid_out = WindowInferer((6, 6, 6), overlap=overlap), network().to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(inferer(volume(*shape), network()), expected)
    torch.testing.assert_close(inferer(volume(*shape), laid_out), inferer(volume(*shape), network()), rtol=0, atol=0)


def network_2d() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(1, 3, 3, padding=1).requires_grad_(False)


@pytest.mark.parametrize("max_voxels", [1, 2**25])
@pytest.mark.parametrize("shape", [(8, 8, 20), (11, 9, 6), (3, 8, 1)])
def test_a_2d_network_sees_slice_by_slice_as_monais_slice_inferer(
    shape: tuple[int, ...], max_voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dissect_monai.inferers.MAX_VOXELS", max_voxels)
    monai = SliceInferer(spatial_dim=2, roi_size=(6, 6), sw_batch_size=1, overlap=0.5, mode="gaussian")
    affine = torch.diag(torch.tensor([2.0, 3, 5, 1], dtype=torch.float64))
    both = torch.cat([volume(*shape), volume(*shape).flip(2)])
    image = MetaTensor(both, affine=affine, meta={"filename_or_obj": "a"})
    result = WindowInferer((6, 6))(image, network_2d())
    torch.testing.assert_close(result.as_tensor(), monai(image.as_tensor(), network_2d()))
    np.testing.assert_allclose(result.affine, affine)
    assert result.meta["filename_or_obj"] == "a"
    assert type(WindowInferer((6, 6))(image.as_tensor(), network_2d())) is Tensor


@pytest.mark.parametrize("max_voxels", [1, 2**25])
def test_logits_keep_the_metadata_of_the_volume(max_voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dissect_monai.inferers.MAX_VOXELS", max_voxels)  # of larger ones, the CPU holds the logits
    affine = torch.tensor([[0.0, 2, 0, -5], [-1.5, 0, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]], dtype=torch.float64)
    image = MetaTensor(volume(9, 8, 7), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    inferer = WindowInferer((6, 6, 6))
    assert inferer.cpu_thresh == max_voxels
    result = inferer(image, network())
    np.testing.assert_allclose(result.affine, affine)
    assert result.meta["filename_or_obj"] == "a.nii.gz"
    torch.testing.assert_close(result.as_tensor(), inferer(volume(9, 8, 7), network()))


@pytest.mark.parametrize("amp", [False, True])
def test_the_network_runs_in_bfloat16_if_wanted_and_gets_further_arguments(amp: bool) -> None:
    given = []

    def remember(windows: Tensor, scale: float, shift: float = 0) -> Tensor:
        logits = network()(windows)
        given.append((logits.dtype, scale, shift))
        return logits

    result = WindowInferer((8, 8, 8), amp=amp)(volume(), remember, 2.0, shift=3.0)
    assert given == [(torch.bfloat16 if amp else torch.float32, 2.0, 3.0)]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, network()(volume()), rtol=0, atol=0.05 if amp else 1e-6)


def test_autocast_is_off_if_not_wanted() -> None:
    image = volume()
    assert AutocastInferer()(image, network()).dtype == torch.bfloat16
    torch.testing.assert_close(AutocastInferer(amp=False)(image, network()), network()(image), rtol=0, atol=0)
