"""A real MONAI Label server with the packaged bundles, driven over REST; `make label` runs it."""

import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from helpers import ROOT, command_line, committed_copy, free_port, read, run_config, write_series
from package_bundle import package

from dissect_monai.common import BTCV_ORGANS
from dissect_monai.phantoms.volumes import write_volume_phantoms

pytestmark = pytest.mark.label
SEGMENTATION, CLASSIFICATION = "seg_finetune_btcv", "cxr_classification"
# MONAI Label takes the type of a model from the name of its folder.
SERVED = {SEGMENTATION: "seg_finetune_btcv", CLASSIFICATION: "cxr_classify"}
SHORT = {"max_epochs": 2, "warmup_epochs": 0, "batch_size": 8, "num_workers": 0, "val_interval": 1, "amp": False}


class Server(NamedTuple):
    """A running server and what it serves."""

    url: str
    log: Path
    bundles: Path  # folder of the served bundles
    studies: Path

    def request(
        self, method: str, path: str, query: dict[str, Any] | None = None, files: Any = (), **fields: Any
    ) -> tuple[bytes, str]:
        """Body and content type of an answer; `files` are (name, path) and `fields` are sent as JSON."""
        url = f"{self.url}{path}?{urlencode(query or {})}"
        body, kind = multipart(files, fields) if files or fields else (None, None)
        request = Request(url, body, {"Content-Type": kind} if kind else {}, method=method)
        return self.answer(request)

    def post_json(self, path: str, content: Any, **query: Any) -> Any:
        body = json.dumps(content).encode()
        request = Request(f"{self.url}{path}?{urlencode(query)}", body, {"Content-Type": "application/json"})
        return json.loads(self.answer(request)[0])

    def answer(self, request: Request) -> tuple[bytes, str]:
        try:
            with urlopen(request, timeout=300) as answer:
                return answer.read(), answer.headers["Content-Type"]
        except HTTPError as error:
            raise AssertionError(f"{request.full_url}: {error.code} {error.read()!r}\n{tail(self.log)}") from error

    def session(self, files: list[Path]) -> str:
        """Upload an image that is not among the studies."""
        body, _ = self.request("PUT", "/session/", files=[("files", file) for file in files])
        return str(json.loads(body)["session_id"])

    def infer(self, model: str, output: str, **query: str) -> tuple[bytes, str]:
        # Slicer, too, says what it wants the label map as, which does not follow from a folder of slices.
        params = {"device": "cpu", "result_extension": ".nii.gz"}
        return self.request("POST", f"/infer/{model}", {"output": output, **query}, params=params)


def multipart(files: Any, fields: dict[str, Any]) -> tuple[bytes, str]:
    """A form as a browser sends it."""
    parts = [(f'name="{name}"', json.dumps(value).encode()) for name, value in fields.items()]
    parts += [(f'name="{name}"; filename="{path.name}"', path.read_bytes()) for name, path in files]
    head = b"--parts\r\nContent-Disposition: form-data; "
    lines = [head + names.encode() + b"\r\n\r\n" + content for names, content in parts]
    return b"\r\n".join([*lines, b"--parts--", b""]), "multipart/form-data; boundary=parts"


def tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        try:
            with urlopen(f"{url}/info/", timeout=10):
                return
        except (URLError, OSError):
            assert process.poll() is None, tail(log)
            time.sleep(1)
    raise AssertionError(f"the server does not answer:\n{tail(log)}")


@pytest.fixture(scope="module")
def organs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volume_phantoms(tmp_path_factory.mktemp("organs"), 4, 2, 2, image_size=32, tasks=["abdomen_ct"])[0]


@pytest.fixture(scope="module")
def bundles(organs: Path, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the packaged bundles as they are served, each with weights that have learnt something."""
    work = tmp_path_factory.mktemp("bundles")
    repository = committed_copy(work / "repository")
    volumes = {
        "dataset_dir": organs, "pixdim": [12, 12, 12], "patch_size": [16, 16, 16], "init_filters": 8,
        "blocks_down": [1, 1, 1], "blocks_up": [1, 1], "iterations_per_epoch": 60, "learning_rate": 0.01,
    }  # fmt: skip
    xrays = {"dataset_dir": dataset_dir, "image_size": 32, "encoder": "resnet18"}
    for served, knobs in {SEGMENTATION: volumes, CLASSIFICATION: xrays}.items():
        name = SERVED[served]
        run_config(
            ROOT / "bundles" / name / "configs" / "train.json", **{**SHORT, **knobs}, output_dir=work / "weights" / name
        )
        archive = package(repository / "bundles" / name, work / "weights" / name, work / "dist")
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(work / "unpacked")
        (work / "unpacked" / name).rename(work / served)
    return work


@pytest.fixture(scope="module")
def server(bundles: Path, organs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("server")
    assert "LABEL_PYTHON" in os.environ, "LABEL_PYTHON must be the Python that has MONAI Label: run `make label`"
    studies, log = work / "studies", work / "server.log"
    studies.mkdir()  # two to segment, and three to train on, whose label maps come over REST
    for name in ("test_000", "test_001", "training_000", "training_001", "training_002"):
        shutil.copy(organs / "images" / f"abdomen_ct_{name}.nii.gz", studies / f"{name}.nii.gz")
    label = (str(Path(os.environ["LABEL_PYTHON"]).absolute()), "-m", "monailabel.main")
    subprocess.run(
        [*label, "apps", "--download", "--name", "monaibundle", "--output", work], check=True, capture_output=True
    )
    app = work / "monaibundle"
    for served in SERVED:
        shutil.copytree(bundles / served, app / "model" / served)
    port = free_port()
    environment = {
        **os.environ, "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false", "MONAI_LABEL_SESSION_PATH": str(work / "sessions"),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
    }  # fmt: skip
    command = [
        *label, "start_server", "--app", app, "--studies", studies, "--conf", "models", ",".join(SERVED),
        "--conf", "zoo_source", "local", "--conf", "sam2", "false", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with open(log, "wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, cwd=work, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}", process, log)
            yield Server(f"http://127.0.0.1:{port}", log, app / "model", studies)
        finally:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    assert not [line for line in lines if "ERROR" in line or "Traceback" in line]


def segmented(server: Server, image: Path, output_dir: Path) -> nib.Nifti1Image:
    """What `monai.bundle run` makes of an image with the weights that are served."""
    result = command_line(
        "configs/inference.json", cwd=server.bundles / SEGMENTATION, dataset_dir=image, output_dir=output_dir,
        pretrained=server.bundles / SEGMENTATION / "models" / "model.pt", num_workers=0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = (output_dir / "eval" / "label_maps").glob("*_seg.nii.gz")
    return nib.load(path)


def label_map(content: bytes, folder: Path) -> nib.Nifti1Image:
    (folder / "answer.nii.gz").write_bytes(content)
    return nib.load(folder / "answer.nii.gz")


def parts_of(body: bytes, kind: str) -> dict[str, bytes]:
    message = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    return {
        str(part.get_param("name", header="Content-Disposition")): part.get_payload(decode=True)  # type: ignore[misc]
        for part in message.get_payload()
    }


def assert_same(answer: nib.Nifti1Image, expected: nib.Nifti1Image) -> None:
    np.testing.assert_array_equal(np.asarray(answer.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(answer.affine, expected.affine, atol=1e-4)


def test_it_says_what_the_bundles_find(server: Server) -> None:
    models = json.loads(server.request("GET", "/info/")[0])["models"]
    assert models.keys() == SERVED.keys()
    assert models[SEGMENTATION]["type"] == "segmentation"
    assert models[SEGMENTATION]["labels"] == {name: value for value, name in enumerate(BTCV_ORGANS, start=1)}
    assert models[CLASSIFICATION]["type"] == "classification"
    assert models[CLASSIFICATION]["labels"]


def test_a_volume_is_segmented_as_the_command_line_does(server: Server, tmp_path: Path) -> None:
    expected = segmented(server, server.studies / "test_000.nii.gz", tmp_path)
    assert len(np.unique(np.asarray(expected.dataobj))) > 4
    said = json.loads(server.infer(SEGMENTATION, "json", image="test_000")[0])
    assert said["label_names"]["liver"] == 6
    assert_same(label_map(server.infer(SEGMENTATION, "image", image="test_000")[0], tmp_path), expected)
    both = parts_of(*server.infer(SEGMENTATION, "all", image="test_000"))
    assert_same(label_map(both["image"], tmp_path), expected)
    assert json.loads(both["params"])["label_names"] == said["label_names"]


def test_a_dicom_series_is_segmented_as_the_command_line_does(server: Server, tmp_path: Path) -> None:
    image = SimpleITK.ReadImage(server.studies / "test_001.nii.gz")
    series = write_series(tmp_path / "series", SimpleITK.Cast(image, SimpleITK.sitkInt16))
    expected = segmented(server, series, tmp_path)
    assert len(np.unique(np.asarray(expected.dataobj))) > 4
    session = server.session(sorted(series.iterdir()))
    assert_same(label_map(server.infer(SEGMENTATION, "image", session_id=session)[0], tmp_path), expected)
    both = parts_of(*server.infer(SEGMENTATION, "all", session_id=session))
    assert_same(label_map(both["image"], tmp_path), expected)
    said = json.loads(server.infer(SEGMENTATION, "json", session_id=session)[0])
    assert json.loads(both["params"])["label_names"] == said["label_names"]


@pytest.mark.parametrize("output", ["json", "all"])
def test_an_xray_is_classified_likewise(server: Server, dataset_dir: Path, tmp_path: Path, output: str) -> None:
    xray = dataset_dir / read(dataset_dir / "dataset.json")["test"][0]["image"]
    bundle = server.bundles / CLASSIFICATION
    result = command_line(
        "configs/inference.json", cwd=bundle, dataset_dir=xray, output_dir=tmp_path,
        pretrained=bundle / "models" / "model.pt", num_workers=0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    head, row = (line.split(",") for line in (tmp_path / "eval" / "probabilities.csv").read_text().splitlines())
    said = json.loads(server.infer(CLASSIFICATION, output, session_id=server.session([xray]))[0])["prediction"]
    names = read(bundle / "models" / "model.json")["label_names"]
    expected = dict(zip(head, row, strict=True))
    assert [each["label"] for each in said] == [name.lower() for name in names]
    for each, name in zip(said, names, strict=True):
        assert each["score"] == pytest.approx(float(expected[name]), abs=1e-4)


def test_all_studies_are_segmented_in_one_call(server: Server) -> None:
    server.post_json(
        f"/batch/infer/{SEGMENTATION}", {"device": "cpu", "multi_gpu": False, "save_label": True},
        images="unlabeled", run_sync="true",
    )  # fmt: skip
    datastore = json.loads(server.request("GET", "/datastore/", {"output": "all"})[0])
    assert len(datastore["objects"]) == 5
    assert all("original" in each["labels"] for each in datastore["objects"].values())


def test_an_epoch_on_labelled_studies_changes_what_is_served(server: Server, organs: Path, tmp_path: Path) -> None:
    weights = server.bundles / SEGMENTATION / "models" / "model.pt"
    before = weights.read_bytes()
    first = server.infer(SEGMENTATION, "image", image="test_000")[0]
    for index in range(3):
        path = organs / "labels" / f"abdomen_ct_training_00{index}.nii.gz"
        server.request("PUT", "/datastore/label", {"image": f"training_00{index}"}, [("label", path)], params={})
    request = {"device": "cpu", "max_epochs": 1, "val_split": 0.34, "multi_gpu": False}
    server.post_json(f"/train/{SEGMENTATION}", request, run_sync="true")
    assert weights.read_bytes() != before
    assert read(weights.with_suffix(".json"))["num_volumes"] == 2
    expected = segmented(server, server.studies / "test_000.nii.gz", tmp_path)
    answer = label_map(server.infer(SEGMENTATION, "image", image="test_000")[0], tmp_path)
    assert_same(answer, expected)
    (tmp_path / "first.nii.gz").write_bytes(first)
    assert (np.asarray(nib.load(tmp_path / "first.nii.gz").dataobj) != np.asarray(answer.dataobj)).any()
