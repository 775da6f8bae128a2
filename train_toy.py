"""Train dn_detr.py: on shapes drawn on the fly, or on any data set in COCO format.

    python train_toy.py                               shapes, a few minutes on two CPU cores
    python train_toy.py --dn-groups 0                 the same without denoising: DAB-DETR
    python train_toy.py --coco-train IMAGES_DIR ANNOTATIONS_JSON --coco-val IMAGES_DIR ANNOTATIONS_JSON
    python train_toy.py --resume runs/shapes          go on where a run was stopped
    python train_toy.py --evaluate runs/shapes/best.pt
    python train_toy.py --compare                     with and without denoising, 3 seeds
    python train_toy.py --ablate                      the paper's Tables 4 and 5 on shapes
    torchrun --nproc-per-node 8 train_toy.py ...      several processes, one per GPU

Read train_one_epoch first: its loop is the training step. Sections: 1 options, 2 shapes, 3 COCO
format, 4 batches, 5 model, 6 evaluation, 7 training, 8 files, 9 pictures, 10 processes,
11 experiments.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.models import get_model_weights
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms import v2
from tqdm import tqdm

import dn_detr
from dn_detr import DNDETR, DNDETRConfig, DNDETRCriterion, matched_objects, matching_instability, postprocess

# ---------------------------------------------------------------------------------------------
# 1. Options
# ---------------------------------------------------------------------------------------------


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, help="default: 5 on shapes, 50 on COCO data, 12 in experiments")
    add("--batch-size", type=int, help="images a step, over all processes; default: 8")
    add("--lr", type=float, help="default: on shapes 2e-3, or 1e-3 in experiments and without denoising "
        "(with random anchors 2e-3 failed); 1e-3 on COCO data, 1e-4 for the paper's model and after --init")
    add("--seed", type=int, default=0)
    add("--device", help="default: cuda, else mps, else cpu")
    add("--workers", type=int, help="data loading processes; default: 0 on shapes, 2 on COCO data")
    add("--output-dir", type=Path, help="default: runs/shapes or runs/coco")
    add("--train-size", type=int, help="shapes: training images; default: 4800, in experiments 1600")
    add("--val-size", type=int, help="shapes: held-out images; default: 300, in experiments 200")

    group = parser.add_argument_group("denoising (paper Sec. 4.3, 4.4)")
    group.add_argument("--dn-groups", type=int, default=5, help="P; 0 is DAB-DETR")
    group.add_argument("--label-noise", type=float, default=0.2, help="gamma")
    group.add_argument("--center-noise", type=float, default=0.4, help="lambda_1")
    group.add_argument("--size-noise", type=float, default=0.4, help="lambda_2")
    group.add_argument("--dn-max-queries", type=int, default=0, help="at most this many; 0: no limit")

    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=("toy", "paper"), default="toy", help="for minutes, or the R50")
    group.add_argument("--backbone", help='"small" (learns from scratch) or a torchvision ResNet')
    group.add_argument("--pretrained-backbone", action="store_true", help="ImageNet weights (downloaded)")
    group.add_argument("--num-queries", type=int)
    group.add_argument("--anchors", choices=("grid", "normal"), help="where the learned anchors start")
    group.add_argument("--encoder-layers", type=int)
    group.add_argument("--init", type=Path, metavar="CHECKPOINT", help="start from ours or the authors' file")

    group = parser.add_argument_group("data in COCO format")
    group.add_argument("--coco-train", type=Path, nargs=2, metavar=("IMAGES_DIR", "ANNOTATIONS_JSON"))
    group.add_argument("--coco-val", type=Path, nargs=2, metavar=("IMAGES_DIR", "ANNOTATIONS_JSON"))
    group.add_argument("--subset", type=int, metavar="N", help="only the first N images of each")
    group.add_argument("--image-size", type=int, default=256, help="shorter side in pixels (the paper: 800)")

    group = parser.add_argument_group("speed")
    group.add_argument("--amp", action="store_true", help="bf16 where the device has it, else fp16")
    group.add_argument("--compile", action="store_true", help="torch.compile")

    group = parser.add_argument_group("instead of a new run")
    group.add_argument("--resume", type=Path, metavar="DIR", help="its options are taken from there")
    group.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="ours or the authors' file")
    group.add_argument("--compare", action="store_true", help="with and without denoising")
    group.add_argument("--ablate", action="store_true", help="noise kinds, mask, groups")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="for --compare and --ablate")
    group.add_argument("--jobs", type=int, help="their runs at a time; default: one a CPU core, one on a GPU")
    group.add_argument("--no-mask", action="store_true", help="for --ablate: only empty slots are hidden")
    return parser


KEPT_ON_RESUME = {"resume", "device", "workers"}  # what may be said anew when a run goes on
OF_EXPERIMENTS = {"compare", "ablate", "seeds", "jobs", "epochs", "batch_size", "lr", "train_size",
                  "val_size", "output_dir", "device"}
OF_EVALUATION = {"evaluate", "coco_val", "subset", "image_size", "batch_size", "workers", "device", "amp",
                 "seed", "val_size"}
OF_A_MODEL = {"model", "backbone", "pretrained_backbone", "num_queries", "anchors", "encoder_layers"}


def parse_options(argv=None):
    """Options with their defaults filled in. Raises ValueError for combinations that make no sense."""
    parser = build_parser()
    options = parser.parse_args(argv)
    said = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    refuse_ignored(options, said)
    if options.resume:
        saved = read_json(options.resume / "config.json")
        if not isinstance(saved, dict) or not isinstance(saved.get("options"), dict):
            raise ValueError(f"{options.resume / 'config.json'} is not that of a run: it has no options")
        for name, value in saved["options"].items():
            if name not in said:
                setattr(options, name, value)
        options.output_dir = options.resume
    for name in ("coco_train", "coco_val"):
        if getattr(options, name):
            setattr(options, name, [Path(path) for path in getattr(options, name)])
    coco, experiment = bool(options.coco_train or options.coco_val), experiment_of(options)
    fill = {"epochs": 50 if coco else 12 if experiment else 5, "batch_size": 8,
            "train_size": 1600 if experiment else 4800, "val_size": 200 if experiment else 300,
            "lr": (1e-4 if options.model == "paper" or options.init else
                   1e-3 if coco or experiment or not options.dn_groups else 2e-3),
            "workers": 2 if coco else 0,
            "output_dir": Path("runs") / (experiment or ("coco" if coco else "shapes"))}
    for name, value in fill.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.coco_train and not options.coco_val:
        raise ValueError("--coco-train needs --coco-val: AP is measured on images the model never saw")
    if options.coco_val and not (options.coco_train or options.evaluate):
        raise ValueError("--coco-val needs --coco-train to train, or --evaluate CHECKPOINT")
    for name in ("epochs", "batch_size", "train_size", "val_size", "image_size", "lr", "subset", "jobs"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be positive")
    if options.image_size < 64:
        raise ValueError(f"--image-size is {options.image_size}, less than 64 leaves no feature map")
    if not 0 <= options.seed < 2 ** 32:
        raise ValueError(f"--seed is {options.seed}, it must be in 0 .. 2^32 - 1")
    options.seeds = list(dict.fromkeys(options.seeds))
    if options.workers < 0:
        raise ValueError(f"--workers is {options.workers}, it must not be negative")
    return options


def experiment_of(options):
    return "compare" if options.compare else "ablate" if options.ablate else None


def refuse_ignored(options, said):
    """Raise ValueError if something was `said` (names of options) that would have no effect."""
    experiment, coco = experiment_of(options), options.coco_train or options.coco_val
    for applies, ignored, reason in (
            (options.resume, said - KEPT_ON_RESUME, f"--resume takes its options from {options.resume}"),
            (experiment, said - OF_EXPERIMENTS, f"--{experiment} chooses its runs itself"),
            (not experiment, said & {"seeds", "jobs"}, "only --compare and --ablate train many models"),
            (options.evaluate, said - OF_EVALUATION, "--evaluate does not train"),
            (options.init, said & OF_A_MODEL, "--init takes the model from its file"),
            (coco, said & {"train_size", "val_size"}, "these are numbers of shapes images; see --subset"),
            (not coco, said & {"image_size", "subset"}, "this is for data in COCO format")):
        if applies and ignored:
            flags = ", ".join("--" + name.replace("_", "-") for name in sorted(ignored))
            raise ValueError(f"{reason}: drop {flags}")


def pick_device(name=None):
    """torch.device for `name`, or the best there is. Raises ValueError for one that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} can't be used here: {str(error).splitlines()[0]}") from error
    return device


# ---------------------------------------------------------------------------------------------
# 2. Shapes: a detection data set out of nothing
# ---------------------------------------------------------------------------------------------

SHAPES = {  # inside the unit box, u to the right and v down; the slack lets tips reach the box's border
    "circle": lambda u, v: u ** 2 + v ** 2 <= 1,
    "square": lambda u, v: np.ones_like(u + v, dtype=bool),
    "triangle": lambda u, v: abs(u) <= (v + 1) / 2 + 0.06,
    "diamond": lambda u, v: abs(u) + abs(v) <= 1.01,
    "cross": lambda u, v: (abs(u) <= 1 / 3) | (abs(v) <= 1 / 3),
    "ring": lambda u, v: (u ** 2 + v ** 2 <= 1) & (u ** 2 + v ** 2 >= 0.3),
}
SHAPE_SIZE = 64


class ShapesDataset(Dataset):
    """`size` images of 64x64 pixels with up to 12 shapes each. Image i of a (seed, split) is always the
    same one. Drawn once and kept as bytes: drawing them anew would cost half of a training step."""

    def __init__(self, size, seed, split):
        self.categories = [{"id": index, "name": name} for index, name in enumerate(SHAPES)]
        self.label_of = {index: index for index in range(len(SHAPES))}       # category id -> label
        self.flips, self.inverted = torch.zeros(2, size, dtype=torch.bool)
        self.channels = torch.arange(3).expand(size, 3)
        self.seed, self.is_train = seed, split == "train"
        drawn = [draw_shapes(np.random.default_rng((seed, int(self.is_train), index)))
                 for index in range(size)]
        self.images = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image, _, _ in drawn]
        self.labels = [torch.tensor(labels, dtype=torch.long) for _, labels, _ in drawn]
        self.boxes = [torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) for _, _, boxes in drawn]

    def __len__(self):
        return len(self.images)

    def set_epoch(self, epoch):
        """Mirror and recolor the training images anew. A generator of its own: denoising draws from the
        global one, and runs with and without it must see the same images."""
        if self.is_train:
            generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
            self.flips, self.inverted = torch.rand(2, len(self), generator=generator) < 0.5
            self.channels = torch.rand(len(self), 3, generator=generator).argsort(1)

    def __getitem__(self, index):
        image, boxes = self.images[index][self.channels[index]], self.boxes[index]
        if self.inverted[index]:
            image = 255 - image
        if self.flips[index]:
            image, boxes = image.flip(-1), boxes * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
        return Example(image, {"labels": self.labels[index], "boxes": boxes}, index, (SHAPE_SIZE, SHAPE_SIZE))

    def ground_truth(self):
        """The same as a pycocotools COCO object, for evaluation."""
        annotations = []
        for image_id, (labels, boxes) in enumerate(zip(self.labels, self.boxes)):
            for label, (cx, cy, w, h) in zip(labels.tolist(), (boxes * SHAPE_SIZE).tolist()):
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": label,
                                    "bbox": [cx - w / 2, cy - h / 2, w, h], "area": w * h, "iscrowd": 0})
        coco = COCO()
        coco.dataset = {"images": [{"id": index} for index in range(len(self))],
                        "annotations": annotations, "categories": self.categories}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def draw_shapes(rng):
    """-> image uint8 [64, 64, 3], labels [n], boxes [n, 4] cxcywh in [0, 1]. n is 0 in one image of twenty,
    9 to 12 small shapes in another one, else 1 to 8."""
    v, u = np.mgrid[:SHAPE_SIZE, :SHAPE_SIZE] + 0.5
    image, background = draw_background(rng, u, v)
    kind = rng.random()
    count = 0 if kind < 0.05 else rng.integers(9, 13) if kind < 0.1 else rng.integers(1, 9)
    smallest, largest = (18, 40) if count <= 4 else (15, 30) if count <= 8 else (12, 18)
    corners, labels = [], []
    for _ in range(20 * count):                     # a shape that overlaps too much gets another chance
        if len(labels) == count:
            break
        w, h = rng.integers(smallest, largest + 1, 2)
        if not 0.6 < w / h < 1.7:
            continue
        x, y = rng.integers(0, SHAPE_SIZE - w + 1), rng.integers(0, SHAPE_SIZE - h + 1)
        if any(overlap((x, y, x + w, y + h), other) > 0.3 for other in corners):
            continue
        label = rng.integers(len(SHAPES))
        inside = list(SHAPES.values())[label]((u - x) / w * 2 - 1, (v - y) / h * 2 - 1)
        inside &= (u > x) & (u < x + w) & (v > y) & (v < y + h)
        image[inside] = contrasting_color(rng, background) + rng.normal(0, 6, (inside.sum(), 3))
        corners.append((x, y, x + w, y + h))
        labels.append(label)
    corners = np.array(corners, dtype=np.float32).reshape(-1, 4)
    boxes = np.concatenate([corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], 1) / 2
    return image.clip(0, 255).astype(np.uint8), labels, boxes / SHAPE_SIZE


def draw_background(rng, u, v):
    """A gradient with noise and a few strokes that are no objects; returns it and its two colors."""
    first, second = colors = rng.uniform(0, 255, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    blend = ((u * np.cos(angle) + v * np.sin(angle)) / SHAPE_SIZE + 1) / 2
    image = first + (second - first) * blend.clip(0, 1)[..., None] + rng.normal(0, 8, (*u.shape, 3))
    for _ in range(rng.integers(0, 5)):
        x, y, angle, length = *rng.uniform(0, SHAPE_SIZE, 2), rng.uniform(0, np.pi), rng.uniform(8, 40)
        along = (u - x) * np.cos(angle) + (v - y) * np.sin(angle)
        across = (u - x) * np.sin(angle) - (v - y) * np.cos(angle)
        image[(abs(along) < length / 2) & (abs(across) < rng.uniform(0.6, 1.2))] = rng.uniform(0, 255, 3)
    return image, colors


def contrasting_color(rng, others):
    while True:
        color = rng.uniform(0, 255, 3)
        if (np.linalg.norm(color - others, axis=1) > 110).all():
            return color


def overlap(a, b):
    """Intersection of two corner boxes over the smaller one's area."""
    w, h = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


# ---------------------------------------------------------------------------------------------
# 3. Data in COCO format
# ---------------------------------------------------------------------------------------------


class CocoDataset(CocoDetection):
    """Any data set in COCO format. Category ids may have gaps: labels are their ranks. Crowd boxes are not
    trained on. Boxes are clipped to the image, and dropped if nothing is left. `labels_are_ids` keeps raw
    category ids as labels, as the authors' COCO weights have it.

    Raises ValueError that says which file is missing or broken, before training starts.
    """

    def __init__(self, folder, annotation_file, image_size, is_train, subset=None, labels_are_ids=False):
        check_coco_json(annotation_file)
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(folder, annotation_file)
        self.is_train, self.ids = is_train, self.ids[:subset]
        if not self.ids:
            raise ValueError(f"{annotation_file} lists no images")
        self.categories = sorted(({"id": c["id"], "name": str(c["name"])} for c in
                                  self.coco.dataset["categories"]), key=lambda category: category["id"])
        ids = [category["id"] for category in self.categories]
        self.label_of = {id: id if labels_are_ids else rank for rank, id in enumerate(ids)}
        missing = [name for id in self.ids if not (Path(folder) / (name := self.file_name(id))).is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.ids)} images are not in {folder}, the first is "
                             f"{missing[0]}")
        self.objects = self.clean_objects(annotation_file)
        self.transform = coco_transform(image_size, is_train)

    def file_name(self, image_id):
        return self.coco.imgs[image_id]["file_name"]

    def clean_objects(self, annotation_file):
        """{image id: (labels [n], boxes [n, 4] xyxy pixels)}, with one warning about all that was mended."""
        objects, clipped, dropped = {}, 0, 0
        for annotation in self.coco.anns.values():          # optional in other people's files
            annotation["iscrowd"] = annotation.get("iscrowd") or 0
            annotation["area"] = annotation.get("area") or annotation["bbox"][2] * annotation["bbox"][3]
        for image_id in self.ids:
            annotations = [a for a in self.coco.imgToAnns[image_id] if not a["iscrowd"]]
            unknown = [a["category_id"] for a in annotations if a["category_id"] not in self.label_of]
            if unknown:
                raise ValueError(f"{annotation_file}: image {image_id} has category_id {unknown[0]}, "
                                 f"which is not among the categories")
            labels = torch.tensor([self.label_of[a["category_id"]] for a in annotations], dtype=torch.long)
            boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
            boxes = box_convert(boxes, "xywh", "xyxy")
            info = self.coco.imgs[image_id]
            inside = clip_boxes_to_image(boxes, (info["height"], info["width"]))
            keep = ((inside[:, 2:] - inside[:, :2]) > 0.5).all(1) & boxes.isfinite().all(1)
            clipped += int(((inside - boxes).abs() > 1.0).any(1)[keep].sum())       # a pixel is rounding
            dropped += int((~keep).sum())
            objects[image_id] = labels[keep], inside[keep]
        if clipped > sum(len(labels) for labels, _ in objects.values()) / 2:
            raise ValueError(f"{annotation_file}: {clipped} boxes reach out of their image, more than half. "
                             "A bbox is [x, y, width, height] in pixels; is this [x0, y0, x1, y1]?")
        if clipped or dropped:
            warnings.warn(f"{annotation_file}: dropped {dropped} degenerate boxes and clipped {clipped} that "
                          "reached out of their image", stacklevel=2)
        return objects

    def set_epoch(self, epoch):
        """Augmentation draws anew by itself."""

    def __getitem__(self, index):
        image_id = self.ids[index]
        labels, boxes = self.objects[image_id]
        path, info = Path(self.root) / self.file_name(image_id), self.coco.imgs[image_id]
        try:
            image = v2.functional.to_image(self._load_image(image_id))
        except OSError as error:
            raise ValueError(f"image {path} can't be read: {error}") from error
        size = tuple(image.shape[-2:])
        if size != (info["height"], info["width"]):
            raise ValueError(f"image {path} has {size[1]} x {size[0]} pixels, its annotations are for "
                             f"{info['width']} x {info['height']}: resized, or turned by its EXIF tag?")
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        image, target = self.transform(image, {"boxes": boxes, "labels": labels})
        height, width = image.shape[-2:]
        boxes = box_convert(target["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
        boxes = (boxes / torch.tensor([width, height, width, height])).reshape(-1, 4)
        target = {"labels": target["labels"], "boxes": boxes}
        return Example(image.as_subclass(Tensor), target, image_id, size)

    def ground_truth(self):
        return self.coco


def check_coco_json(path):
    """Raise ValueError if the annotations `path` are not there, not JSON or not COCO."""
    data = read_json(path)
    for key, needed in (("images", {"id", "file_name", "height", "width"}), ("categories", {"id", "name"}),
                        ("annotations", {"id", "image_id", "category_id", "bbox"})):
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path} is not in COCO format: it has no list of {key}")
        for entry in entries:
            lacking = needed - (set(entry) if isinstance(entry, dict) else set())
            if lacking:
                raise ValueError(f"{path} is not in COCO format: an entry of {key} lacks "
                                 f"{', '.join(sorted(lacking))}: {str(entry)[:80]}")
        if len({entry["id"] for entry in entries}) < len(entries):
            raise ValueError(f"{path}: two of its {key} have the same id")
    image_ids = {image["id"] for image in data["images"]}
    for annotation in data["annotations"]:
        box = annotation["bbox"]
        if annotation["image_id"] not in image_ids:
            raise ValueError(f"{path}: annotation {annotation['id']} is for image {annotation['image_id']}, "
                             "which is not among the images")
        if not isinstance(box, list) or [isinstance(x, (int, float)) for x in box] != [True] * 4:
            raise ValueError(f"{path}: annotation {annotation['id']} has bbox {box}, it must be "
                             "[x, y, width, height] in pixels")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def coco_transform(image_size, is_train):
    """Resize the shorter side to `image_size`, the longer one to 5/3 of it at most (DETR: 800 and 1333);
    in training also mirror, crop, recolor and try smaller sizes."""
    longest = image_size * 5 // 3
    if not is_train:
        return v2.Resize(image_size, max_size=longest)
    sizes = [image_size * scale // 16 for scale in range(10, 17)]
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort(),
                       v2.RandomApply([v2.RandomIoUCrop(min_scale=0.5)], p=0.5),
                       v2.RandomShortestSize(sizes, max_size=longest),
                       v2.SanitizeBoundingBoxes(min_size=1)])


# ---------------------------------------------------------------------------------------------
# 4. Batches
# ---------------------------------------------------------------------------------------------


class Example(NamedTuple):
    image: Tensor           # uint8 [3, h, w]
    target: dict            # labels [n] long, boxes [n, 4] cxcywh in [0, 1]
    image_id: int
    original_size: tuple    # (height, width) before resizing: where AP is measured


MEMORY_FORMAT = torch.channels_last     # convolutions are faster in it, on CPUs and GPUs


class Batch(NamedTuple):
    images: Tensor          # uint8 [B, 3, H, W], zero where padded
    padding_mask: Tensor    # bool [B, H, W], True = padding; None if all images have one size
    targets: list           # they stay on the CPU, where checking them costs nothing
    image_ids: list
    original_sizes: list

    def on(self, device):
        """Normalised images and padding mask on `device`."""
        images = self.images.to(device, non_blocking=True, memory_format=MEMORY_FORMAT)
        mean, std = (torch.tensor(x, device="cpu").view(3, 1, 1).to(device, non_blocking=True)
                     for x in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))      # ImageNet's
        images = (images - mean) / std
        if self.padding_mask is None:
            return images, None
        mask = self.padding_mask.to(device, non_blocking=True)
        return images.masked_fill(mask[:, None], 0), mask


def collate(examples):
    """Examples of any sizes -> Batch, padded at the right and bottom."""
    sizes = torch.tensor([example.image.shape[-2:] for example in examples])
    height, width = sizes.amax(0).tolist()
    images = torch.zeros(len(examples), 3, height, width, dtype=torch.uint8)
    for index, example in enumerate(examples):
        images[index, :, :sizes[index, 0], :sizes[index, 1]] = example.image
    mask = None
    if (sizes != sizes[0]).any():
        mask = ((torch.arange(height)[:, None] >= sizes[:, 0, None, None])
                | (torch.arange(width) >= sizes[:, 1, None, None]))
    return Batch(images, mask, [example.target for example in examples],
                 [example.image_id for example in examples], [example.original_size for example in examples])


def build_datasets(options):
    """-> training and held-out data set."""
    if options.coco_train:
        train, val = (CocoDataset(*paths, options.image_size, is_train, options.subset)
                      for paths, is_train in ((options.coco_train, True), (options.coco_val, False)))
        if not any(len(labels) for labels, _ in val.objects.values()):
            raise ValueError(f"{options.coco_val[1]} holds no objects: there is no AP to measure")
        same_categories("--coco-train", train.categories, "--coco-val", val.categories)
        return train, val
    train, val = (ShapesDataset(size, options.seed, split)
                  for size, split in ((options.train_size, "train"), (options.val_size, "val")))
    if not any(len(labels) for labels in val.labels):
        raise ValueError(f"there is no object in the {options.val_size} held-out images: raise --val-size")
    return train, val


def same_categories(name, categories, other_name, others):
    """Raise ValueError where the categories of two sources differ: labels would mean something else."""
    if categories != others:
        shown, other_shown = ({c["id"]: c["name"] for c in x} for x in (categories, others))
        raise ValueError(f"the categories differ: {name} has {shown}, {other_name} {other_shown}")


def train_loader(dataset, options, process, epoch):
    """The batches of one epoch, the same for the same seed, whatever the number of processes."""
    dataset.set_epoch(epoch)
    sampler = DistributedSampler(dataset, process.count, process.rank, seed=options.seed)
    sampler.set_epoch(epoch)
    generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)      # seeds the workers
    return DataLoader(dataset, options.batch_size // process.count, sampler=sampler, collate_fn=collate,
                      num_workers=options.workers, generator=generator,
                      pin_memory=process.device.type == "cuda")


# ---------------------------------------------------------------------------------------------
# 5. Model and optimiser
# ---------------------------------------------------------------------------------------------

TOY = dict(num_queries=25, hidden_dim=64, num_heads=4, num_encoder_layers=0, num_decoder_layers=3,
           dim_feedforward=256, backbone="small", anchor_temperature=20.0, position_frequency=4.0,
           cell_centers=True, local_start=True, anchor_start="grid")
TOY_COCO = TOY | dict(num_queries=100, hidden_dim=128, num_encoder_layers=1, dim_feedforward=512,
                      small_widths=(32, 64, 128, 256))


def build_config(options, num_classes):
    """DNDETRConfig for the options; what is different from the authors' is in D5 and D6 of the ledger."""
    sizes = {} if options.model == "paper" else TOY_COCO if options.coco_train else TOY
    chosen = {"backbone": options.backbone, "num_queries": options.num_queries,
              "num_encoder_layers": options.encoder_layers, "anchor_start": options.anchors}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    # Frozen batch norm needs weights whose statistics it can freeze.
    chosen["frozen_norm"] = bool(options.pretrained_backbone)
    return DNDETRConfig(**(sizes | chosen | denoising_options(options)), num_classes=num_classes)


def denoising_options(options):
    return {"dn_groups": options.dn_groups, "label_noise": options.label_noise,
            "center_noise": options.center_noise, "size_noise": options.size_noise,
            "dn_max_queries": options.dn_max_queries, "dn_size_multiple": 8 if options.compile else 1}


def build_model(options, num_classes, log=print):
    """The model that the options describe, with the weights they name."""
    if options.init:
        model = start_from(options.init, num_classes, denoising_options(options), log)
    else:
        model = DNDETR(build_config(options, num_classes))
    if options.pretrained_backbone:
        load_imagenet(model, log)
    if options.no_mask:
        # Only the ablation wants this, so it is here and not in dn_detr.py: empty slots stay hidden,
        # everybody else is seen by everybody.
        model.blocked_queries = lambda slots, num_queries: nn.functional.pad(
            ~slots.is_real, (0, num_queries))[:, None, None]
    return model


def load_imagenet(model, log=print):
    name = model.config.backbone
    if name == "small":
        raise ValueError("--pretrained-backbone needs a torchvision backbone, try --backbone resnet50")
    try:
        state = get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True)
    except OSError as error:
        raise ValueError(f"the ImageNet weights of {name} can't be downloaded ({error}). Go online once, put "
                         f"the file into {torch.hub.get_dir()}/checkpoints, or do without "
                         "--pretrained-backbone") from error
    state = {key: value for key, value in state.items() if key in model.backbone.state_dict()}
    model.backbone.load_state_dict(state)
    log(f"backbone: {name} with ImageNet weights")


def load_any(path, **overrides):
    """Model and categories (None: the authors' COCO model) of our own checkpoint or the authors' file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint file {path}")
    checkpoint = dn_detr.read_checkpoint(path)
    if "config" not in checkpoint:
        return DNDETR.from_official(checkpoint, **overrides), None
    try:
        model = DNDETR(DNDETRConfig(**(checkpoint["config"] | overrides)))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is of another version or configuration: {error}") from error
    return model, checkpoint["categories"]


def start_from(path, num_classes, overrides, log=print):
    """The model of a checkpoint; where it has other classes, what depends on them starts anew."""
    old, _ = load_any(path, **overrides)
    if old.config.num_classes == num_classes:
        log(f"{path}: all {len(old.state_dict())} tensors kept")
        return old
    model = DNDETR(dataclasses.replace(old.config, num_classes=num_classes))
    state, fresh = old.state_dict(), model.state_dict()
    anew = [name for name in state if state[name].shape != fresh[name].shape]
    for name in anew:
        state[name] = fresh[name]
    with torch.no_grad():       # the row of "unknown" means the same in any data set
        state["label_embedding.weight"][-1] = old.label_embedding.weight[-1]
    model.load_state_dict(state)
    log(f"{path}: {len(state) - len(anew)} tensors kept; its {old.config.num_classes} classes are not these "
        f"{num_classes}, so these start anew: {', '.join(anew)} (but for the row of \"unknown\")")
    return model


def build_optimizer(model, options, num_steps):
    """AdamW, a tenth of the learning rate for a pretrained backbone (as the authors), warm-up and cosine."""
    pretrained = model.config.frozen_norm and model.config.backbone != "small"
    groups = [{"params": [p for p in model.backbone.parameters() if p.requires_grad],
               "lr": options.lr * (0.1 if pretrained else 1)},
              {"params": [p for name, p in model.named_parameters() if not name.startswith("backbone.")]}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=1e-4, fused=fused)
    warmup = min(100, num_steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / num_steps, 1))))
    return optimizer, schedule


# ---------------------------------------------------------------------------------------------
# 6. Evaluation
# ---------------------------------------------------------------------------------------------

AP_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
            "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


@torch.no_grad()
def evaluate(model, dataset, options, process, verbose=False):
    """-> COCO metrics in percent by AP_NAMES, the mean distance of matched queries' anchors from their
    objects' centres, and {image id: matching [N]} for IS. On the first process; elsewhere None."""
    model.eval()
    mine = Subset(dataset, range(process.rank, len(dataset), process.count))
    loader = DataLoader(mine, options.batch_size, collate_fn=collate, num_workers=options.workers)
    category_of = {label: category for category, label in dataset.label_of.items()}
    detections, matching, distances = [], {}, []
    for batch in tqdm(loader, desc="evaluating", leave=False, disable=process.rank > 0):
        with autocast(options, process.device):
            outputs = model(*batch.on(process.device))
        for image_id, result in zip(batch.image_ids, postprocess(outputs, batch.original_sizes)):
            result["boxes"] = box_convert(result["boxes"], "xyxy", "xywh")
            for box, score, label in zip(*(result[name].tolist() for name in ("boxes", "scores", "labels"))):
                if label in category_of:
                    detections.append({"image_id": image_id, "category_id": category_of[label],
                                       "bbox": box, "score": score})
        matched = matched_objects(outputs, batch.targets, model.config)             # [B, N]
        matching |= dict(zip(batch.image_ids, matched))
        distances += anchor_distances(model, batch.targets, matched)
    gathered = process.gather((detections, matching, distances))
    if gathered is None:
        return None
    detections, matching, distances = (sum((part[0] for part in gathered), []),
                                       {k: v for part in gathered for k, v in part[1].items()},
                                       sum((part[2] for part in gathered), []))
    metrics = coco_metrics(dataset.ground_truth(), detections, list(matching), verbose)
    return metrics, float(np.mean(distances)) if distances else None, matching


def anchor_distances(model, targets, matched):
    """How far the centres of matched objects are from where their queries' learned anchors start, in
    image sides: small means that queries search locally (the paper's second claim)."""
    centers = model.anchors.weight.sigmoid()[:, :2].repeat(max(model.config.num_patterns, 1), 1).cpu()
    distances = []
    for target, row in zip(targets, matched):
        found = row >= 0
        distances += (centers[found] - target["boxes"][row[found], :2]).norm(dim=1).tolist()
    return distances


def coco_metrics(coco, detections, image_ids, verbose=False):
    """COCO's twelve numbers, in percent, of detections as in COCO's result files."""
    if not detections:
        return dict.fromkeys(AP_NAMES, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluator.params.imgIds = image_ids
        if not verbose:     # AP by object size costs three quarters of the time
            evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
        evaluator.summarize()
    # COCO says -1 where there is nothing to measure, as of large objects on small images.
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(AP_NAMES, evaluator.stats)}


def mean_instability(previous, current):
    """IS (Sec. 3.1), mean over the images; None in the first epoch."""
    if previous.keys() != current.keys():
        return None
    return float(np.mean([matching_instability(previous[id], current[id]) for id in current]))


def evaluate_checkpoint(options, process):
    """--evaluate: COCO's twelve numbers of a checkpoint of ours or of the authors."""
    model, categories = load_any(options.evaluate)
    if options.coco_val:
        dataset = CocoDataset(*options.coco_val, options.image_size, False, options.subset,
                              labels_are_ids=categories is None)
        if categories is not None:
            same_categories(options.evaluate, categories, "the data", dataset.categories)
    else:
        dataset = ShapesDataset(options.val_size, options.seed, "val")
        if categories != dataset.categories:
            raise ValueError(f"{options.evaluate} was not trained on shapes: evaluate it with --coco-val")
    evaluate(model.to(process.device), dataset, options, process, verbose=True)


# ---------------------------------------------------------------------------------------------
# 7. Training
# ---------------------------------------------------------------------------------------------


def train_one_epoch(run, loader, description):
    """-> mean of every loss term. Raises FloatingPointError, naming step and images, if one is not finite."""
    run.model.train()
    log, device = LossLog(), run.process.device
    progress = tqdm(loader, desc=description, leave=False, disable=run.process.rank > 0)
    for batch in progress:
        images, padding_mask = batch.on(device)
        try:
            with autocast(run.options, device):
                outputs = run.parallel_model(images, padding_mask, batch.targets)
            losses = run.criterion(outputs, batch.targets)
        except FloatingPointError as error:
            log.settle()            # if the step before was to blame, say that
            raise FloatingPointError(f"step {run.step}, images {batch.image_ids}: {error}") from error
        run.optimizer.zero_grad()
        run.scaler.scale(losses["loss"]).backward()
        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=0.1)
        if not run.scaler.is_enabled():     # the scaler skips steps with infinite gradients
            losses["gradient_norm"] = norm
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
        log.add(losses, run.step, batch.image_ids)
        run.step += 1
        if log.latest is not None:
            progress.set_postfix(loss=f"{log.latest:.2f}", refresh=False)
    return log.mean()


class LossLog:
    """Means of the losses. They reach the host one step late: the next step's matching has waited for the
    device by then, so that reading them costs no wait of its own."""

    def __init__(self):
        self.names, self.sums, self.count, self.pending, self.latest = None, 0, 0, None, None

    def add(self, losses, step, image_ids):
        self.settle()
        self.names = list(losses)
        values = torch.stack([value.detach() for value in losses.values()])
        self.pending = values.to("cpu", non_blocking=True), step, image_ids

    def settle(self):
        if self.pending is None:
            return
        (values, step, image_ids), self.pending = self.pending, None
        if not values.isfinite().all():
            bad = [name for name, ok in zip(self.names, values.isfinite()) if not ok]
            raise FloatingPointError(f"step {step}, images {image_ids}: {', '.join(bad)} not finite")
        self.sums, self.count, self.latest = self.sums + values.double(), self.count + 1, float(values[0])

    def mean(self):
        if self.pending is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.settle()
        return dict(zip(self.names, (self.sums / self.count).tolist()))


def autocast(options, device):
    """bfloat16 where the device computes in it, else float16 (which needs the scaler), with --amp."""
    return torch.autocast(device.type, amp_dtype(device), enabled=options.amp)


def amp_dtype(device):
    slow = device.type == "cuda" and not torch.cuda.is_bf16_supported()
    return torch.float16 if slow else torch.bfloat16


class Run:
    """All that training changes, and what a checkpoint must therefore hold."""

    STATEFUL = ("model", "optimizer", "schedule", "scaler")
    PLAIN = ("epoch", "step", "seconds", "history", "matching")

    def __init__(self, options, process, train_set):
        self.options, self.process = options, process
        self.categories = [{"id": c["id"], "name": c["name"]} for c in train_set.categories]
        self.model = build_model(options, len(self.categories), process.log).to(process.device)
        self.model.backbone.to(memory_format=MEMORY_FORMAT)
        self.criterion = DNDETRCriterion(self.model.config)
        num_steps = math.ceil(len(train_set) / options.batch_size) * options.epochs
        self.optimizer, self.schedule = build_optimizer(self.model, options, num_steps)
        needs_scaler = options.amp and amp_dtype(process.device) == torch.float16
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=needs_scaler)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.history, self.matching = [], {}
        if options.compile:
            if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++", "cl")):
                raise ValueError("--compile needs a C++ compiler: install g++, or drop --compile")
            for module in (self.model.backbone, self.model.encoder, self.model.decoder):
                module.compile()
        self.parallel_model = process.parallel(self.model)

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        numbers = {name: getattr(self, name) for name in (*self.PLAIN, "categories")}
        device = self.process.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return parts | numbers | {"config": dataclasses.asdict(self.model.config),
                                  "random": torch.get_rng_state(), "random_cuda": cuda}

    def load_state_dict(self, state):
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"the checkpoint is not one of a run: it lacks {', '.join(sorted(missing))}")
        same_categories("the checkpoint", state["categories"], "the data", self.categories)
        ours = dataclasses.asdict(self.model.config)
        other = [name for name in ours if state["config"].get(name) != ours[name]]
        if other:
            raise ValueError("the checkpoint has another configuration: " + ", ".join(
                f"{name} {state['config'].get(name)}, not {ours[name]}" for name in other))
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        for name in self.PLAIN:
            setattr(self, name, state[name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.process.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.process.device)


def train(options, process):
    """A whole run, from its first or its last finished epoch on; returns its history."""
    if options.batch_size % process.count:
        raise ValueError(f"--batch-size {options.batch_size} can't be shared by {process.count} processes")
    if process.rank == 0:
        check_directory(options)
    torch.manual_seed(options.seed)
    train_set, val_set = build_datasets(options)
    run = Run(options, process, train_set)
    last = options.output_dir / "last.pt"
    if options.resume and last.is_file():
        run.load_state_dict(dn_detr.read_checkpoint(last))
    if process.rank == 0:
        write_config(options, run.model.config)
        write_metrics(run)          # they may have been killed between checkpoint and metrics
    parameters = sum(p.numel() for p in run.model.parameters())
    process.log(f"{len(train_set)} training and {len(val_set)} held-out images, {len(run.categories)} "
                f"classes, {parameters / 1e6:.1f} M parameters, on {process.count} x {process.device}")
    pictures_at = time.time()
    for epoch in range(run.epoch, options.epochs):
        started = time.time()
        if process.count > 1:       # every process draws noise of its own
            torch.manual_seed(options.seed * 1000 + process.rank + 100_000 * epoch)
        loader = train_loader(train_set, options, process, epoch)
        try:
            losses = train_one_epoch(run, loader, f"epoch {epoch + 1}/{options.epochs}")
        except FloatingPointError as error:
            left = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
            raise FloatingPointError(f"{error}; {left}; try a lower --lr") from error
        evaluated = evaluate(run.model, val_set, options, process)
        run.epoch, run.seconds = epoch + 1, run.seconds + time.time() - started
        if evaluated is not None:
            record(run, losses, *evaluated)
            if time.time() - pictures_at > 60:
                draw_pictures(run, val_set)
                pictures_at = time.time()
    if process.rank == 0:
        draw_pictures(run, val_set)
    return run.history


def record(run, losses, metrics, distance, matching):
    """One epoch is over: one line on the screen, one in metrics.jsonl, a checkpoint."""
    weights = run.criterion.weights
    denoising = sum(weights[name.removeprefix("dn_").rstrip("_0123456789")] * value
                    for name, value in losses.items() if name.startswith("dn_"))
    matching_loss = losses["loss"] - denoising
    row = {"epoch": run.epoch, "step": run.step} | losses
    row |= {"loss_matching": matching_loss, "loss_denoising": denoising}
    row |= metrics | {"instability": mean_instability(run.matching, matching), "anchor_distance": distance,
                      "lr": run.optimizer.param_groups[-1]["lr"], "seconds": run.seconds}
    run.matching = matching
    run.history.append(row)
    is_best = metrics["AP"] >= max(old["AP"] for old in run.history)
    for name in ("best.pt", "last.pt") if is_best else ("last.pt",):    # killed in between: both again
        write_atomically(run.options.output_dir / name, lambda path: torch.save(run.state_dict(), path))
    write_metrics(run)
    left = run.seconds / run.epoch * (run.options.epochs - run.epoch)
    instability = "-" if row["instability"] is None else f"{row['instability']:.2f}"
    tqdm.write(f"epoch {run.epoch:2}/{run.options.epochs}  loss {losses['loss']:5.2f} (matching "
               f"{matching_loss:5.2f}, denoising {denoising:5.2f})  AP {row['AP']:4.1f}  AP50 "
               f"{row['AP50']:4.1f}  IS {instability}  {run.seconds:.0f} s, {left:.0f} s left")


# ---------------------------------------------------------------------------------------------
# 8. Files
# ---------------------------------------------------------------------------------------------


def write_atomically(path, write):
    """A run killed at any moment leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save_figure(figure, path):
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def check_directory(options):
    """Raise ValueError rather than overwrite another run in --output-dir, or go on with half of one."""
    directory = options.output_dir
    found = [name for name in ("config.json", "last.pt", "best.pt", "metrics.jsonl")
             if (directory / name).exists()]
    if found and not options.resume:
        raise ValueError(f"{directory} holds another run ({found[0]}): go on with --resume {directory}, or "
                         "choose another --output-dir")
    if "metrics.jsonl" in found and "last.pt" not in found and (directory / "metrics.jsonl").read_text():
        raise ValueError(f"{directory} has metrics but no last.pt to go on from: put it back, or choose "
                         "another --output-dir")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output-dir {directory} can't be made: {error.strerror}") from error


def write_config(options, config):
    saved = {name: value for name, value in vars(options).items() if name not in ("resume", "device")}
    text = json.dumps({"options": saved, "model": dataclasses.asdict(config)}, indent=1, default=str)
    write_atomically(options.output_dir / "config.json", lambda path: path.write_text(text))


def write_metrics(run):
    lines = "".join(json.dumps(row) + "\n" for row in run.history)
    write_atomically(run.options.output_dir / "metrics.jsonl", lambda path: path.write_text(lines))


# ---------------------------------------------------------------------------------------------
# 9. Pictures
# ---------------------------------------------------------------------------------------------

# Okabe and Ito's colors, told apart by colour-blind readers too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def pyplot():
    """matplotlib.pyplot in the one style of this project's figures."""
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 130, "savefig.bbox": "tight"})
    return plt


def draw_pictures(run, val_set):
    """curves.png and detections.png of a run."""
    folder = run.options.output_dir
    save_figure(draw_curves(run.history), folder / "curves.png")
    save_figure(draw_detections(run.model, val_set, run.process.device), folder / "detections.png")
    pyplot().close("all")


def draw_curves(history):
    """Loss, AP and IS over the epochs."""
    figure, axes = pyplot().subplots(1, 3, figsize=(11, 3), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axis, title, names in ((axes[0], "loss", ("loss_matching", "loss_denoising")),
                               (axes[1], "held-out images, %", ("AP", "AP50", "AP75")),
                               (axes[2], "instability IS", ("instability",))):
        for name, color in zip(names, COLORS):
            points = [(epoch, row[name]) for epoch, row in zip(epochs, history) if row[name] is not None]
            axis.plot(*zip(*points) if points else ((), ()), "o-", color=color, markersize=3,
                      label=name.removeprefix("loss_"))
        axis.set(xlabel="epoch", title=title, ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(names) > 1:
            axis.legend(frameon=False)
    return figure


@torch.no_grad()
def draw_detections(model, dataset, device, columns=6, threshold=0.3):
    """Truth above, predictions below, for held-out images that hold something."""
    plt = pyplot()
    model.eval()
    category_names = {dataset.label_of[category["id"]]: category["name"] for category in dataset.categories}
    filled = [index for index in range(len(dataset)) if len(dataset[index].target["labels"])][:columns]
    figure, axes = plt.subplots(2, len(filled), figsize=(2.2 * len(filled), 4.7), layout="constrained",
                                squeeze=False)
    for column, index in enumerate(filled):
        batch = collate([dataset[index]])
        height, width = batch.images.shape[-2:]
        result = postprocess(model(*batch.on(device)), [(height, width)])[0]
        keep = result["scores"] > threshold
        truth = batch.targets[0]
        boxes = box_convert(truth["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        for axis, (labels, xyxy, scores) in zip(axes[:, column], (
                (truth["labels"], boxes, None),
                (result["labels"][keep], result["boxes"][keep], result["scores"][keep]))):
            axis.imshow(batch.images[0].permute(1, 2, 0).numpy())
            names = [category_names[label] for label in labels.tolist()]
            draw_boxes(axis, labels.tolist(), names, xyxy.tolist(), scores)
    for row, title in enumerate(("truth", f"prediction (score > {threshold})")):
        axes[row, 0].set_title(title, loc="left", fontweight="bold")
    return figure


def draw_boxes(axis, labels, names, boxes, scores):
    """Corner boxes in pixels with the names of their classes, one color a class."""
    from matplotlib.patches import Rectangle
    for index, (label, name, (x0, y0, x1, y1)) in enumerate(zip(labels, names, boxes)):
        color = COLORS[label % len(COLORS)]
        for line, width in (("white", 2.4), (color, 1.4)):
            axis.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color=line,
                                     linewidth=width))
        text = name + ("" if scores is None else f" {scores[index]:.2f}")
        axis.text(x0, y0 - 1, text, fontsize=5, color="white", va="bottom", clip_on=True,
                  bbox={"facecolor": color, "edgecolor": "none", "pad": 0.6})
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


# ---------------------------------------------------------------------------------------------
# 10. Processes: nothing here is about detection
# ---------------------------------------------------------------------------------------------


class Process:
    """This process among those that torchrun started; alone without torchrun."""

    def __init__(self, device_name=None):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device_name)
        if "RANK" in os.environ:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def log(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def parallel(self, model):
        """The model whose gradients are averaged over the processes."""
        if self.count == 1:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def gather(self, value):
        """A list of every process's `value` on the first process, None on the others."""
        if self.count == 1:
            return [value]
        gathered = [None] * self.count if self.rank == 0 else None
        dist.gather_object(value, gathered)
        return gathered


# ---------------------------------------------------------------------------------------------
# 11. Experiments: many runs, side by side
# ---------------------------------------------------------------------------------------------

COMPARED = {  # name: flags
    "random anchors, denoising": ["--anchors", "normal"],
    "random anchors, without": ["--anchors", "normal", "--dn-groups", "0"],
    "grid anchors, denoising": ["--anchors", "grid"],
    "grid anchors, without": ["--anchors", "grid", "--dn-groups", "0"],
}
ABLATED = {  # name: flags, AP on COCO in the paper (R50, Tables 4 and 5; none: not in the paper)
    "no denoising": (["--dn-groups", "0"], 42.2),
    "boxes only, 1 group": (["--dn-groups", "1", "--label-noise", "0"], 43.0),
    "boxes and labels, 1 group": (["--dn-groups", "1"], 43.4),
    "no attention mask, 1 group": (["--dn-groups", "1", "--no-mask"], 24.0),
    "2 groups": (["--dn-groups", "2"], None),
    "5 groups": (["--dn-groups", "5"], 44.1),
    "10 groups": (["--dn-groups", "10"], None),
}


def run_all(flags_by_name, options):
    """Train every (name, seed), several at a time, each in a directory of its own below --output-dir;
    finished ones are kept, stopped ones go on. One progress bar. -> {name: [history of each seed]}."""
    device = pick_device(options.device)
    jobs = options.jobs or (os.cpu_count() if device.type == "cpu" else 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    sizes = [item for name in ("epochs", "batch_size", "lr", "train_size", "val_size")
             for item in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    waiting, directories = [], {}
    for seed in options.seeds:
        for name, flags in flags_by_name.items():
            directory = options.output_dir / f"{name.replace(', ', '-').replace(' ', '-')}-seed-{seed}"
            flags = [*flags, *sizes, "--seed", str(seed), "--output-dir", str(directory),
                     "--device", str(device)]
            directories[name, seed] = directory
            if len(read_history(directory)) < options.epochs:
                waiting.append((directory, flags))
            check_same_options(directory, flags)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    running = {}
    try:
        total = len(directories) * options.epochs
        with tqdm(total=total, desc=f"{len(directories)} runs", unit="epoch") as progress:
            while waiting or running:
                while waiting and len(running) < jobs:
                    directory, flags = waiting.pop(0)
                    if (directory / "config.json").exists():
                        flags = ["--resume", str(directory), "--device", str(device)]
                    with open(f"{directory}.log", "a") as log:
                        running[directory] = subprocess.Popen([sys.executable, __file__, *flags], stdout=log,
                                                              stderr=subprocess.STDOUT, env=environment)
                time.sleep(1)
                for directory, child in list(running.items()):
                    if child.poll() is not None:
                        del running[directory]
                        if child.returncode:
                            raise ValueError(f"{directory} failed, see {directory}.log")
                progress.n = sum(len(read_history(directory)) for directory in directories.values())
                progress.refresh()
    finally:
        for child in running.values():
            child.terminate()
    return {name: [read_history(directories[name, seed]) for seed in options.seeds] for name in flags_by_name}


def read_history(directory):
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_same_options(directory, flags):
    """Raise ValueError if `directory` holds a run with other options than these."""
    if (directory / "config.json").exists():
        saved = read_json(directory / "config.json")["options"]
        wanted = vars(parse_options(flags))
        other = [name for name in saved if json.dumps(saved[name]) != json.dumps(wanted[name], default=str)]
        if other:
            raise ValueError(f"{directory} holds a run with other {', '.join(other)}: remove it or choose "
                             "another --output-dir")


def column(histories, name):
    """Array [seeds, epochs] of one number of the histories, nan where there is none."""
    return np.array([[row[name] for row in history] for history in histories], dtype=float)  # None -> nan


def mean_and_spread(values, digits=1):
    return "-" if np.isnan(values).any() else f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def reach(histories, goal):
    """Mean over the seeds of [epochs, steps, seconds] until AP is at least `goal`; None if one never is."""
    first = [next((row for row in history if row["AP"] >= goal), None) for history in histories]
    if None in first:
        return None
    return [float(np.mean([row[name] for row in first])) for name in ("epoch", "step", "seconds")]


def write_results(options, results, extra):
    """results.json: every number of every epoch of every seed, and how it was made."""
    device = pick_device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    names = ("epoch", "step", "seconds", "AP", "AP50", "instability", "anchor_distance", "loss_matching",
             "loss_denoising")
    data = {"seeds": options.seeds, "machine": machine, "torch": torch.__version__, "lr": options.lr,
            "batch_size": options.batch_size, "train_size": options.train_size, "val_size": options.val_size,
            "runs": {name: [[{key: row[key] for key in names} for row in history] for history in histories]
                     for name, histories in results.items()}} | extra
    write_atomically(options.output_dir / "results.json", lambda path: path.write_text(json.dumps(data)))


def compare(options):
    """--compare: what denoising changes, with the paper's random anchors and with anchors on a grid."""
    results, reached = run_all(COMPARED, options), {}
    for kind in dict.fromkeys(name.split(", ")[0] for name in results):
        arms = [f"{kind}, denoising", f"{kind}, without"]
        print(f"\n{kind}, with / without denoising: mean ± standard deviation of {len(options.seeds)} seeds"
              "\n\n| epoch | AP | AP50 | IS | anchor distance |\n|---|---|---|---|---|")
        for epoch in range(options.epochs):
            cells = [" / ".join(mean_and_spread(column(results[arm], key)[:, epoch], digits) for arm in arms)
                     for key, digits in (("AP", 1), ("AP50", 1), ("instability", 2), ("anchor_distance", 3))]
            print(f"| {epoch + 1} | " + " | ".join(cells) + " |")
        goal = column(results[arms[1]], "AP")[:, -1].mean()
        reached[kind] = {"AP": goal, "with": reach(results[arms[0]], goal), "without": [
            column(results[arms[1]], name)[:, -1].mean() for name in ("epoch", "step", "seconds")]}
        with_, without = ("never" if x is None else "after {:.1f} epochs, {:.0f} steps, {:.0f} s".format(*x)
                          for x in (reached[kind]["with"], reached[kind]["without"]))
        print(f"\nwithout denoising AP {goal:.1f} {without}; with denoising the same {with_}")
    write_results(options, results, {"reached": reached})
    path = options.output_dir / "compare.png"
    save_figure(draw_comparison(results), path)
    print(f"\nfigure: {path}, numbers: {options.output_dir / 'results.json'}")


def draw_comparison(results):
    """AP, IS and anchor distance over the epochs: means over the seeds, bands from least to most."""
    kinds = list(dict.fromkeys(name.split(", ")[0] for name in results))
    figure, axes = pyplot().subplots(len(kinds), 3, figsize=(11, 2.9 * len(kinds)), layout="constrained",
                                     squeeze=False)
    panels = (("AP", "AP on held-out images, %"), ("instability", "instability IS"),
              ("anchor_distance", "distance of anchor and object"))
    for row, kind in zip(axes, kinds):
        for axis, (key, label) in zip(row, panels):
            for arm, color in (("denoising", COLORS[0]), ("without", COLORS[1])):
                values = column(results[f"{kind}, {arm}"], key)
                epochs = np.array([row["epoch"] for row in results[f"{kind}, {arm}"][0]])
                known = ~np.isnan(values).any(0)
                axis.plot(epochs[known], values.mean(0)[known], "o-", color=color, markersize=3, label=arm)
                axis.fill_between(epochs[known], values.min(0)[known], values.max(0)[known], color=color,
                                  alpha=0.2)
            axis.set(xlabel="epoch", ylabel=label, title=kind, ylim=(0, None))
        goal = column(results[f"{kind}, without"], "AP")[:, -1].mean()
        row[0].axhline(goal, color="black", linewidth=1, linestyle=":")
    axes[0, 0].legend(frameon=False)
    return figure


def ablate(options):
    """--ablate: the paper's Tables 4 and 5 on shapes, with the paper's random anchors."""
    flags_by_name = {name: ["--anchors", "normal", *flags] for name, (flags, _) in ABLATED.items()}
    results = run_all(flags_by_name, options)
    print("| | AP | AP50 | seconds | the paper's AP on COCO |\n|---|---|---|---|---|")
    for name, histories in results.items():
        paper = ABLATED[name][1]
        print(f"| {name} | {mean_and_spread(column(histories, 'AP')[:, -1])} | "
              f"{mean_and_spread(column(histories, 'AP50')[:, -1])} | "
              f"{column(histories, 'seconds')[:, -1].mean():.0f} | {'-' if paper is None else paper} |")
    write_results(options, results, {})
    print(f"numbers: {options.output_dir / 'results.json'}")


def main(argv=None):
    try:
        options = parse_options(argv)
        if options.compare or options.ablate:
            (compare if options.compare else ablate)(options)
            return
        with Process(options.device) as process:
            if options.evaluate:
                evaluate_checkpoint(options, process)
            else:
                train(options, process)
                process.log("curves.png, detections.png, metrics.jsonl and checkpoints are in "
                            f"{options.output_dir}")
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"train_toy.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntrain_toy.py: stopped; a run goes on with --resume DIR, an experiment with its command")


if __name__ == "__main__":
    main()
