from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandCropByPosNegLabeld

from dissect_monai.common import PICTURE
from dissect_monai.transforms.intensity import (
    ForegroundIndicesd,
    NormalizeModalityd,
    RandForegroundCropd,
    is_ct,
    sample_voxels,
)


def normalized(image: Any, modality: str | None = "MR", **arguments: Any) -> torch.Tensor:
    item = {"image": torch.as_tensor(image, dtype=torch.float32), "modality": modality, "other": 3}
    result = NormalizeModalityd("image", **arguments)(item)
    assert (result["modality"], result["other"]) == (modality, 3)
    return result["image"]


def body(air: float = 0.0, noise: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """A cube of values from 100 to 200 in the middle of three times as much air."""
    rng = np.random.default_rng(0)
    image = air + noise * rng.random((1, 16, 16, 16))
    image[:, 3:13, 3:13, 3:13] = rng.uniform(100, 200, (1, 10, 10, 10))
    return torch.as_tensor(image * scale)


def test_ct_is_scaled_by_its_window() -> None:
    hounsfield = [[-1000.0, -125.0, -25.0, 75.0, 275.0, 3000.0]]
    expected = torch.tensor([[0, 0, 0.25, 0.5, 1, 1]])
    torch.testing.assert_close(normalized(hounsfield, "CT"), expected)
    torch.testing.assert_close(normalized(hounsfield, "ct angiography"), expected)
    torch.testing.assert_close(normalized(hounsfield, "CT", b_max=255), expected * 255)
    window = torch.tensor([[0, 0.875, 0.975, 1, 1, 1]])
    torch.testing.assert_close(normalized(hounsfield, "CT", a_min=-1000, a_max=0), window)


@pytest.mark.parametrize("modality", ["MR", "unknown", "PET", None])
def test_other_modalities_are_scaled_by_their_own_percentiles(modality: str | None) -> None:
    image = normalized(body(), modality)
    inside = image[:, 3:13, 3:13, 3:13]
    assert (image.min(), image.max()) == (0, 1)
    assert float(inside.mean()) == pytest.approx(0.5, abs=0.02)
    assert float((inside == 0).float().mean()) == pytest.approx(0.005, abs=0.003)
    assert float((inside == 1).float().mean()) == pytest.approx(0.005, abs=0.003)


@pytest.mark.parametrize(("air", "noise", "scale"), [(0, 8, 1), (-7, 5, 1), (0, 0, 1e-3), (0, 3, 50)])
def test_amount_and_noise_of_air_unit_and_outliers_do_not_count(air: float, noise: float, scale: float) -> None:
    plain, other = normalized(body()), normalized(body(air, noise, scale))
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-3)
    assert (other[:, 0] == 0).all()
    without_air = normalized(body()[:, 3:13, 3:13, 3:13])
    torch.testing.assert_close(without_air, plain[:, 3:13, 3:13, 3:13], rtol=0, atol=0.06)
    outliers = body()
    outliers[0, 5, 5, 5:8] = 10_000
    assert float((normalized(outliers) - plain).abs().median()) < 0.01


def test_a_volume_mostly_of_air_keeps_its_contrast() -> None:
    image = torch.zeros(1, 40, 40, 40)
    image[0, :3, :3, :3] = torch.arange(1, 28).view(3, 3, 3)
    assert float(normalized(image).max()) == 1
    assert len(normalized(image).unique()) > 20


@pytest.mark.parametrize(
    ("values", "modality"), [([[5.0] * 9], "MR"), ([[-1000.0, -125.0]], "CT"), ([[0.0] * 9], None)]
)
def test_a_volume_of_one_value_is_refused(values: Any, modality: str | None) -> None:
    with pytest.raises(ValueError, match=r"must have values between .*: correct its modality or window, or remove it"):
        normalized(values, modality)


def test_only_hounsfield_units_are_ct() -> None:
    assert all(map(is_ct, ["CT", " ct", "CTA"]))
    assert not any(map(is_ct, ["CBCT", "MR", "T1", "unknown", None, ""]))


def test_a_sample_has_the_percentiles_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(size=(150, 128, 128)) + np.linspace(0, 3, 128)
    sample = sample_voxels(values)
    assert sample.size < 2**20
    np.testing.assert_allclose(np.percentile(sample, [1, 50, 99]), np.percentile(values, [1, 50, 99]), atol=0.02)
    assert sample_voxels(np.ones((5, 5))).size == 25


def test_every_channel_is_scaled_by_its_own_modality() -> None:
    hounsfield = torch.linspace(-200, 400, body().numel()).view_as(body())
    both = torch.cat([hounsfield, body(scale=7).float()])
    expected = [normalized(hounsfield, "CT"), normalized(body(scale=7), "MR")]
    for names in (["CT", "MR"], ("CT", None)):
        torch.testing.assert_close(normalized(both, names), torch.cat(expected))
    swapped = normalized(both.flip(0), ["MR", "CT"])
    torch.testing.assert_close(swapped, torch.cat(expected).flip(0))


def test_channels_keep_metadata_and_fractions_of_whatever_type_they_come() -> None:
    values = torch.stack([torch.linspace(-200, 400, 60).view(3, 4, 5), torch.arange(60.0).view(3, 4, 5)])
    image = MetaTensor(values.to(torch.int16), affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    result = NormalizeModalityd("image")({"image": image, "modality": ["CT", "MR"]})["image"]
    assert isinstance(result, MetaTensor)
    np.testing.assert_allclose(result.pixdim, [1, 2, 3])
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    expected = NormalizeModalityd("image")({"image": image[1:], "modality": "MR"})["image"]
    torch.testing.assert_close(result[1:].as_tensor(), expected.as_tensor())


@pytest.mark.parametrize("modality", ["CT", ["CT", "MR", "PET"]])
def test_another_number_of_channels_than_modalities_is_refused(modality: Any) -> None:
    message = r"a channel for each of the modalities CT.*, got 2: correct `modality` in dataset\.json"
    with pytest.raises(ValueError, match=message):
        normalized(torch.cat([body(), body()]), modality)


def test_items_that_say_no_modality_have_the_one_that_is_given() -> None:
    hounsfield = torch.tensor([[-1000.0, -125.0, -25.0, 75.0, 275.0, 3000.0]])
    both = NormalizeModalityd("image", modality=["CT", "CT"])({"image": torch.cat([hounsfield] * 2)})["image"]
    torch.testing.assert_close(both, torch.cat([normalized(hounsfield, "CT")] * 2))
    own = NormalizeModalityd("image", modality="CT")({"image": body(), "modality": "MR"})["image"]
    torch.testing.assert_close(own, normalized(body(), "MR"))


def body_in_air() -> dict[str, Any]:
    image = torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    image[:, 4:9, 6:12, 3:5] = 7
    return {"image": image}


def test_patches_are_centred_where_a_volume_is_not_air(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dissect_monai.transforms.intensity._MAX_INDICES", 17)
    item = ForegroundIndicesd("image")({**body_in_air(), "other": 3})
    places, image = item["image_fg_indices"], item["image"]
    assert (len(places), item["other"]) == (17, 3)
    assert (image.flatten()[places] == 7).all()
    columns = np.unravel_index(places, (20, 20, 20))
    assert [len(np.unique(axis)) for axis in columns] == [5, 6, 2]
    crop = RandForegroundCropd("image", (1, 1, 1)).set_random_state(0)
    assert all((crop(dict(item))[0]["image"] == 7).all() for _ in range(20))
    single = {**item, "image_fg_indices": places[:1], "image_bg_indices": places[:1]}
    marked = image.clone()
    marked.flatten()[places[0]] = 9
    assert crop({**single, "image": marked})[0]["image"] == 9


def test_patches_are_those_of_monais_crop() -> None:
    item = {"image": torch.arange(9 * 8 * 7).view(1, 9, 8, 7) % 251}
    item = ForegroundIndicesd("image")(item)
    plain = {key: value for key, value in item.items() if key != "image_range"}
    keys = {"fg_indices_key": "image_fg_indices", "bg_indices_key": "image_bg_indices"}
    theirs = RandCropByPosNegLabeld("image", "image", (4, 3, 2), neg=0, num_samples=3, **keys).set_random_state(0)
    ours = RandForegroundCropd("image", (4, 3, 2), 3).set_random_state(0)
    for found, expected in zip(ours(item), theirs(plain), strict=True):
        assert torch.equal(found["image"], expected["image"])
        assert {*found} == {"image", "place"}


@pytest.mark.parametrize("size", [(4, 3, 2), (5, 20, 1), (1, 1, 1)])
def test_the_place_of_a_patch_is_that_of_its_centre_across_the_slices_of_the_foreground(size: Any) -> None:
    item = {**body_in_air(), "position": torch.arange(20.0).expand(1, 20, 20, 20)}
    crop = RandForegroundCropd(["image", "position"], size, 30)
    patches = crop.set_random_state(0)(ForegroundIndicesd("image")(item))
    for patch in patches:
        place = (patch["position"].mean() + 0.5 - 3) / (5 - 3)  # the body is in the fourth and fifth slice
        torch.testing.assert_close(patch["place"], place.clamp(0, 1))
    assert len({float(patch["place"]) for patch in patches}) > 1


def test_every_place_of_a_small_volume_is_kept_and_one_of_air_refused() -> None:
    image = torch.zeros(2, 3, 3, 3)
    with pytest.raises(ValueError, match="must have voxels above 0 after scaling, got none"):
        ForegroundIndicesd("image")({"image": image})
    image[1, 1, 1, 1] = 0.5
    assert ForegroundIndicesd("image")({"image": image})["image_fg_indices"].tolist() == [13]


# --- units of CT


def scan(**shares: float) -> np.ndarray:
    """HU of as many thousands of voxels of each tissue."""
    means = {"padding": -2000, "air": -1000, "lung": -850, "fat": -100, "tissue": 50, "vessel": 250, "bone": 1050}
    rng = np.random.default_rng(0)
    widths = {"bone": 750}  # evenly from 300 to 1800
    parts = [
        means[name] + rng.uniform(-1, 1, int(1000 * share)) * widths.get(name, 40) for name, share in shares.items()
    ]
    return np.concatenate(parts).round()[None]


CHEST = scan(air=30, lung=25, fat=10, tissue=30, vessel=2, bone=3)
ABDOMEN = scan(air=20, fat=35, tissue=40, bone=5)


@pytest.mark.parametrize("image", [CHEST, ABDOMEN, scan(tissue=9, vessel=1), scan(air=96, tissue=4)])
@pytest.mark.parametrize(("offset", "modality"), [(1000, "CT"), (1024, "cta")])
def test_ct_without_its_intercept_is_refused(image: np.ndarray, offset: int, modality: str) -> None:
    stored = image + offset
    # As scanners have it beside the field of view, and resampling around a volume, here with values between the two.
    beside = [[np.full((1, 9000), value)] for value in (-2000, -1024, -1000)]
    beside += [[*beside[0], *beside[1]], [*beside[1], np.linspace(-1024, 1000, image.size // 50)[None]]]
    for padding in ([stored.clip(0)], [], *beside):
        with pytest.raises(ValueError, match=r"a volume is listed as CT, .* without the intercept: subtract 1024"):
            normalized(np.concatenate([*padding, stored], 1), modality)
    if image.min() < -500:
        with pytest.raises(ValueError, match="air at about -2000, as with the intercept twice: add 1024"):
            normalized(image - offset, modality)
    normalized(image + offset, "OT")


@pytest.mark.parametrize("window", [(-2000, 3000), (-160, 240), (-160, 2000), (0, 80), (0, 2000), (-1000, 1000)])
def test_ct_that_is_cropped_or_clipped_to_a_window_is_none_of_it(
    window: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    bony, masked = scan(tissue=5, bone=5), scan(padding=3, tissue=7)
    masked_again = np.concatenate([np.full((1, 9000), -1024), CHEST], 1)
    others = (masked, masked_again, bony, scan(lung=10, tissue=1), np.maximum(CHEST, -1024))
    for image in (CHEST, ABDOMEN, scan(tissue=1), scan(fat=5, tissue=5), *others):
        assert len(normalized(image.clip(*window), "CT").unique()) > 1
    assert not caplog.records


def test_ct_in_other_units_is_refused_or_told(caplog: pytest.LogCaptureFixture) -> None:
    for image, message in (
        ((CHEST + 1024) / 3000, "as after rescaling"), (CHEST + 32768, "above 5000"), (CHEST % 65536, "above 5000"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{message}: write its HU anew"):
            normalized(image, "CT")
    normalized(((CHEST + 160) / 400 * 255).clip(0, 255).round(), "CT")
    assert "a volume is listed as CT and has values from 0 to 255, as greys do: are they HU?" in caplog.text


@pytest.mark.parametrize("modality", ["picture", "CT", "MR"])
def test_pictures_of_8_bits_keep_their_values_and_deeper_ones_their_colours(modality: str) -> None:
    values = torch.arange(256.0).view(1, 16, 16, 1)
    shallow = MetaTensor(values, meta={PICTURE: 255})
    assert torch.equal(normalized(shallow, modality, b_max=255).as_tensor(), values)
    torch.testing.assert_close(normalized(shallow, modality).as_tensor(), values / 255)
    deep = MetaTensor(torch.cat([values * 200, values * 100]), meta={PICTURE: 0})
    red, green = normalized(deep, modality)
    middle = (red > 0.05) & (red < 0.95)
    assert float((red[middle] / green[middle]).median()) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("bright", [0.0, 900.0])
def test_deep_pictures_of_one_value_or_nearly_are_scaled_from_their_least(bright: float) -> None:
    image = torch.full((1, 40, 40, 1), 500.0)
    image[0, 0, 0] += bright
    expected = (image > 500).float()
    assert torch.equal(normalized(MetaTensor(image, meta={PICTURE: 0})).as_tensor(), expected)


def test_grey_volumes_are_repeated_for_networks_of_colours_and_channels_are_not() -> None:
    torch.testing.assert_close(normalized(body(), "MR", in_channels=3), normalized(body(), "MR").repeat(3, 1, 1, 1))
    torch.testing.assert_close(normalized(body(), "MR", in_channels=1), normalized(body(), "MR"))


def test_pictures_have_no_place() -> None:
    item = ForegroundIndicesd("image")({**body_in_air(), "slice_axis": PICTURE})
    (patch,) = RandForegroundCropd("image", (4, 4, 1))(item)
    assert patch["place"].isnan()


def test_a_foreground_of_one_slice_has_no_place() -> None:
    item = body_in_air()
    item["image"][..., 4:] = 0
    (patch,) = RandForegroundCropd("image", (4, 4, 1))(ForegroundIndicesd("image")(item))
    assert patch["place"].isnan()
