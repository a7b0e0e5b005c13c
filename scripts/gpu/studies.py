"""The parts of scripts/gpu/run.py that train: `pretraining` on X-rays, `segmentation` of CT, `slices` in 2-D.

Recipes of the bundles train side by side on one device, each in a process of its own. Each is timed for some seconds
while all others run, too; from that follow the epochs of its schedule, which ends when its time is over. Fine-tunings,
which are compared at equal steps, take those of the slowest.

pretraining: VQ, the same without VQ, BYOL, and VQ without the films of RSNA, on the X-rays of the `training` lists;
then the frozen features of the labelled sets, as scripts/judge_encoders.py takes them, and one probe of each.
OUT/pretraining_ARM.zip, unpacked into a folder, is what that script judges in full. Every film is read once, by all
cores, for all arms. segmentation: HSSL on both sets of volumes, and fine-tuning from it and from
scratch with 2 and with 5 subjects of ct_btcv, several draws, scored on its validation subjects. slices: the
pretrainings of scripts/experiments/slices_pretraining.json with batches four times as large, at equal steps; the
weights are in OUT/slices_RECIPE.zip, for the fine-tunings of scripts/experiments/slices_*.json on any machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import judge_encoders as judge
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import CacheDataset
from rows import Rows, write
from threadpoolctl import threadpool_limits

from dissect_monai import read_datalist
from dissect_monai.metrics.classification import macro_auroc

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "bundles"
SLICES = ROOT / "scripts" / "experiments" / "slices_pretraining.json"
WARMUP = 10  # steps before the clock starts
PATIENCE = 45  # seconds that a run waits for one that may have failed
WITHOUT_VQ: dict[str, Any] = {"discrete_weight": 0, "commitment_weight": 0, "reconstruction_weight": 0}
WITHOUT_RSNA = "VQ_without_RSNA"  # films of RSNA come from the archive of NIH, with patients unknown
ARMS: dict[str, dict[str, Any]] = {
    "VQ": {}, "without_VQ": WITHOUT_VQ, "BYOL": {"objective": "byol", **WITHOUT_VQ}, WITHOUT_RSNA: {},
}  # fmt: skip
ENCODER = "resnet18"
FILMS = {"encoder": ENCODER, "batch_size": 256, "hidden_dim": 4096, "num_workers": 4}
VOLUMES: dict[str, Any] = {"pixdim": [3, 3, 4], "patch_size": [64, 64, 32], "init_filters": 16, "num_workers": 4}
HSSL = {**VOLUMES, "hidden_dim": 512, "mask_size": 8, "iterations_per_epoch": 50, "batch_size": 8}
# As on a CPU (scripts/experiments/segmentation_btcv.json).
TUNE = {
    **VOLUMES,
    "learning_rate": 0.004,
    "ce_weight": 0.3,
    "select": "last",
    "iterations_per_epoch": 10,
    "batch_size": 4,
}
SUBJECTS, NUM_DRAWS = (2, 5), 3
VIRAL = ("cxr_kermany", "viral against bacterial")
# Set, question, fraction of the training subjects, features.
QUESTIONS = [(*VIRAL, fraction, kind) for fraction in (1.0, 0.2) for kind in ("last", "stages")]
QUESTIONS += [(name, "findings", 1.0, "stages") for name in ("cxr_nih", "cxr_nih64")]
SMALL: dict[str, Any] = {
    "batch_size": 8, "hidden_dim": 32, "num_workers": 0, "pixdim": [12, 12, 12], "patch_size": [16, 16, 16],
    "init_filters": 8, "iterations_per_epoch": 2, "warmup_epochs": 0, "train#sampler#items_per_draw": 2,
}  # fmt: skip
METRICS = ("dice_mean", "knn_auroc_stages", "reconstruction_error")  # by which a training is known in the table


class Clock:
    """Ends a run that has been timed, with its steps per second; all runs start it together."""

    def __init__(self, seconds: float, meet: Callable[[], None]) -> None:
        self.seconds, self.meet, self.steps = seconds, meet, 0

    def __call__(self, engine: Engine) -> None:
        """Count a step."""
        self.steps += 1
        if self.steps == WARMUP:
            self.meet()
            self.start = now()
        elif self.steps > WARMUP and time.time() - self.start > self.seconds:
            self.rate = (self.steps - WARMUP) / (now() - self.start)
            engine.terminate()


def now() -> float:
    """Time when the device has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.time()


def wait_for(paths: Iterable[Path], until: float) -> list[Path]:
    """Those of the files of other runs that are there in time."""
    found = []
    for path in paths:
        while not path.exists() and time.time() < until:
            time.sleep(0.1)
        found += [path] if path.exists() else []
    return found


def read_films(folder: Path, store: Path, size: int, cores: int) -> None:
    """Decode and resize all films of the sets in a folder, once, as the recipe does."""
    images = [item["image"] for path in sorted(folder.glob("cxr_*")) for item in read_datalist(str(path)).items()]
    parser = ConfigParser()
    parser.read_config(judge.EVALUATE)
    parser["bundle_root"], parser["image_size"] = str(judge.EVALUATE.parent.parent), size
    with ProcessPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        films = [*pool.map(partial(read_film, parser.get_parsed_content("preprocessing")), images, chunksize=128)]
    np.save(store / "films.npy", np.stack(films))
    write(store / "films.json", {os.path.realpath(image): row for row, image in enumerate(images)})


def read_film(preprocessing: Callable[[Any], Any], image: str) -> Any:
    """The pixels of one film."""
    return preprocessing({"image": image})["image"].numpy()


def kept(data: list[dict[str, Any]], transform: Callable[[Any], Any], store: str) -> CacheDataset:
    """A data set of films that `read_films` has read."""
    films = torch.from_numpy(np.load(Path(store, "films.npy")))
    rows = json.loads(Path(store, "films.json").read_text(encoding="utf-8"))
    contents = [{"image": films[rows[os.path.realpath(item["image"])]]} for item in data]
    return CacheDataset(data, transform, copy_cache=False, runtime_cache=contents)


def run(job: dict[str, Any], handler: Clock | None = None, **knobs: Any) -> Any:
    """A training in this process, as `monai.bundle run` does it; returns its parsed config."""
    given = {**job["knobs"], "device": job["device"], **knobs}
    workflow = ConfigWorkflow(job["configs"], workflow_type="train", logging_file=False, **given)
    workflow.initialize()
    if handler is not None:
        workflow.parser.get_parsed_content("train#trainer").add_event_handler(Events.ITERATION_COMPLETED, handler)
    workflow.run()
    workflow.finalize()
    return workflow.parser


def train(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a recipe from now to its deadline, for as many epochs as the slowest of those that it is compared with."""
    group, speed = folder.parents[1] / "group", {}
    own: dict[str, Any] = {"output_dir": str(folder)}
    if job["after"]:
        if not wait_for([Path(job["after"])], job["deadline"] + job["patience"]):
            sys.exit(f"error: {job['after']} was not written in time.")
        own["pretrained"] = job["after"]
    else:

        def meet() -> None:
            write(group / f"{job['name']}.ready", True)
            wait_for([group / f"{name}.ready" for name in job["beside"]], time.time() + PATIENCE)

        clock = Clock(job["timing"], meet)
        endless = dict.fromkeys(("max_epochs", "val_interval", "ckpt_interval"), 10**6)
        timed = run(job, clock, output_dir=str(folder / "timing"), **endless)
        own |= {f"{part}#dataset": timed.get_parsed_content(f"{part}#dataset") for part in ("train", "validate")}
        epochs = clock.rate * (job["deadline"] - time.time()) / len(timed.get_parsed_content("train#dataloader"))
        write(group / f"{job['name']}.epochs", max(1, min(job["most"], int(epochs))))
        speed = {"steps_a_second": round(clock.rate, 1)}
        shutil.rmtree(folder / "timing")
    found = wait_for([group / f"{name}.epochs" for name in job["equal"]], time.time() + PATIENCE)
    epochs, start = min(json.loads(path.read_text(encoding="utf-8")) for path in found), now()
    done = run(job, **own, max_epochs=epochs, val_interval=epochs, ckpt_interval=epochs)
    steps, seconds = done.get_parsed_content("train#trainer").state.iteration, now() - start
    metrics = done.get_parsed_content("validate#evaluator").state.metrics
    return {"steps": steps, "epochs": epochs, "seconds": round(seconds, 1), **speed, **metrics}


def do(path: Path) -> None:
    """One job: a training, or the features of an encoder, or both."""
    job = json.loads(path.read_text(encoding="utf-8"))
    found = train(job, path.parent) if job["configs"] else {}
    for of in labelled(job["films"]) if job["films"] else []:
        read = partial(kept, store=job["store"])
        judge.features_of(arm_of(path.parent, job["image_size"]), of, job["device"], read)
    if job["configs"] and job["archive"]:
        root = path.parents[2]  # the names in the archive begin with the arm
        with ZipFile(job["archive"], "w") as archive:
            for file in [each for pattern in job["keep"] for each in path.parent.glob(pattern)]:
                archive.write(file, file.relative_to(root))
    write(path.with_name("result.json"), found)


def arm_of(folder: Path, image_size: int) -> judge.Arm:
    """The encoder of a folder; a random one where nothing was trained."""
    weights = folder / "models" / "model.pt"
    return judge.Arm(folder.parent.name, 0, ENCODER, image_size, folder, weights if weights.is_file() else None)


def labelled(films: str) -> list[judge.Films]:
    """The labelled sets of the pack."""
    return list(islice(judge.films(Path(films), select=False), len(judge.LABELLED)))


def auroc_of(arm: judge.Arm, of: judge.Films, question: str, fraction: float, kind: str, column: int) -> float:
    """AUROC of one probe for one finding, of one draw of subjects."""
    labels = [each[:, [column]] for each in of.questions[question]]
    return macro_auroc(labels[-1], judge.scores(of, judge.features_of(arm, of)[kind], labels, fraction, draw=0))


class Study:
    """Jobs that run side by side, a process each; in a rehearsal one after another in one process, and short."""

    def __init__(self, part: str, pack: str, out: str, work: str, device: str, small: bool, limit: float) -> None:
        self.part, self.pack, self.out, self.device = part, Path(pack), Path(out), device
        self.small, self.limit, self.start = small, limit, time.time()
        self.data, self.folder = Path(work, "data"), Path(work, part)
        self.results = Rows(self.out / f"{part}.json")
        self.jobs: list[Path] = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str, configs: list[str], knobs: dict[str, Any], share: float, **more: Any) -> Path:
        """Plan a job that trains until this share of the time is over; returns its folder."""
        folder, small = self.folder / name / "seed0", {key: SMALL[key] for key in knobs.keys() & SMALL.keys()}
        small |= {key: each[: len(knobs[key])] for key, each in small.items() if isinstance(each, list)}
        job: dict[str, Any] = {
            "name": name,
            "configs": [str(BUNDLES / config) for config in configs],
            "knobs": knobs,
            "films": None,
            "archive": None,
        }
        job |= {"device": self.device, "deadline": self.start + share * self.limit, "timing": 5, "most": 10**6}
        job |= {"patience": 0.3 * self.limit}  # of a run that waits for another's weights
        job |= {"after": None, "beside": [], "equal": [name], **more}
        if self.small:
            job |= {"knobs": knobs | small, "timing": 0.2, "most": 1, "beside": [], "equal": job["equal"][:1]}
        write(folder / "job.json", job)
        self.jobs.append(folder / "job.json")
        return folder

    def finish(self) -> bool:
        """Run all jobs and note at once what each has found; whether all have ended well."""
        batches = [self.jobs] if self.small else [[job] for job in self.jobs]
        threads = 1 if self.small else max(1, (os.cpu_count() or 1) // len(batches))
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "jobs"]
        running = [(batch, subprocess.Popen([*command, *map(str, batch)], env=env)) for batch in batches]
        waiting, well = {job: process for batch, process in running for job in batch}, True
        while waiting:
            time.sleep(0.2)
            for job, process in list(waiting.items()):
                ended = process.poll() is not None
                if (path := job.with_name("result.json")).is_file():
                    found = json.loads(path.read_text(encoding="utf-8"))
                    metric = next((name for name in METRICS if name in found), "steps")
                    told = {key: found[key] for key in ("steps", "seconds", "steps_a_second") if key in found}
                    self.results.add(f"{job.parent.parent.name}: {metric}", found.get(metric), metrics=found, **told)
                elif ended:
                    self.results.add(job.parent.parent.name, "failed", holds=False)
                    well = False
                else:
                    continue
                del waiting[job]
        return well


def without_rsna(folder: Path, into: Path) -> Path:
    """The set without films of RSNA, which has the same images; itself if there are none."""
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    left = [item for item in content["training"] if item.get("source") != "rsna"]
    if len(left) == len(content["training"]):
        return folder
    into = into / f"{folder.name}_without_rsna"
    into.mkdir()
    for entry in folder.iterdir():
        if entry.name != "dataset.json":
            (into / entry.name).symlink_to(entry)
    write(into / "dataset.json", {**content, "training": left})
    return into


def pretraining(study: Study) -> bool:
    """The arms, their features, and a first judgement."""
    films = [path.parent for path in sorted(study.data.glob("cxr_*/dataset.json"))]
    if not films:
        sys.exit("error: the pack must hold the X-rays cxr_*: make it anew, with a larger --limit_mib.")
    size = json.loads((study.pack / "manifest.json").read_text(encoding="utf-8"))["image_size"]
    cores = 1 if study.small else os.cpu_count() or 1
    study.folder.mkdir(parents=True, exist_ok=True)
    read_films(study.data, study.folder, size, cores)
    kept_films = {"_target_": "studies.kept", "store": str(study.folder)}
    shared = {**FILMS, "image_size": size}
    for part, data in {"train": "$@datalist.training", "validate": "$@labelled.validation"}.items():
        shared[f"{part}#dataset"] = {**kept_films, "data": data, "transform": f"@{part}#preprocessing"}
    configs = ["pretrain_vq_ssl/configs/train.json", "pretrain_vq_ssl/configs/on_device.json"]
    more = {"films": str(study.data), "store": str(study.folder), "image_size": size}
    folders = []
    for name, knobs in ARMS.items():
        sets = [without_rsna(each, study.folder) if name == WITHOUT_RSNA else each for each in films]
        knobs = {**shared, **knobs, "dataset_dir": [str(each) for each in sets]}
        own = {"archive": str(study.out / f"pretraining_{name}.zip"), "keep": ["features_*.npz", "models/model.json"]}
        folders.append(study.add(name, configs, knobs, 0.7, beside=[*ARMS], **own, **more))
    folders.append(study.add(judge.RANDOM, [], {}, 0, **more))
    well = study.finish()
    arms = [arm_of(folder, size) for folder in folders if (folder / "result.json").is_file()]
    judged = {of.name: of for of in labelled(str(study.data))}
    with ProcessPoolExecutor(cores, initializer=threadpool_limits, initargs=(1,)) as pool:
        asked = []
        for (name, question, fraction, kind), arm in product(QUESTIONS, arms):
            columns = range(judged[name].questions[question][0].shape[1])
            tasks = [pool.submit(auroc_of, arm, judged[name], question, fraction, kind, each) for each in columns]
            asked.append((f"{name}, {question}, {fraction:.0%}, {kind}: {arm.name}", tasks))
        for what, tasks in asked:
            study.results.add(what, float(np.nanmean([task.result() for task in tasks])))
    return well


def segmentation(study: Study) -> bool:
    """HSSL and fine-tuning from scratch side by side, then fine-tuning from HSSL."""
    ct, train = study.data / "ct_btcv", "seg_finetune_btcv/configs/train.json"
    if not ct.is_dir():
        sys.exit("error: the pack must hold ct_btcv: make it anew, with a larger --limit_mib.")
    total = len({item["subject"] for item in json.loads((ct / "dataset.json").read_text(encoding="utf-8"))["training"]})
    runs = {f"{count}_subjects_draw{seed}": (count, seed) for seed in range(NUM_DRAWS) for count in SUBJECTS}
    if study.small:
        runs = dict(islice(runs.items(), 1))
    scratch = [f"scratch_{name}" for name in runs]
    sets = [
        str(path.parent) for path in (ct / "dataset.json", study.data / "mr_acdc" / "dataset.json") if path.is_file()
    ]
    hssl = study.add("HSSL", ["hssl_multidomain/configs/train.json"], {**HSSL, "dataset_dir": sets}, 0.47,
        beside=["HSSL", *scratch])  # fmt: skip
    for kind in ("scratch", "HSSL"):
        for name, (count, seed) in runs.items():
            knobs = {**TUNE, "dataset_dir": str(ct), "seed": seed, "label_fraction": min(1.0, count / total + 1e-4)}
            own = {"beside": ["HSSL", *scratch]} if kind == "scratch" else {"after": str(hssl / "models" / "model.pt")}
            others = [each for each in scratch if each != f"{kind}_{name}"]
            equal = [f"{kind}_{name}", *others] if kind == "scratch" else [f"scratch_{name}", *scratch]
            study.add(f"{kind}_{name}", [train], knobs, 0.47, equal=equal, **own)
    return study.finish()


def slices(study: Study) -> bool:
    """The pretrainings of a study file, side by side."""
    plan = json.loads(SLICES.read_text(encoding="utf-8").replace("{data}", study.data.as_posix()))
    if lacking := [path for path in plan["training"]["dataset_dir"] if not Path(path).is_dir()]:
        sys.exit(f"error: the pack must hold {', '.join(Path(path).name for path in lacking)}: make it with --slices.")
    for name, own in plan["recipes"].items():
        knobs = {**plan["training"], **own, "num_workers": 2}
        knobs["batch_size"] *= 4
        if "train#sampler#items_per_draw" in own:  # a batch of one set
            knobs["train#sampler#items_per_draw"] = knobs["batch_size"]
        configs = plan["configs"].get(name, ["bundles/hssl_multidomain/configs/train.json"])
        archive = study.out / f"slices_{re.sub('[^A-Za-z0-9]+', '_', name)}.zip"
        equal = sorted(plan["recipes"], key=lambda each, own=name: each != own)  # its own first
        more = {"archive": str(archive), "keep": ["models/*"], "beside": equal, "equal": equal}
        study.add(name, [str(ROOT / each) for each in configs], knobs, 0.92, **more)
    return study.finish()


if __name__ == "__main__":
    if sys.argv[1] == "jobs":
        for path in sys.argv[2:]:
            do(Path(path))
    else:
        study = Study(**json.loads(sys.argv[1]))
        sys.exit(not {"pretraining": pretraining, "segmentation": segmentation, "slices": slices}[study.part](study))
