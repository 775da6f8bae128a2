"""Train dn_detr.py on synthetic shapes, or on any dataset in COCO format.

    python train_toy.py                                          shapes, a few minutes on two CPU cores
    python train_toy.py --dn-groups 0 --output-dir runs/dab      the same without denoising: DAB-DETR
    python train_toy.py --coco-train IMAGES_DIR ANNOTATIONS_JSON --overfit 8         try this first
    python train_toy.py --coco-train IMAGES_DIR ANNOTATIONS_JSON --coco-val IMAGES_DIR ANNOTATIONS_JSON
    python train_toy.py --resume runs/coco                       continue after an interruption
    python train_toy.py evaluate runs/coco/best.pt               COCO's twelve numbers, and AP of each class
    python train_toy.py predict runs/coco/best.pt photo.jpg folder_of_photos
    python train_toy.py compare                                  with and without denoising, 5 seeds
    python train_toy.py ablate                                   the paper's Tables 4 and 5
    torchrun --nproc-per-node 8 train_toy.py ...                 several processes, one per GPU

Each command has a --help. A training also takes every field of DNDETRConfig: --dn-groups 2 --hidden-dim 128.
Start reading at train() in section 8: its inner loop is the training step. What it uses stands above it.
"""
import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from matplotlib import ft2font, get_data_path
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset
from torchvision import tv_tensors
from torchvision.models import get_model_weights
from torchvision.ops import box_convert, box_iou
from torchvision.transforms import v2
from tqdm import tqdm

import dn_detr
from dn_detr import DNDETR, DNDETRConfig, DNDETRCriterion, postprocess, read_checkpoint, to_device

# ---- 1. Settings and options ---------------------------------------------------------------------

TOY = dict(num_queries=25, hidden_dim=64, num_heads=4, num_encoder_layers=0, num_decoder_layers=3,
           dim_feedforward=256, backbone="small", anchor_temperature=20.0, position_frequency=4.0,
           cell_centers=True, loss_class=2.0, dn_groups=3)
TOY_COCO = TOY | dict(num_queries=100, hidden_dim=128, num_encoder_layers=1, dim_feedforward=512,
                      small_widths=(32, 64, 128, 256))
FIELDS = {field.name: field.type for field in dataclasses.fields(DNDETRConfig) if field.name != "num_classes"}

DEFAULTS = {
    "train": dict(seed=0, epochs=8, batch_size=8, lr=3e-3, workers=0, device=None, amp=False, model="toy",
                  anchors="grid", pretrained_backbone=False, init=None, resume=None, coco_train=None,
                  coco_val=None, overfit=None, image_size=None, train_size=3200, val_size=300,
                  output_dir="runs/shapes"),
    "evaluate": dict(coco_val=None, image_size=None, batch_size=8, workers=2, device=None, amp=False),
    "predict": dict(image_size=None, threshold=0.3, device=None, output_dir="runs/predictions"),
    "compare": dict(anchors="normal", epochs=12, batch_size=8, train_size=800, val_size=200, device=None,
                    seeds=[0, 1, 2, 3, 4], jobs=None, output_dir="runs/experiment")}
DEFAULTS["ablate"] = DEFAULTS["compare"]
VARIANTS = {    # of a training: other defaults, and the options that have no effect
    "shapes": (dict(), {"coco_val", "image_size"}),
    "coco_train": (dict(epochs=50, lr=1e-3, image_size=256, workers=2, output_dir="runs/coco"),
                   {"train_size", "val_size"}),
    "overfit": (dict(epochs=6, lr=1e-3, batch_size=4, workers=0, output_dir="runs/overfit"),
                {"coco_val", "train_size", "val_size"}),
    "init": (dict(lr=1e-4), {"model", "anchors", "pretrained_backbone"}),
    "paper": (dict(lr=1e-4), {"anchors"})}


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


PATHS = dict(nargs=2, metavar=("IMAGES_DIR", "JSON"))
OPTIONS = {
    "coco_train": dict(**PATHS, help="a folder of images, and their annotations in COCO format"),
    "coco_val": dict(**PATHS, help="the same for the held-out images"),
    "overfit": dict(type=positive, metavar="N", help="learn the first N training images by heart"),
    "resume": dict(metavar="DIR", help="continue the run in this folder; its data may have moved"),
    "init": dict(metavar="CHECKPOINT", help="start from a checkpoint, ours or the authors'"),
    "model": dict(choices=("toy", "paper"), help="paper: the R50 architecture, with our recipe"),
    "pretrained_backbone": dict(action="store_true", help="ImageNet weights, downloaded"),
    "anchors": dict(choices=("grid", "normal"), help="initial anchors; normal: at random, as in the paper"),
    "epochs": dict(type=positive, help="passes over the training images"),
    "batch_size": dict(type=positive, help="images a step, over all processes"),
    "lr": dict(type=float, help="learning rate"),
    "seed": dict(type=int, help="decides weights, shapes, order, augmentation and noise"),
    "seeds": dict(type=int, nargs="+", help="of the runs of each configuration"),
    "jobs": dict(type=positive, help="runs at a time; if not given, one per CPU core, or one on a GPU"),
    "train_size": dict(type=positive, help="training images of shapes"),
    "val_size": dict(type=positive, help="held-out images of shapes"),
    "image_size": dict(type=positive, help="shorter side of a photograph (paper: 800)"),
    "threshold": dict(type=float, help="lowest score of a detection that is kept"),
    "workers": dict(type=int, help="processes that load images"),
    "amp": dict(action="store_true", help="bfloat16 where the device has it, else float16"),
    "device": dict(help="cuda, mps or cpu; if not given, the first that is there"),
    "output_dir": dict(help="where the files go")}
KINDS = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(type=int, nargs="+")}
for name, kind in FIELDS.items():
    OPTIONS[name] = KINDS.get(kind, dict(type=kind)) | dict(help=argparse.SUPPRESS)


def parse_options(argv=None):
    """The options of a command, with its defaults. Ends the program if one is wrong or would have no effect.
    Raises ValueError if a run to resume can't be read."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv.pop(0) if argv and argv[0] in DEFAULTS else "train"
    defaults = DEFAULTS[command]
    about = f"Defaults: {defaults}"
    for name, (values, _) in VARIANTS.items() if command == "train" else ():
        about += f"\nwith {name}: {values}" if values else ""
    parser = argparse.ArgumentParser(f"train_toy.py {command}", description=__doc__, epilog=about,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if command in ("evaluate", "predict"):
        parser.add_argument("checkpoint", help="ours or the authors'")
    if command == "predict":
        parser.add_argument("images", nargs="+", help="image files, and folders of them")
    for name, how in OPTIONS.items():
        if name in defaults or command == "train" and name in FIELDS:
            parser.add_argument("--" + name.replace("_", "-"), **how)
    given = vars(parser.parse_args(argv))

    useless = set()     # options without effect
    if "resume" in given:
        saved = read_checkpoint(Path(given["resume"]) / "last.pt")
        if "options" not in saved:
            parser.error(f"{given['resume']}/last.pt is not from a run")
        defaults = saved["options"] | {"device": None, "output_dir": given["resume"]}
        useless = given.keys() - {"resume", "coco_train", "coco_val", "device", "workers"}
    elif command == "train":
        if "coco_train" in given and not given.keys() & {"coco_val", "overfit"}:
            parser.error("--coco-val is missing: AP is measured on images that were not trained on")
        chosen = given.keys() | {given.get("model"), "coco_train" if "coco_train" in given else "shapes"}
        for name, (values, without_effect) in VARIANTS.items():
            if name in chosen:
                defaults, useless = defaults | values, useless | without_effect
    for name in sorted(useless & given.keys()):
        parser.error(f"--{name.replace('_', '-')} has no effect with these options: drop it")
    return argparse.Namespace(**{"command": command} | defaults | given)


# ---- 2. Processes, devices, files: nothing here is about detection ------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device(name=None):
    """The device of that name, or the best there is; joins the other processes if torchrun started some."""
    has_mps = torch.backends.mps.is_available()
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if "RANK" in os.environ and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with explain(f"--device {name} can't be used here", RuntimeError, AssertionError, NotImplementedError):
        device = torch.zeros(1, device=name).device
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)           # where NCCL gathers Python objects
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def parallel(model, device):
    """The model, with its gradients averaged over the processes."""
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # A single decoder layer does not use position_scale, which the authors' weights contain all the same.
    unused = model.config.num_decoder_layers == 1
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)


def amp_dtype(device):
    """bfloat16, or float16 on GPUs that only emulate bfloat16 (such as Colab's T4)."""
    is_slow = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if is_slow else torch.bfloat16


def autocast(device, amp):
    return torch.autocast(device.type, amp_dtype(device)) if amp else nullcontext()


def seed_of(*numbers):
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def explain(what, *errors):
    """Turn these errors into a ValueError that begins with `what`."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def log(text):
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def progress(iterable, description):
    return tqdm(iterable, desc=description, leave=False, disable=rank() > 0)


def write(path, write_to):
    """Write a file, in the first process only. A killed process or a full disk leaves the old one, whole."""
    if rank() > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                    # torch.save raises RuntimeError
        raise OSError(f"{path} can't be written, is the disk full? {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- 3. Shapes: a detection dataset out of nothing -----------------------------------------------

SIDE = 64   # pixels of an image
SHAPE_MASKS = {  # inside the unit box, u to the right and v down; the slack lets tips reach the box's border
    "circle": lambda u, v: u ** 2 + v ** 2 <= 1,
    "square": lambda u, v: np.ones_like(u + v, dtype=bool),
    "triangle": lambda u, v: abs(u) <= (v + 1) / 2 + 0.06,
    "diamond": lambda u, v: abs(u) + abs(v) <= 1.01,
    "cross": lambda u, v: (abs(u) <= 1 / 3) | (abs(v) <= 1 / 3),
    "ring": lambda u, v: (u ** 2 + v ** 2 <= 1) & (u ** 2 + v ** 2 >= 0.3),
}


def overlap(a, b):
    """Intersection of two xywh boxes over the area of the smaller one."""
    w, h = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return w * h / min(a[2] * a[3], b[2] * b[3])


def draw_scene(seed):
    """-> image uint8 [3, SIDE, SIDE] and its objects, (label, [x, y, w, h] in pixels). One image of twenty is
    empty, another one has 9 to 12 small shapes, and the others have 1 to 8."""
    rng = np.random.default_rng(seed)
    v, u = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    first, second = background = rng.uniform(0, 255, (2, 3))        # the two ends of a color gradient
    angle = rng.uniform(0, 2 * np.pi)
    blend = (u * np.cos(angle) + v * np.sin(angle) + 1) / 2
    image = first + (second - first) * blend.clip(0, 1)[..., None]
    kind, objects = rng.random(), []
    count = 0 if kind < 0.05 else rng.integers(9, 13) if kind < 0.1 else rng.integers(1, 9)
    smallest, largest = (18, 40) if count <= 4 else (15, 30) if count <= 8 else (12, 18)
    for _ in range(20 * count):                     # a shape that overlaps too much gets another chance
        w, h = rng.integers(smallest, largest + 1, 2).tolist()
        x, y = rng.integers(0, (SIDE - w + 1, SIDE - h + 1)).tolist()
        too_close = any(overlap((x, y, w, h), other) > 0.3 for _, other in objects)
        if len(objects) == count or too_close or not 0.6 < w / h < 1.7:
            continue
        label, color = int(rng.integers(len(SHAPE_MASKS))), rng.uniform(0, 255, 3)
        while (np.linalg.norm(color - background, axis=1) < 110).any():                 # hard to see
            color = rng.uniform(0, 255, 3)
        u, v = ((np.arange(length) + 0.5) / length * 2 - 1 for length in (w, h))
        inside = list(SHAPE_MASKS.values())[label](u, v[:, None])
        image[y:y + h, x:x + w][inside] = color
        objects.append((label, [x, y, w, h]))
    image += rng.normal(0, 7, image.shape)
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous(), objects


def open_shapes(size, seed, split):
    """-> a dict in COCO format, and a function that returns image i. Image i of a (seed, split) is always the
    same one. All are drawn here: drawing them anew in every epoch would take longer than training."""
    images, objects = zip(*(draw_scene((seed, split == "train", index)) for index in range(size)))
    data = {"images": [{"id": index, "height": SIDE, "width": SIDE} for index in range(size)],
            "categories": [{"id": index, "name": name} for index, name in enumerate(SHAPE_MASKS)],
            "annotations": [{"image_id": index, "category_id": label, "bbox": box}
                            for index in range(size) for label, box in objects[index]]}
    return data, images.__getitem__


# ---- 4. Datasets in COCO format, and batches -----------------------------------------------------

def read_coco(path):
    """The dict in an annotation file. Raises ValueError that shows the first record that is wrong."""
    with explain(f"{path} can't be read as JSON", OSError, ValueError):
        data = json.loads(Path(path).read_bytes())      # bytes, so that the encoding is found out
    images, categories = set(), set()                   # ids; isfinite also refuses what is not a number
    rules = {
        "images": (images, "an id of its own, a file_name, and a width and height above 0, in pixels",
                   lambda x: x["id"] not in images and isinstance(x["file_name"], str)
                   and all(0 < x[side] < math.inf for side in ("width", "height"))),
        "categories": (categories, "an id of its own, and a name",
                       lambda x: x["id"] not in categories and isinstance(x["name"], (str, int))),
        "annotations": (set(), "the image_id of an image, the category_id of a category, a bbox [x, y, "
                        "width, height] in pixels, and numbers as area and iscrowd, if there",
                        lambda x: x["image_id"] in images and x["category_id"] in categories
                        and len(x["bbox"]) == 4 and all(map(math.isfinite, x["bbox"]))
                        and math.isfinite(x.get("area") or 0) and int(x.get("iscrowd") or 0) in (0, 1))}
    for kind, (ids, needs, is_right) in rules.items():
        with explain(f"{path} is not in COCO format: it has no list of {kind}", Exception):
            records = list(data[kind])
        for number, record in enumerate(records):
            with explain(f"{path}: {kind} need {needs}. Number {number} is {str(record)[:300]}", Exception):
                if not is_right(record):
                    raise ValueError("a wrong value")
                ids.add(record.get("id"))
    return data


def to_eight_bits(values):
    """Gray values of 16 or 32 bits as 0 .. 255. A file does not say which value is white, so it is the end of
    the first usual range that holds all of them (12 bits end at 4095), or else the largest value."""
    if not 0 <= values.min() <= values.max() < np.inf:
        raise ValueError(f"gray values from {values.min()} to {values.max()}: convert it to 8 bits")
    white = next((end for end in (1, 255, 4095, 65535) if values.max() <= end), values.max())
    return (values * (255 / white)).round().astype(np.uint8)


def read_image(path, image_size, upright=False):
    """An image file as uint8 [3, h, w], and its (height, width) in the file. As in DETR, the shorter side
    becomes `image_size`, and the longer one at most 5/3 of it. `upright`: turned as its EXIF tag says. Raises
    ValueError, naming the file, whatever goes wrong."""
    with explain(f"image {path} can't be read", Exception):
        image = Image.open(path)
        is_turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        height, width = image.size if is_turned else image.size[::-1]
        image.draft(None, (image_size, image_size))     # decodes a large JPEG at a fraction of its size
        image = ImageOps.exif_transpose(image) if upright else image
        if image.mode[0] in "IF":
            image = Image.fromarray(to_eight_bits(np.asarray(image)))
        scale = min(image_size / min(height, width), image_size * 5 / 3 / max(height, width))
        size = [max(1, round(side * scale)) for side in (width, height)]
        image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
        return v2.functional.pil_to_tensor(image), (height, width)


def load_image(folder, images, image_size, index):
    path, annotated = os.path.join(folder, images[index]["file_name"]), images[index]
    image, size = read_image(path, image_size)
    if size != (annotated["height"], annotated["width"]):
        raise ValueError(f"{path} has {size} pixels (height, width), not as annotated: was it resized, or "
                         "turned by its EXIF tag?")
    return image


def open_coco(folder, annotation_file, image_size, count=None):
    """-> the dict of an annotation file, with its first `count` images, and a function that loads image i.
    Raises ValueError that says which file is missing or broken."""
    data = read_coco(annotation_file)
    images = data["images"] = data["images"][:count]
    paths = [os.path.join(folder, image["file_name"]) for image in images]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise ValueError(f"{len(missing)} of {len(paths)} images are missing, e.g. {missing[0]}")
    return data, functools.partial(load_image, folder, images, image_size)


class DetectionDataset(Dataset):
    """Images with objects. An item is an image, uint8 [3, h, w], and its target: labels [n], boxes [n, 4]
    (cxcywh in [0, 1]), index, image_id, and size, the (height, width) in which AP is measured.

    `data` is a dict in COCO format, `load` returns image i. A label is the rank of its category id in `names`
    {category id: name}, by default those of `data`. Augmentation is drawn from (seed, epoch, index): the same
    in every process, whatever happened before. Training and `truth`, by which AP is measured, have the same
    boxes, clipped to the image; only crowds are in `truth` alone, so that detections on them are ignored.
    Raises ValueError for other categories, for boxes in another format, and if no object is left.
    """
    epoch = 0

    def __init__(self, data, load, augmentation=None, seed=0, names=None, source="shapes"):
        self.load, self.seed, self.source = load, seed, source
        self.transform = v2.Compose([augmentation or v2.Identity(), v2.ConvertBoundingBoxFormat("CXCYWH")])
        categories = sorted(data["categories"], key=lambda each: (isinstance(each["id"], str), each["id"]))
        own_names = {each["id"]: str(each["name"]) for each in categories}
        self.names = names or own_names
        self.image_ids = [image["id"] for image in data["images"]]
        self.sizes = [(image["height"], image["width"]) for image in data["images"]]
        index_of = {image_id: index for index, image_id in enumerate(self.image_ids)}
        label_of = {id: label for label, id in enumerate(self.names)}
        annotations = [each for each in data["annotations"] if each["image_id"] in index_of]
        objects, self.truth, self.dropped, self.clipped = [[] for _ in self.sizes], [], 0, 0
        for number, each in enumerate(annotations, 1):          # pycocotools takes the id 0 for "none"
            index, id, (x, y, w, h) = index_of[each["image_id"]], each["category_id"], each["bbox"]
            if self.names.get(id) != own_names[id]:
                raise ValueError(f"{source}: category {id} is {own_names[id]!r}, but the categories of the "
                                 f"model are {str(self.names)[:300]}")
            height, width = self.sizes[index]
            x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if min(x1 - x0, y1 - y0) < 0.99:                    # a pixel, but for rounding
                self.dropped += 1
                continue
            self.clipped += max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 1         # less is rounding, too
            area, is_crowd = each.get("area") or 0, int(each.get("iscrowd") or 0)   # area may be negative
            self.truth.append({"id": number, "image_id": index, "category_id": label_of[id],
                               "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": is_crowd,
                               "area": area if area > 0 else (x1 - x0) * (y1 - y0)})
            objects[index] += [] if is_crowd else [(label_of[id], x0, y0, x1, y1)]
        tables = [torch.tensor(each, dtype=torch.float32).reshape(-1, 5) for each in objects]
        self.labels, self.boxes = [each[:, 0].long() for each in tables], [each[:, 1:] for each in tables]
        largest = max((abs(side) for each in annotations for side in each["bbox"][2:]), default=math.inf)
        if largest <= 2:
            raise ValueError(f"{source}: every bbox fits into 2 x 2 pixels. A bbox is [x, y, width, height] "
                             "in pixels, and not relative to the image")
        if self.clipped > len(annotations) / 2:
            raise ValueError(f"{source}: {self.clipped} of {len(annotations)} boxes reach out of their "
                             "image. A bbox is [x, y, width, height] in pixels, and not [x0, y0, x1, y1]")
        if not any(objects):
            raise ValueError(
                f"{source}: no object is left in the first {len(self)} images, which have {len(annotations)} "
                f"of {len(data['annotations'])} annotations. {len(self.truth)} are iscrowd, {self.dropped} "
                "were dropped, without a pixel inside their image")

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        image, size = self.load(index), self.sizes[index]
        h, w = image.shape[-2:]
        boxes = self.boxes[index] * torch.tensor([w / size[1], h / size[0]] * 2)
        target = {"labels": self.labels[index],
                  "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(h, w))}
        with torch.random.fork_rng(devices=[]):         # leaves the random numbers of denoising alone
            torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
            image, target = self.transform(tv_tensors.Image(image), target)
        h, w = image.shape[-2:]
        boxes = target["boxes"].as_subclass(Tensor) / torch.tensor([w, h, w, h])
        return image.as_subclass(Tensor), {"labels": target["labels"], "boxes": boxes, "index": index,
                                           "image_id": self.image_ids[index], "size": size}

    def class_counts(self):
        return torch.cat(self.labels).bincount(minlength=len(self.names)).tolist()

    def describe(self, num_queries):
        """A line about the data, and a warning of what will not work with them."""
        counts, most = self.class_counts(), max(map(len, self.labels))
        absent = counts.count(0)
        warnings = {
            f"more in an image than the {num_queries} queries: raise --num-queries": most > num_queries,
            "more in an image than the 100 that AP counts, so it can't reach 100": most > 100,
            f"{absent} of {len(counts)} classes have no object: are the category ids right?": absent > 0,
            f"{self.dropped} boxes without a pixel in their image dropped": self.dropped > 0,
            f"{self.clipped} boxes clipped to their image": self.clipped > 0}
        text = (f"{self.source}: {len(self)} images, at most {most} objects in one, {sum(counts)} objects of "
                f"{len(counts) - absent} classes in all")
        return "\n  ".join([text, *filter(warnings.get, warnings)])


def build_dataset(options, split, names=None, augment=False):
    """The "train" or the "val" dataset of a run; with --overfit, both are the same images. Photographs are
    cropped and rescaled for the paper's model only: with few steps, crops cost more than they give."""
    count, size = options.overfit, options.image_size
    split = "train" if count else split
    if options.coco_train or options.coco_val:
        folder, source = options.coco_train if split == "train" else options.coco_val
        data, load = open_coco(folder, source, size, count)
        steps = [v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()]
        if options.model == "paper":
            sizes = [size * sixteenths // 16 for sixteenths in range(10, 17)]
            steps += [v2.RandomApply([v2.RandomIoUCrop(min_scale=0.5)], p=0.5),
                      v2.RandomShortestSize(sizes, max_size=size * 5 // 3), v2.SanitizeBoundingBoxes()]
    else:
        source, sizes = f"shapes ({split})", {"train": options.train_size, "val": options.val_size}
        data, load = open_shapes(count or sizes[split], options.seed, split)
        steps = [v2.RandomHorizontalFlip(), v2.RandomInvert(), v2.RandomChannelPermutation()]
    augmentation = v2.Compose(steps) if augment and not count else None
    return DetectionDataset(data, load, augmentation, options.seed, names, source)


def collate(items):
    """Items of any sizes -> images uint8 [B, 3, H, W], zero where padded at the right and bottom;
    padding_mask bool [B, H, W], True = padding, or None if there is none; and the list of targets, which
    stay on the CPU, where checking them costs nothing."""
    height, width = (max(image.shape[axis] for image, _ in items) for axis in (1, 2))
    images = torch.zeros(len(items), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(items), height, width, dtype=torch.bool)
    for i, (image, _) in enumerate(items):
        _, h, w = image.shape
        images[i, :, :h, :w], padding_mask[i, :h, :w] = image, False
    return images, padding_mask if padding_mask.any() else None, [target for _, target in items]


def train_batches(dataset, batch_size, seed, epoch, workers=0, pin_memory=False):
    """One epoch's batches for this process. Seed and epoch decide their order and the augmentation."""
    dataset.epoch = epoch
    sampler = DistributedSampler(dataset, world_size(), rank(), seed=seed)
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size // world_size(), sampler=sampler, collate_fn=collate,
                      num_workers=workers, pin_memory=pin_memory)


IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))     # mean and std of red, green, blue


def normalize(images, padding_mask, device):
    """The images of a batch as float, normalized but for the padding, and the mask, both on `device`."""
    mean, std = (to_device(values, device) for values in torch.tensor(IMAGENET).view(2, 3, 1, 1))
    # Convolutions are faster in channels_last, on CPUs and GPUs.
    images = (to_device(images.to(memory_format=torch.channels_last), device) - mean) / std
    if padding_mask is not None:
        padding_mask = to_device(padding_mask, device)
        images = images.masked_fill(padding_mask[:, None], 0)
    return images, padding_mask


# ---- 5. Model and optimizer ----------------------------------------------------------------------

@torch.no_grad()
def ease_start(model, on_grid=True):
    """Not in the paper: an initialization that lets a small model train in minutes. Anchors start `on_grid`,
    0.3 of the image wide and high, and cross-attention starts by looking at the anchor."""
    if on_grid:
        count = model.config.num_queries
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
        boxes = F.pad(torch.cartesian_prod(y, x)[:count].flip(1), (0, 2), value=0.3)
        model.anchor_logits.weight.copy_(dn_detr.inverse_sigmoid(boxes))
    # The sine parts of query and key start as the same rotation (times 2, for a sharper peak), and the
    # scales of positions as 1. Summed over the heads, scores are then largest at the anchor.
    for layer in model.decoder.layers:
        nn.init.orthogonal_(layer.cross_key_position.weight, gain=2)
        nn.init.zeros_(layer.cross_key_position.bias)
        layer.cross_query_sine.load_state_dict(layer.cross_key_position.state_dict())
    for part in (model.encoder, model.decoder):
        if len(part.layers):
            nn.init.zeros_(part.position_scale.layers[-1].weight)
            nn.init.ones_(part.position_scale.layers[-1].bias)


def load_imagenet(model):
    """Give the backbone torchvision's weights. Raises ValueError if there are none, or no network."""
    name = model.config.backbone
    if name == "small":
        raise ValueError("--pretrained-backbone needs a torchvision backbone, try --backbone resnet50")
    with explain(f"go online once, for the ImageNet weights of {name}, or put them in {torch.hub.get_dir()}/"
                 "checkpoints", OSError):
        state = get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True)
    model.backbone.load_state_dict({key: state[key] for key in model.backbone.state_dict()})


def load_detector(path, **overrides):
    """-> model and checkpoint (dict) of our own file, or of the authors', whose labels are COCO's ids.
    Raises ValueError for a file that is absent, broken or of another kind."""
    checkpoint = read_checkpoint(path)
    if "config" not in checkpoint:
        names = dict(enumerate(get_model_weights("fasterrcnn_resnet50_fpn")["COCO_V1"].meta["categories"]))
        with explain(path, ValueError):
            return DNDETR.from_official(checkpoint, **overrides), {"names": names, "image_size": 800}
    with explain(f"{path} is of another version", TypeError, RuntimeError, KeyError, ValueError):
        model = DNDETR(DNDETRConfig(**checkpoint["config"] | overrides))
        model.load_state_dict(checkpoint["model"])
        return model, checkpoint | {name: checkpoint[name] for name in ("names", "image_size")}


def start_from(path, num_classes, overrides):
    """The model of a checkpoint. If its number of classes differs, what depends on it starts anew."""
    old, _ = load_detector(path, **overrides)
    model = DNDETR(dataclasses.replace(old.config, num_classes=num_classes))
    state, fresh = old.state_dict(), model.state_dict()
    # The last row, "unknown", means the same whatever the classes are.
    fresh["label_embedding.weight"][-1] = state["label_embedding.weight"][-1]
    anew = {name: fresh[name] for name in state if state[name].shape != fresh[name].shape}
    model.load_state_dict(state | anew)
    log(f"{path}: {len(state) - len(anew)} of {len(state)} tensors kept; for {num_classes} classes instead "
        f"of {old.config.num_classes}, these start anew: {', '.join(anew) or 'none'}")
    return model


def build_model(options, num_classes):
    """The model that the options describe, with the weights they name."""
    chosen = {name: value for name, value in vars(options).items() if name in FIELDS}
    if options.init:
        return start_from(options.init, num_classes, chosen)
    sizes = {} if options.model == "paper" else TOY_COCO if options.coco_train else TOY
    config = sizes | {"frozen_norm": options.pretrained_backbone} | chosen | {"num_classes": num_classes}
    model = DNDETR(DNDETRConfig(**config))
    if options.model == "toy":
        ease_start(model, on_grid=options.anchors == "grid")
    if options.pretrained_backbone:
        load_imagenet(model)
    return model


def build_optimizer(model, lr, num_steps):
    """AdamW and its schedule: at most 100 steps of warm-up, then linear decay to zero. A pretrained backbone
    has a tenth of the learning rate, as in the authors' code."""
    factor = 0.1 if model.config.frozen_norm and model.config.backbone != "small" else 1
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": backbone, "lr": lr * factor}, {"params": others}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95), weight_decay=0.05, fused=fused)
    warmup = min(100, num_steps // 10 + 1)
    scale = lambda step: min((step + 1) / warmup, 1 - step / num_steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


# ---- 6. Evaluation -------------------------------------------------------------------------------

AP_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
            "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def coco_metrics(dataset, detections, verbose=False):
    """COCO's twelve numbers in percent, of which those by size only if `verbose`, and "AP_per_class",
    {category id: AP}. None where there is nothing to measure, as of large objects in small images."""
    truth = COCO()
    truth.dataset = {"info": {}, "images": [{"id": index} for index in range(len(dataset))],
                     "categories": [{"id": label} for label in range(len(dataset.names))],
                     "annotations": dataset.truth}
    with redirect_stdout(None):                     # that is, print nothing
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(detections), "bbox")
        if not verbose:             # sizes take three quarters of the time
            evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    with redirect_stdout(sys.stdout if verbose else None):
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1].mean((0, 1))                # of each class
    numbers = [None if x < 0 else 100 * float(x) for x in (*evaluator.stats, *precision)]     # COCO says -1
    return dict(zip(AP_NAMES, numbers)) | {"AP_per_class": dict(zip(dataset.names, numbers[len(AP_NAMES):]))}


def coco_results(image_id, result, category_ids):
    """One image's predictions in COCO's result format."""
    boxes = box_convert(result["boxes"], "xyxy", "xywh").tolist()
    return [{"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(result["labels"].tolist(), boxes, result["scores"].tolist())]


@torch.no_grad()
def evaluate(model, dataset, device, batch_size=8, workers=0, amp=False, verbose=False):
    """-> metrics (dict), and {index of image: what observe_matching returns}."""
    model.eval()
    shard = Subset(dataset, range(rank(), len(dataset), world_size()))
    loader = DataLoader(shard, batch_size, collate_fn=collate, num_workers=workers)
    detections, matching = [], {}
    for images, padding_mask, targets in progress(loader, "evaluating"):
        with autocast(device, amp):
            outputs = model(*normalize(images, padding_mask, device))
        results = postprocess(outputs, [target["size"] for target in targets])
        matched = dn_detr.matched_objects(outputs, targets, model.config)               # [B, N]
        logits, boxes = outputs["pred_logits"].cpu(), outputs["pred_boxes"].cpu()
        for i, target in enumerate(targets):
            index, labels = target["index"], range(len(dataset.names))
            detections += coco_results(index, results[i], labels)
            matching[index] = observe_matching(logits[i], boxes[i], matched[i], target, model.config)
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, (detections, matching))
        detections = [detection for part, _ in parts for detection in part]
        matching = {index: seen for _, part in parts for index, seen in part.items()}
    return coco_metrics(dataset, detections, verbose and rank() == 0), matching


def observe_matching(logits, boxes, matched, target, config):
    """Of an image with n objects: `matched` [N], the object that each query is matched with or -1; is_found
    [N], whether its box has an IoU of at least 0.5 with it; and gap [n], how much more the best unmatched
    query would cost for an object than its own, in the order of the matched queries."""
    query = (matched >= 0).nonzero().flatten()
    objects = matched[query]                                                # of these queries
    corners = (box_convert(x, "cxcywh", "xyxy") for x in (boxes[query], target["boxes"][objects]))
    is_found = torch.zeros_like(matched, dtype=torch.bool)
    is_found[query] = box_iou(*corners).diagonal() >= 0.5
    cost = dn_detr.matching_cost(logits[None, None], boxes[None, None], target["labels"][None],
                                 target["boxes"][None], config)[0, 0]       # [N, n]
    others = cost[matched < 0]                                              # none, if queries are too few
    gap = others.amin(0)[objects] - cost[query, objects] if len(others) else cost.new_empty(0)
    return matched, is_found, gap


def compare_matching(previous, current):
    """Between two epochs: IS (Sec. 3.1), mean over the images, and the percentage of objects that moved
    to another query, among those found both times. IS is low, too, if nothing is found; the percentage is
    not. None for the first epoch."""
    if previous.keys() != current.keys():
        return None, None
    changes = [dn_detr.matching_instability(previous[index][0], current[index][0]) for index in current]
    places = [{(index, matched[query].item()): query for index, (matched, is_found, _) in matching.items()
               for query in is_found.nonzero().flatten().tolist()} for matching in (previous, current)]
    stayed = [query == places[0][each] for each, query in places[1].items() if each in places[0]]
    return float(np.mean(changes)), 100 * (1 - sum(stayed) / len(stayed)) if stayed else None


def anchor_distance(model, dataset, matching):
    """The mean l1 distance between the box of a found object and the learned anchor of its query. None if
    nothing is found; objects that are not found count for nothing, because they are far from everything."""
    anchors = model.anchor_logits.weight.detach().cpu().sigmoid().repeat(max(model.config.num_patterns, 1), 1)
    distances = []
    for index, (matched, is_found, _) in matching.items():
        scale = torch.tensor(dataset.sizes[index][::-1] * 2)                            # w, h, w, h
        truth = box_convert(dataset.boxes[index], "xyxy", "cxcywh") / scale
        distances += (anchors[is_found] - truth[matched[is_found]]).abs().sum(1).tolist()
    return float(np.mean(distances)) if distances else None


def class_table(dataset, per_class):
    """AP and number of objects of each class that has objects, as text."""
    rows = zip(dataset.names.values(), per_class.values(), dataset.class_counts())
    return "\n".join(f"{name:20} AP {ap:5.1f}, {count} objects" for name, ap, count in rows if count)


# ---- 7. Plots ------------------------------------------------------------------------------------

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.3, "figure.constrained_layout.use": True})
# Okabe and Ito's colors, which color-blind readers can tell apart too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
CURVES = {"loss": "loss", "AP": "AP, %", "AP50": "AP50, %", "instability": "instability IS",
          "moved": "found objects that moved, %", "cost_gap": "gap in matching cost",
          "anchor_distance": "anchor to found object, l1"}
FONT = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
LETTERS = ft2font.FT2Font(FONT).get_charmap()


def save_figure(figure, path):
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)


def draw_curves(runs, metrics=tuple(CURVES)):
    """Metrics over the epochs of {name: [history of each seed]}: medians, in bands from least to most."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.2 * len(metrics), 2.8), squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for (name, histories), color in zip(runs.items(), COLORS):
            values = np.array([[row[metric] for row in history] for history in histories], dtype=float)
            epochs = range(1, values.shape[1] + 1)
            axis.plot(epochs, np.median(values, 0), "o-", color=color, markersize=3, label=name)
            axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15)
        axis.set(xlabel="epoch", title=CURVES[metric], ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    return figure


def draw_boxes(image, boxes, labels, names, scores=None):
    """An image uint8 [3, h, w] as the model sees it, enlarged if it is small, with boxes [n, 4] (xyxy, in
    [0, 1] of the image), their classes `names` {category id: name} and scores, as a PIL image."""
    picture = v2.functional.to_pil_image(image)
    scale = max(1, 400 // max(picture.size))
    picture = picture.resize([side * scale for side in picture.size], Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(picture), ImageFont.truetype(FONT, max(10, max(picture.size) // 28))
    corners = (boxes * torch.tensor(picture.size * 2)).tolist()
    for number, ((x0, y0, x1, y1), label) in enumerate(zip(corners, labels.tolist())):
        category_id, text = list(names.items())[label]
        if not LETTERS.keys() >= set(map(ord, text)):           # e.g. Chinese
            text = f"category {category_id}"
        text += "" if scores is None else f" {scores[number]:.2f}"
        draw.rectangle((x0, y0, x1, y1), outline=COLORS[label % len(COLORS)], width=2)
        draw.rectangle(draw.textbbox((x0, y0), text, font), fill=COLORS[label % len(COLORS)])
        draw.text((x0, y0), text, "white", font)
    return picture


@torch.no_grad()
def detect(model, image, device, threshold):
    """Detections in one image, uint8 [3, h, w]: boxes (xyxy in [0, 1]), labels and scores, best first."""
    result = postprocess(model.eval()(*normalize(image[None], None, device)), [(1, 1)])[0]
    is_kept = result["scores"] >= threshold
    return {name: values[is_kept].cpu() for name, values in result.items()}


def draw_detections(model, dataset, device, columns=6, threshold=0.5):
    """The first images that hold something: the truth, and below it what the model finds."""
    shown = [index for index, labels in enumerate(dataset.labels) if len(labels)][:columns]
    figure, axes = plt.subplots(2, len(shown), figsize=(2.6 * len(shown), 5.6), squeeze=False)
    for (first, second), index in zip(axes.T, shown):
        image, target = dataset[index]
        boxes = box_convert(target["boxes"], "cxcywh", "xyxy")
        first.imshow(draw_boxes(image, boxes, target["labels"], dataset.names))
        second.imshow(draw_boxes(image, names=dataset.names, **detect(model, image, device, threshold)))
    for axis, title in zip(axes[:, 0], ("truth", f"prediction, score of at least {threshold}")):
        axis.set_title(title, loc="left", fontweight="bold")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


# ---- 8. Training ---------------------------------------------------------------------------------

def start(options):
    """-> model, training and held-out dataset, and the run: a dict of what a checkpoint holds, at the start
    or as the last checkpoint left it. Raises ValueError if it would mix with another run, or other data."""
    folder = Path(options.output_dir)
    if options.batch_size % world_size():
        raise ValueError(f"--batch-size {options.batch_size} can't be shared by {world_size()} processes")
    if not options.resume and (folder / "last.pt").exists():
        raise ValueError(f"{folder} holds another run: --resume {folder}, or choose another --output-dir")
    train_set = build_dataset(options, "train", augment=True)
    val_set = build_dataset(options, "val", names=train_set.names)
    data = {name: f"{len(each)} images, {sum(each.class_counts())} objects"
            for name, each in (("training", train_set), ("held-out", val_set))} | {"classes": train_set.names}
    torch.manual_seed(options.seed)
    if options.resume:
        model, run = load_detector(folder / "last.pt")
        if run["data"] != data:
            raise ValueError(f"{folder} was trained on other data: {run['data']}, not {data}. Restore it, or "
                             "start a new run with --init")
        return model, train_set, val_set, run | {"options": vars(options)}
    model = build_model(options, len(train_set.names))
    for dataset in [train_set] if options.overfit else [train_set, val_set]:
        log(dataset.describe(model.config.num_queries))
    return model, train_set, val_set, {
        "epoch": 0, "step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "history": [], "matching": {},
        "config": dataclasses.asdict(model.config), "names": train_set.names, "options": vars(options),
        "data": data, "image_size": options.image_size or SIDE}


def save(run, parts, folder):
    """Write the checkpoints, and the files made from them. A run killed in between repeats the epoch after
    last.pt and writes the same again; that is why best.pt comes first."""
    state, history = run | {name: part.state_dict() for name, part in parts.items()}, run["history"]
    folder.mkdir(parents=True, exist_ok=True)
    if history and history[-1]["AP"] >= max(row["AP"] for row in history):
        write(folder / "best.pt", lambda path: torch.save(state, path))
    write(folder / "last.pt", lambda path: torch.save(state, path))
    rows = "".join(json.dumps(row) + "\n" for row in history)
    write(folder / "metrics.jsonl", lambda path: path.write_text(rows))
    about = json.dumps({name: run[name] for name in ("config", "names", "options", "data")}, indent=1)
    write(folder / "config.json", lambda path: path.write_text(about))


def add_to_history(run, row, model, val_set, matching):
    """Add an epoch to the history of the run, with what the matching did, and print its line."""
    instability, moved = compare_matching(run["matching"], matching)
    gaps = torch.cat([gap for _, _, gap in matching.values()])
    row |= {name: run[name] for name in ("epoch", "step", "seconds", "cpu_seconds")} | {
        "instability": instability, "moved": moved, "cost_gap": gaps.median().item() if len(gaps) else None,
        "anchor_distance": anchor_distance(model, val_set, matching)}
    run["matching"], run["history"] = matching, [*run["history"], row]
    epoch, epochs, seconds = run["epoch"], run["options"]["epochs"], run["seconds"]
    change = "-" if instability is None else f"{instability:.2f}"
    log(f"epoch {epoch:2}/{epochs}  loss {row['loss']:5.2f} (denoising {row['loss_denoising']:5.2f})  "
        f"AP {row['AP']:4.1f}  AP50 {row['AP50']:4.1f}  IS {change}  "
        f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left")


def train(options, device, after_epoch=None):
    """A whole run, or the rest of one -> its history, a dict for each epoch. The checkpoint last.pt holds
    all of it; the other files are made from it. Raises ValueError, naming step and images, if a loss or a
    gradient is not finite. `after_epoch`, if given, is called with the model."""
    model, train_set, val_set, run = start(options)
    if options.overfit:     # repeated, or most of the time would be spent on evaluating after every few steps
        train_set = ConcatDataset([train_set] * math.ceil(200 / len(train_set)))
    num_steps = math.ceil(len(train_set) / options.batch_size) * options.epochs
    model.to(device).backbone.to(memory_format=torch.channels_last)
    optimizer, schedule = build_optimizer(model, options.lr, num_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and amp_dtype(device) == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    folder = Path(options.output_dir)
    for name, part in parts.items() if options.resume else ():
        part.load_state_dict(run[name])
    save(run, parts, folder)
    parallel_model = parallel(model, device) if world_size() > 1 else model
    criterion = DNDETRCriterion(model.config)

    for epoch in range(run["epoch"], options.epochs):
        started, cpu_started, totals = time.time(), time.process_time(), 0
        torch.manual_seed(seed_of(options.seed, epoch, rank()))         # of the noise and of dropout
        batches = train_batches(train_set, options.batch_size, options.seed, epoch, options.workers,
                                pin_memory=device.type == "cuda")
        model.train()
        for images, padding_mask, targets in progress(batches, f"epoch {epoch + 1}/{options.epochs}"):
            # The method: the forward pass draws the noise; the criterion matches, and compares.
            images, padding_mask = normalize(images, padding_mask, device)
            where = f"step {run['step']}, images {[target['image_id'] for target in targets]}"
            with autocast(device, options.amp):
                outputs = parallel_model(images, padding_mask, targets)
            with explain(where, FloatingPointError):
                losses = criterion(outputs, targets)
            # The rest is as for any network. The scaler is for float16, and skips infinite gradients itself.
            optimizer.zero_grad()
            scaler.scale(losses["loss"]).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)           # the authors' limit
            if not losses["loss"].isfinite() or not (norm.isfinite() or scaler.is_enabled()):
                raise ValueError(f"{where}: loss {losses['loss']:.3g} or gradient {norm:.3g} is not finite")
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            totals += torch.stack(list(losses.values())).detach()
            run["step"] += 1
        metrics, matching = evaluate(model, val_set, device, options.batch_size, options.workers, options.amp)
        run["epoch"], run["seconds"] = epoch + 1, run["seconds"] + time.time() - started
        run["cpu_seconds"] += time.process_time() - cpu_started
        losses = dict(zip(losses, (totals / len(batches)).tolist()))
        add_to_history(run, losses | metrics | {"lr": schedule.get_last_lr()[-1]}, model, val_set, matching)
        save(run, parts, folder)
        if after_epoch:
            after_epoch(model)
    save_figure(draw_curves({"this run": [run["history"]]}), folder / "curves.png")
    save_figure(draw_detections(model, val_set, device), folder / "detections.png")
    last = run["history"][-1]
    hint = ". Look at the truth in detections.png, and try --overfit 8" if last["AP"] < 1 else ""
    log(class_table(val_set, last["AP_per_class"]))
    log(f"curves.png, detections.png, metrics.jsonl and checkpoints are in {folder}{hint}")
    return run["history"]


def evaluate_checkpoint(options, device):
    """COCO's twelve numbers, and AP of each class, on the held-out images of the run or on --coco-val."""
    model, checkpoint = load_detector(options.checkpoint)
    if not options.coco_val and "options" not in checkpoint:
        raise ValueError(f"{options.checkpoint} knows no data: add --coco-val IMAGES_DIR ANNOTATIONS_JSON")
    settings = DEFAULTS["train"] | checkpoint.get("options", {}) | {"image_size": checkpoint["image_size"]}
    settings |= {name: value for name, value in vars(options).items() if value is not None}
    settings |= {"overfit": None} if options.coco_val else {}
    dataset = build_dataset(argparse.Namespace(**settings), "val", names=checkpoint["names"])
    log(dataset.describe(model.config.num_queries))
    metrics, _ = evaluate(model.to(device), dataset, device, options.batch_size, options.workers, options.amp,
                          verbose=True)
    log(class_table(dataset, metrics["AP_per_class"]))


# ---- 9. Predictions ------------------------------------------------------------------------------

def predict(options, device):
    """A picture with boxes of every image, and predictions.json, in COCO's result format and in pixels of the
    file, also after an interruption. An image that can't be read costs only itself. Returns how many did."""
    model, checkpoint = load_detector(options.checkpoint)
    model, names, folder = model.to(device).eval(), checkpoint["names"], Path(options.output_dir)
    given = list(map(Path, options.images))
    files = [file for path in given for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = [file for file in files if file.suffix.lower() in readable or file in given and not file.is_dir()]
    if not paths:
        raise ValueError(f"there are no images in {', '.join(options.images)}")
    folder.mkdir(parents=True, exist_ok=True)
    key = lambda path: str(path.resolve()).lower()              # some file systems ignore case
    taken, results, failed = set(map(key, paths)), [], 0        # inputs, and pictures written
    try:
        for image_id, path in enumerate(progress(paths, "predicting"), 1):
            try:
                size = options.image_size or checkpoint["image_size"]
                image, (height, width) = read_image(path, size, upright=True)
                found = detect(model, image, device, options.threshold)
                target = folder / f"{path.stem}.png"
                while key(target) in taken:
                    target = target.with_stem(target.stem + "_")
                draw_boxes(image, names=names, **found).save(target)
                taken.add(key(target))
                found["boxes"] = found["boxes"] * torch.tensor([width, height] * 2)
                rows = coco_results(image_id, found, list(names))
                results += [row | {"file_name": str(path)} for row in rows]
            except Exception as error:
                failed += 1
                log(f"{path}: {error}")
    finally:
        write(folder / "predictions.json", lambda path: path.write_text(json.dumps(results)))
    log(f"{len(paths) - failed} pictures, and {len(results)} detections with a score of at least "
        f"{options.threshold} in predictions.json, are in {folder}; {failed} images failed, and "
        f"{len(files) - len(paths)} other files were skipped")
    return failed


# ---- 10. Experiments: many runs, side by side ----------------------------------------------------

CONFIGURATIONS = {  # the first one is the baseline
    "without denoising": dict(dn_groups=0),
    "1 group, boxes only": dict(dn_groups=1, label_noise=0.0),
    "1 group": dict(dn_groups=1),
    "1 group, no mask": dict(dn_groups=1, dn_mask=False),
    "2 groups": dict(dn_groups=2),
    "5 groups": dict(dn_groups=5),
    "10 groups": dict(dn_groups=10),
}
# Learning rates chosen on seeds 100 and 101 (see the notebook); all others have that of 5 groups.
RATES = {"normal": {"without denoising": 1e-3, "1 group, no mask": 1e-3, "5 groups": 2e-3},
         "grid": {"without denoising": 3e-3, "5 groups": 3e-3}}


def interval(values):
    """Mean and half the width of its 95 % interval, Student's t over the seeds."""
    if np.ptp(values) == 0:
        return f"{np.mean(values):.1f}"
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    return f"{np.mean(values):.1f} ± {(high - low) / 2:.1f}"


def print_table(runs, clock):
    """Final AP of each configuration: median and range over the seeds. Then its difference to the baseline,
    at equal steps and at equal time, and the epochs it took to reach the baseline's final AP: mean and 95 %
    interval over pairs of runs with the same seed."""
    print("| | AP | AP50 | difference | at equal time | epochs to the baseline's AP |")
    print(6 * "|---" + "|")
    for name, histories in runs.items():
        cells, later, in_time, reached = [], [], [], []
        for metric in ("AP", "AP50"):
            values = [history[-1][metric] for history in histories]
            cells.append(f"{np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        for history, other in zip(histories, runs["without denoising"]):
            goal, times, values = other[-1], *([0, *(row[key] for row in history)] for key in (clock, "AP"))
            later.append(values[-1] - goal["AP"])
            in_time.append(np.interp(goal[clock], times, values) - goal["AP"])
            reached.append(next((row["epoch"] for row in history if row["AP"] >= goal["AP"]), None))
        cells += [interval(later), interval(in_time), "not by all" if None in reached else interval(reached)]
        print(f"| {name} | {' | '.join(cells)} |")


def be_quiet(threads):
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def experiment(options, device):
    """Train every configuration with every seed, several at a time, each in a folder of its own; runs that
    are there are continued, or kept. Then print a table, and write numbers and figure."""
    names = CONFIGURATIONS if options.command == "ablate" else ("without denoising", "5 groups")
    rates, plan, folder = RATES[options.anchors], {}, Path(options.output_dir)
    shared = {name: value for name, value in vars(options).items()
              if name in ("anchors", "epochs", "batch_size", "train_size", "val_size")}
    for seed, name in [(seed, name) for seed in options.seeds for name in names]:
        own = CONFIGURATIONS[name] | {"seed": seed, "lr": rates.get(name, rates["5 groups"])}
        run = "-".join(map(str, [*shared.values(), name, own["lr"], seed])).replace(",", "").replace(" ", "-")
        settings = DEFAULTS["train"] | shared | own | {"command": "train", "output_dir": str(folder / run)}
        settings["resume"] = settings["output_dir"] if (folder / run / "last.pt").exists() else None
        plan[name, seed] = argparse.Namespace(**settings)
    jobs = options.jobs or (os.cpu_count() if device.type == "cpu" else 1)
    context, threads = multiprocessing.get_context("spawn"), max(1, os.cpu_count() // jobs)
    with ProcessPoolExecutor(jobs, context, be_quiet, (threads,)) as pool:
        # If a run fails, and at Ctrl-C, map cancels the runs that have not started.
        done = pool.map(train, plan.values(), [device] * len(plan))
        histories = dict(zip(plan, progress(done, f"{len(plan)} runs")))
    runs = {name: [histories[name, seed] for seed in options.seeds] for name in names}
    print_table(runs, "cpu_seconds" if device.type == "cpu" else "seconds")
    path = folder / f"{options.command}-{options.anchors}.json"
    about = {"device": str(device), "torch": torch.__version__, "options": vars(options), "runs": runs}
    write(path, lambda temporary: temporary.write_text(json.dumps(about)))
    # Without the loss, which has more terms with denoising.
    save_figure(draw_curves(runs, list(CURVES)[1:]), path.with_suffix(".png"))


def main(argv=None):
    try:
        options = parse_options(argv)
        commands = {"train": train, "evaluate": evaluate_checkpoint, "predict": predict}
        result = commands.get(options.command, experiment)(options, pick_device(options.device))
        if options.command == "predict" and result:
            sys.exit(1)
    except (ValueError, OSError) as error:
        # Of an error in a process that loads images, only the last line is ours.
        is_ours = "DataLoader worker" not in str(error)
        text = error if is_ours else str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        sys.exit(f"train_toy.py: error: {text}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; continue a training with --resume DIR, an experiment with the same command")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):     # a name that the console can't show must not end a run
        stream.reconfigure(errors="replace")
    main()
