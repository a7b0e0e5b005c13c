from functools import cache

import nibabel as nib
import numpy as np
import pytest

from dissect_monai.phantoms.scans import SCANS, VolumePhantom, scan_phantom

TASKS = tuple(SCANS)
every_task = pytest.mark.parametrize("task", TASKS)


def volume_phantom(task: str, seed: int, image_size: int = 48) -> VolumePhantom:
    return scan_phantom(SCANS[task], [TASKS.index(task), seed], image_size)


@cache
def drawn(task: str, seed: int = 0) -> VolumePhantom:
    """Of the default size; do not change it."""
    return volume_phantom(task, seed)


def mask(phantom: VolumePhantom, task: str, name: str) -> np.ndarray:
    return phantom.label == SCANS[task].labels.index(name) + 1


def centre(phantom: VolumePhantom, task: str, name: str) -> np.ndarray:
    """Right, anterior, superior in mm."""
    return nib.affines.apply_affine(phantom.affine, np.argwhere(mask(phantom, task, name)).mean(0))


def volume(phantom: VolumePhantom, task: str, name: str) -> float:
    """In ml."""
    return mask(phantom, task, name).sum() * abs(np.linalg.det(phantom.affine[:3, :3])) / 1000


def best_threshold_dice(image: np.ndarray, organ: np.ndarray) -> float:
    """The highest Dice that any interval of intensities reaches."""
    edges = np.unique(np.quantile(image, np.linspace(0, 1, 101)))
    inside, found = (np.r_[0, np.histogram(values, edges)[0].cumsum()] for values in (image[organ], image))
    hits, size = inside[None] - inside[:, None], found[None] - found[:, None]
    return float((2 * hits / np.maximum(size + organ.sum(), 1))[size > 0].max())


@every_task
@pytest.mark.parametrize("image_size", [24, 48])
def test_phantom_has_its_types_and_its_longest_side(task: str, image_size: int) -> None:
    phantom = volume_phantom(task, 0, image_size)
    assert (phantom.image.dtype, phantom.label.dtype) == (np.int16, np.uint8)
    assert phantom.image.shape == phantom.label.shape
    assert max(phantom.image.shape) == image_size
    assert min(phantom.image.shape) >= 5


@every_task
def test_every_label_is_present_and_no_other(task: str) -> None:
    for seed in range(4):
        values, counts = np.unique(drawn(task, seed).label, return_counts=True)
        assert values.tolist() == list(range(len(SCANS[task].labels) + 1))
        assert counts.min() >= 8


def test_the_subject_is_the_same_on_another_grid() -> None:
    small, large, other = (volume_phantom("abdomen_ct", seed, size) for seed, size in ((1, 32), (1, 64), (2, 64)))
    for organ in ("liver", "stomach", "right_kidney", "spleen"):
        size = volume(large, "abdomen_ct", organ)
        assert volume(small, "abdomen_ct", organ) == pytest.approx(size, rel=0.15)
        assert volume(other, "abdomen_ct", organ) != pytest.approx(size, rel=0.001)


def test_organs_have_human_sizes() -> None:
    expected = {
        "liver": (900, 2500), "right_kidney": (80, 300), "left_kidney": (80, 300), "spleen": (70, 350),
        "gallbladder": (15, 80), "esophagus": (10, 40), "aorta": (60, 140), "inferior_vena_cava": (60, 160),
        "portal_and_splenic_veins": (15, 50), "pancreas": (40, 120), "right_adrenal_gland": (5, 20),
        "left_adrenal_gland": (5, 20),
    }  # fmt: skip
    for name, (low, high) in expected.items():
        assert low < np.mean([volume(drawn("abdomen_ct", seed), "abdomen_ct", name) for seed in range(4)]) < high


def test_anatomy_lies_where_it_should_in_scanner_coordinates() -> None:
    for seed in range(3):
        for task in ("abdomen_ct", "abdomen_mr"):
            phantom = drawn(task, seed)
            liver, spleen = (centre(phantom, task, name) for name in ("liver", "spleen"))
            right, left = (centre(phantom, task, f"{side}_kidney") for side in ("right", "left"))
            assert min(liver[0], right[0]) > max(spleen[0], left[0]) + 60
            assert min(liver[2], spleen[2]) > max(right[2], left[2])
            assert liver[1] > max(right[1], left[1])
        for task in ("head_ct", "head_mr"):
            phantom = drawn(task, seed)
            cerebrum, cerebellum, stem, right, left = (
                centre(phantom, task, name) for name in ("cerebrum", "cerebellum", "brainstem", "right_eye", "left_eye")
            )
            assert right[0] > cerebrum[0] + 15 > cerebrum[0] - 15 > left[0]
            assert min(right[1], left[1]) > cerebrum[1] + 30 > stem[1] > cerebellum[1]
            assert cerebrum[2] > cerebellum[2] + 20


def test_tissues_have_their_hounsfield_units() -> None:
    phantoms = [drawn("abdomen_ct", seed) for seed in range(4)]
    for image in (drawn(task, seed).image for task in ("abdomen_ct", "head_ct") for seed in range(3)):
        assert -1024 <= image.min() < -1000 < 400 < image.max() <= 3071
        assert np.median(image[image < -900]) == pytest.approx(-1000, abs=30)  # air
        assert (image > 300).mean() > 0.01  # bone

    def typical(name: str) -> float:
        return float(np.median(np.concatenate([p.image[mask(p, "abdomen_ct", name)] for p in phantoms])))

    for name in ("liver", "spleen", "right_kidney", "left_kidney", "aorta", "inferior_vena_cava"):
        assert 40 < typical(name) < 130
    assert 0 < typical("gallbladder") < 40
    between = np.concatenate([p.image[(p.label == 0) & (p.image > -250) & (p.image < -50)] for p in phantoms])
    assert np.median(between) == pytest.approx(-100, abs=15)  # fat


@pytest.mark.parametrize("task", ["abdomen_mr", "head_mr"])
def test_mr_is_positive_and_in_units_of_its_own(task: str) -> None:
    images = [volume_phantom(task, seed, 24).image for seed in range(6)]
    assert min(image.min() for image in images) >= 0
    brightness = [np.quantile(image, 0.95) for image in images]
    assert max(brightness) > 1.5 * min(brightness)


@every_task
def test_no_threshold_finds_an_organ(task: str) -> None:
    phantom = drawn(task, 0)
    for name in {*SCANS[task].labels} - {"cerebrum"}:  # which is most of what a head holds
        assert best_threshold_dice(phantom.image, mask(phantom, task, name)) < 0.6
