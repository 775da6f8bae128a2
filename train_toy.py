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

Start reading at train() in section 8: its inner loop is the training step. Above it stands what it uses:
1 options, 2 processes and files, 3 shapes, 4 datasets, 5 model, 6 evaluation, 7 plots. Below it follow
9 predictions, 10 experiments.
"""
import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
import zlib
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

RUN = dict(seed=0, batch_size=8, workers=0, device=None, amp=False, model="toy", anchors="grid", overfit=None,
           pretrained_backbone=False, init=None, resume=None, coco_train=None, coco_val=None)
DEFAULTS = {
    "shapes": RUN | dict(epochs=8, lr=3e-3, train_size=3200, val_size=300, output_dir="runs/shapes"),
    "photographs": RUN | dict(epochs=50, lr=1e-3, image_size=256, workers=2, output_dir="runs/coco"),
    "overfit": dict(epochs=6, lr=1e-3, batch_size=4, workers=0, output_dir="runs/overfit"),
    "evaluate": dict(coco_val=None, image_size=None, batch_size=8, workers=2, device=None, amp=False),
    "predict": dict(image_size=None, threshold=0.3, device=None, output_dir="runs/predictions"),
    "experiment": dict(anchors="normal", epochs=12, batch_size=8, train_size=800, val_size=200, device=None,
                       seeds=[0, 1, 2, 3, 4], jobs=None, output_dir="runs/experiment")}


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def flag(name):
    return "--" + name.replace("_", "-")


def parse_options(argv=None):
    """The options of a command, with its defaults. Ends the program for those that are wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = ("train", "evaluate", "predict", "compare", "ablate")
    command = argv.pop(0) if argv and argv[0] in commands else "train"
    defaults = "".join(f"\n  {name}: {values}" for name, values in DEFAULTS.items())
    parser = argparse.ArgumentParser(f"train_toy.py {command}", f"train_toy.py {command} [options]",
                                     f"{__doc__}\nDefaults:{defaults}", argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, paths = parser.add_argument, dict(nargs=2, metavar=("IMAGES_DIR", "JSON"))
    if command in ("evaluate", "predict"):
        add("checkpoint", help="ours or the authors'")
    if command == "predict":
        add("images", nargs="+", help="image files, and folders of them")
        add("--threshold", type=float, help="lowest score of a detection that is kept")
    if command == "train":
        add("--coco-train", **paths, help="a folder of images, and their annotations in COCO format")
        add("--overfit", type=positive, metavar="N", help="learn the first N training images by heart")
        add("--resume", metavar="DIR", help="continue the run in this folder; its data may have moved")
        add("--init", metavar="CHECKPOINT", help="start from a checkpoint, ours or the authors'")
        add("--model", choices=("toy", "paper"), help="paper: the R50 architecture, with our recipe")
        add("--pretrained-backbone", action="store_true", help="ImageNet weights, downloaded")
        add("--lr", type=float, help="learning rate; 1e-4 with --init and --model paper")
        add("--seed", type=int, help="decides weights, shapes, order, augmentation and noise")
        for name, kind in FIELDS.items():
            how = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(type=int, nargs="+")}
            add(flag(name), **how.get(kind, dict(type=kind)), help=argparse.SUPPRESS)
    if command in ("train", "evaluate"):
        add("--coco-val", **paths, help="the same for the held-out images")
        add("--workers", type=int, help="processes that load images")
        add("--amp", action="store_true", help="bfloat16 where the device has it, else float16")
    if command in ("train", "evaluate", "predict"):
        add("--image-size", type=positive, help="shorter side of a photograph (paper: 800)")
    if command in ("train", "compare", "ablate"):
        add("--anchors", choices=("grid", "normal"), help="initial anchors; normal: at random, as in the paper")
        add("--epochs", type=positive, help="passes over the training images")
        add("--train-size", type=positive, help="training images of shapes")
        add("--val-size", type=positive, help="held-out images of shapes")
    if command in ("compare", "ablate"):
        add("--seeds", type=int, nargs="+", help="of the runs of each configuration")
        add("--jobs", type=positive, help="runs at a time; if not given, one per CPU core, or one on a GPU")
    if command != "predict":
        add("--batch-size", type=positive, help="images a step, over all processes")
    if command != "evaluate":
        add("--output-dir", help="where the files go")
    add("--device", help="cuda, mps or cpu; if not given, the first that is there")
    try:
        return complete(command, vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def complete(command, given):
    """The options `given`, and the defaults of the others. Raises ValueError if one would have no effect."""
    if "resume" in given:
        saved = read_checkpoint(Path(given["resume"]) / "last.pt")
        if "options" not in saved:
            raise ValueError(f"{given['resume']}/last.pt is not from a run")
        defaults = saved["options"] | {"device": None, "output_dir": given["resume"]}
        allowed = {"resume", "coco_train", "coco_val", "device", "workers"}
    elif command == "train":
        defaults = DEFAULTS["photographs" if "coco_train" in given else "shapes"]
        allowed = defaults.keys() | FIELDS.keys()
        if "coco_train" in given and not given.keys() & {"coco_val", "overfit"}:
            raise ValueError("--coco-val is missing: AP is measured on images that were not trained on")
        if "overfit" in given:
            defaults, allowed = defaults | DEFAULTS["overfit"], allowed - {"coco_val", "val_size", "train_size"}
        if "init" in given:
            allowed -= {"model", "anchors", "pretrained_backbone"}
        if "init" in given or given.get("model") == "paper":
            defaults = defaults | {"lr": 1e-4}
    else:
        defaults, allowed = DEFAULTS.get(command, DEFAULTS["experiment"]), given.keys()
    if given.keys() - allowed:
        raise ValueError(f"{flag(min(given.keys() - allowed))} has no effect with these options: drop it")
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
    if world_size() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # A single decoder layer does not use position_scale, which the authors' weights contain all the same.
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                               find_unused_parameters=model.config.num_decoder_layers == 1)


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
    """Write a file so that a killed process or a full disk leaves the old one or the new one, whole."""
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


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_coco(path):
    """The dict in an annotation file. Raises ValueError that shows the first record that is wrong."""
    with explain(f"{path} can't be read as JSON", OSError, ValueError):
        data = json.loads(Path(path).read_bytes())      # bytes, so that the encoding is found out
    images, categories = set(), set()                   # ids
    rules = {
        "images": ("an id, a file_name, and a width and height above 0, in pixels",
                   lambda x: isinstance(x["file_name"], str) and is_number(x["width"])
                   and is_number(x["height"]) and min(x["width"], x["height"]) > 0),
        "categories": ("an id and a name", lambda x: isinstance(x["name"], (str, int))),
        "annotations": ("the image_id of an image, the category_id of a category, a bbox [x, y, width, height] "
                        "of numbers, in pixels, and area and iscrowd, if there, as numbers",
                        lambda x: x["image_id"] in images and x["category_id"] in categories
                        and [is_number(number) for number in x["bbox"]] == [True] * 4
                        and is_number(x.get("area") or 0) and int(x.get("iscrowd") or 0) in (0, 1))}
    for kind, ids in (("images", images), ("categories", categories), ("annotations", set())):
        needs, is_right = rules[kind]
        with explain(f"{path} is not in COCO format, it needs lists of images, categories, annotations", Exception):
            records = list(data[kind])
        for number, record in enumerate(records):
            with explain(f"{path}: {kind} need {needs}. Number {number} is {str(record)[:300]}", Exception):
                id = number if kind == "annotations" else record["id"]      # those of annotations are not used
                if not is_right(record) or id in ids:
                    raise ValueError("wrong value, or an id for the second time")
                ids.add(id)
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


def load_image(paths, sizes, image_size, index):
    image, size = read_image(paths[index], image_size)
    if size != sizes[index]:
        raise ValueError(f"{paths[index]} has {size} pixels (height, width), not {sizes[index]} as annotated: "
                         "was it resized, or turned by its EXIF tag?")
    return image


def open_coco(folder, annotation_file, image_size, count=None):
    """-> the dict of an annotation file, with its first `count` images, and a function that loads image i.
    Raises ValueError that says which file is missing or broken."""
    data = read_coco(annotation_file)
    data["images"] = data["images"][:count]
    paths = [os.path.join(folder, image["file_name"]) for image in data["images"]]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise ValueError(f"{len(missing)} of {len(paths)} images are missing, e.g. {missing[0]}")
    sizes = [(image["height"], image["width"]) for image in data["images"]]
    return data, functools.partial(load_image, paths, sizes, image_size)


class DetectionDataset(Dataset):
    """Images with objects. An item is an image, uint8 [3, h, w], and its target: labels [n], boxes [n, 4]
    (cxcywh in [0, 1]), index, image_id, and size, the (height, width) in which AP is measured.

    `data` is a dict in COCO format, `load` returns image i. A label is the rank of its category id in `names`
    {category id: name}, by default those of `data`. Augmentation is drawn from (seed, epoch, index): the same in
    every process, whatever happened before. Raises ValueError for boxes in another format, and if none is left.
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
        annotations = [each for each in data["annotations"] if each["image_id"] in index_of]
        for id in {each["category_id"] for each in annotations}:
            if self.names.get(id) != own_names[id]:
                raise ValueError(f"{source}: category {id} is {own_names[id]!r}, but the categories of the model "
                                 f"are {str(self.names)[:300]}")
        self.read_objects(annotations, index_of)
        if not any(map(len, self.labels)):
            raise ValueError(f"{source}: no object is left. The first {len(self)} images (--overfit takes no others) "
                             f"have {len(annotations)} of {len(data['annotations'])} annotations; {self.crowds} are "
                             f"iscrowd, {self.dropped} were dropped: no pixel wide or high, or outside their image")

    def read_objects(self, annotations, index_of):
        """Set labels and boxes (xyxy, in pixels of the file) of every image, and the ground truth of AP. In both,
        boxes are clipped to their image, and dropped if less than a pixel is left. Crowds are not trained on;
        for AP they stay, so that detections on them are ignored."""
        label_of = {id: label for label, id in enumerate(self.names)}
        images = [index_of[each["image_id"]] for each in annotations]
        boxes = torch.tensor([each["bbox"] for each in annotations], dtype=torch.float32).reshape(-1, 4)
        if len(boxes) and boxes[:, 2:].abs().max() <= 2:
            raise ValueError(f"{self.source}: every bbox fits into 2 x 2 pixels, e.g. {boxes[0].tolist()}. A bbox "
                             "is [x, y, width, height] in pixels, and not relative to the image")
        corners = box_convert(boxes, "xywh", "xyxy")
        limits = torch.tensor([self.sizes[image][::-1] * 2 for image in images]).reshape(-1, 4)   # w, h, w, h
        inside = corners.clamp(min=0).minimum(limits)
        is_kept = (inside[:, 2:] - inside[:, :2] > 0.99).all(1)                 # a pixel, but for rounding
        is_clipped = is_kept & ((inside - corners).abs() > 1).any(1)            # less is rounding, too
        if is_clipped.sum() > len(boxes) / 2:
            raise ValueError(f"{self.source}: {is_clipped.sum()} of {len(boxes)} boxes reach out of their image. A "
                             "bbox is [x, y, width, height] in pixels, and not [x0, y0, x1, y1]")
        is_crowd = torch.tensor([int(each.get("iscrowd") or 0) for each in annotations]).bool()
        self.dropped, self.clipped, self.crowds = (int(x.sum()) for x in (~is_kept, is_clipped, is_crowd))
        labels = torch.tensor([label_of[each["category_id"]] for each in annotations]).long()
        rows, self.truth = [[] for _ in self.sizes], []
        for row in is_kept.nonzero().flatten().tolist():
            x, y, w, h = box_convert(inside[row], "xyxy", "xywh").tolist()
            area = annotations[row].get("area") or 0            # may be missing, or negative
            self.truth.append({"id": row + 1, "image_id": images[row], "category_id": int(labels[row]),
                               "bbox": [x, y, w, h], "area": area if area > 0 else w * h,
                               "iscrowd": int(is_crowd[row])})  # pycocotools takes the id 0 for "none"
            rows[images[row]] += [] if is_crowd[row] else [row]
        self.labels, self.boxes = [labels[each] for each in rows], [inside[each] for each in rows]

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        image, (height, width) = self.load(index), self.sizes[index]
        h, w = image.shape[-2:]
        boxes = self.boxes[index] * torch.tensor([w / width, h / height] * 2)
        target = {"labels": self.labels[index],
                  "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(h, w))}
        with torch.random.fork_rng(devices=[]):         # leaves the random numbers of denoising alone
            torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
            image, target = self.transform(tv_tensors.Image(image), target)
        h, w = image.shape[-2:]
        boxes = target["boxes"].as_subclass(Tensor) / torch.tensor([w, h, w, h])
        return image.as_subclass(Tensor), {"labels": target["labels"], "boxes": boxes, "index": index,
                                           "image_id": self.image_ids[index], "size": (height, width)}

    def class_counts(self):
        return torch.cat(self.labels).bincount(minlength=len(self.names)).tolist()

    def describe(self, num_queries):
        """A line about the data, and a warning of what will not work with them."""
        counts, classes = [len(labels) for labels in self.labels], self.class_counts()
        absent, fullest = classes.count(0), max(counts)
        text = (f"{self.source}: {len(self)} images, {sum(counts)} objects of {len(classes) - absent} classes, at "
                f"most {fullest} in an image")
        if fullest > num_queries:
            text += f"\n  more than the model has queries ({num_queries}): raise --num-queries"
        if fullest > 100:
            text += "\n  more than the 100 detections that AP counts in an image, so it can't reach 100"
        if absent:
            text += f"\n  {absent} of {len(classes)} classes have no object: are the category ids right?"
        if self.dropped or self.clipped:
            text += (f"\n  {self.dropped} boxes dropped (no pixel wide or high, or outside their image), and "
                     f"{self.clipped} clipped to their image")
        return text


def build_dataset(options, split, names=None, augment=False):
    """The "train" or the "val" dataset of a run; with --overfit, both are the same images. Photographs are
    cropped and rescaled for the paper's model only: with few steps, crops cost more than they give."""
    count, size = options.overfit, getattr(options, "image_size", None)
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
        source = "training shapes" if split == "train" else "held-out shapes"
        number = count or (options.train_size if split == "train" else options.val_size)
        data, load = open_shapes(number, options.seed, split)
        steps = [v2.RandomHorizontalFlip(), v2.RandomInvert(), v2.RandomChannelPermutation()]
    augmentation = v2.Compose(steps) if augment and not count else None
    return DetectionDataset(data, load, augmentation, options.seed, names, source)


def collate(items):
    """Items of any sizes -> images uint8 [B, 3, H, W], zero where padded at the right and bottom;
    padding_mask bool [B, H, W], True = padding, or None if there is none; and the list of targets, which
    stay on the CPU, where checking them costs nothing."""
    height, width = (max(image.shape[axis] for image, _ in items) for axis in (1, 2))
    images, masks = [], []
    for image, _ in items:
        padding = (0, width - image.shape[2], 0, height - image.shape[1])           # left, right, top, bottom
        images.append(F.pad(image, padding))
        masks.append(F.pad(torch.zeros_like(image[0], dtype=torch.bool), padding, value=True))
    mask = torch.stack(masks)
    return torch.stack(images), mask if mask.any() else None, [target for _, target in items]


def train_batches(dataset, batch_size, seed, epoch, workers=0, pin_memory=False):
    """One epoch's batches for this process. Seed and epoch decide their order and the augmentation."""
    dataset.epoch = epoch
    sampler = DistributedSampler(dataset, world_size(), rank(), seed=seed)
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size // world_size(), sampler=sampler, collate_fn=collate,
                      num_workers=workers, pin_memory=pin_memory)


IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))     # mean and std of red, green, blue


def normalize(images, padding_mask, device):
    """The images of a batch as float, normalised but for the padding, and the mask, both on `device`."""
    mean, std = (to_device(values, device) for values in torch.tensor(IMAGENET).view(2, 3, 1, 1))
    # Convolutions are faster in channels_last, on CPUs and GPUs.
    images = (to_device(images.to(memory_format=torch.channels_last), device) - mean) / std
    if padding_mask is not None:
        padding_mask = to_device(padding_mask, device)
        images = images.masked_fill(padding_mask[:, None], 0)
    return images, padding_mask


# ---- 5. Model and optimiser ----------------------------------------------------------------------


@torch.no_grad()
def ease_start(model, on_grid=True):
    """Not in the paper: an initialisation that lets a small model train in minutes. Anchors start `on_grid`,
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
    name, folder = model.config.backbone, torch.hub.get_dir()
    if name == "small":
        raise ValueError("--pretrained-backbone needs a torchvision backbone, try --backbone resnet50")
    with explain(f"the ImageNet weights of {name} can't be downloaded. Go online once, put the file into "
                 f"{folder}/checkpoints, or drop --pretrained-backbone", OSError):
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
    with explain(f"{path} is of another version or configuration", TypeError, RuntimeError, KeyError):
        model = DNDETR(DNDETRConfig(**checkpoint["config"] | overrides))
        model.load_state_dict(checkpoint["model"])
    return model, checkpoint


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
            detections += coco_results(target["index"], results[i], range(len(dataset.names)))
            matching[target["index"]] = observe_matching(logits[i], boxes[i], matched[i], target, model.config)
    parts = [(detections, matching)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, (detections, matching))
    detections = [detection for part, _ in parts for detection in part]
    matching = {index: seen for _, part in parts for index, seen in part.items()}
    return coco_metrics(dataset, detections, verbose and rank() == 0), matching


def observe_matching(logits, boxes, matched, target, config):
    """Of an image with n objects: `matched` [N], the object that each query is matched with or -1; is_found [N],
    whether its box has an IoU of at least 0.5 with it; and gap, how much more the best unmatched query would
    cost for an object than its own, in the order of the matched queries."""
    query = (matched >= 0).nonzero().flatten()
    objects = matched[query]                                                # of these queries
    corners = (box_convert(x, "cxcywh", "xyxy") for x in (boxes[query], target["boxes"][objects]))
    is_found = torch.zeros_like(matched, dtype=torch.bool)
    is_found[query] = box_iou(*corners).diagonal() >= 0.5
    cost = dn_detr.matching_cost(logits[None, None], boxes[None, None], target["labels"][None],
                                 target["boxes"][None], config)[0, 0]       # [N, n]
    others = cost[matched < 0]                                              # none, if there are too few queries
    gap = others.amin(0)[objects] - cost[query, objects] if len(others) else cost.new_empty(0)
    return matched, is_found, gap


def compare_matching(previous, current):
    """Between two epochs: IS (Sec. 3.1), mean over the images, and the percentage of objects that moved
    to another query, among those found both times. IS is low, too, if nothing is found; the percentage is
    not. None for the first epoch."""
    if previous.keys() != current.keys():
        return None, None
    changes, found, stayed = [], 0, 0
    for index, (matched, is_found, _) in current.items():
        old_matched, old_is_found, _ = previous[index]
        changes.append(dn_detr.matching_instability(old_matched, matched))
        found += int(torch.isin(matched[is_found], old_matched[old_is_found]).sum())
        stayed += int((is_found & old_is_found & (matched == old_matched)).sum())
    return float(np.mean(changes)), 100 * (1 - stayed / found) if found else None


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
# Okabe and Ito's colors, which colour-blind readers can tell apart too.
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
    """An image uint8 [3, h, w] as the model sees it, enlarged if it is small, with boxes [n, 4] (xyxy, in [0, 1]
    of the image), their classes `names` {category id: name} and scores, as a PIL image."""
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
    """-> model, training and held-out dataset, and the run: a dict of what a checkpoint holds, at the start or
    as the last checkpoint left it."""
    folder = Path(options.output_dir)
    if options.batch_size % world_size():
        raise ValueError(f"--batch-size {options.batch_size} can't be shared by {world_size()} processes")
    if not options.resume and (folder / "last.pt").exists():
        raise ValueError(f"{folder} holds another run: --resume {folder}, or choose another --output-dir")
    train_set = build_dataset(options, "train", augment=True)
    val_set = build_dataset(options, "val", names=train_set.names)
    checksum = zlib.crc32(b"".join(x.numpy().tobytes() for x in [*train_set.boxes, *train_set.labels, *val_set.boxes]))
    data = {"training images": len(train_set), "training objects": sum(map(len, train_set.labels)),
            "held-out images": len(val_set), "held-out objects": sum(map(len, val_set.labels)),
            "classes": train_set.names, "checksum of all boxes": checksum}
    torch.manual_seed(options.seed)
    if options.resume:
        model, run = load_detector(folder / "last.pt")
        if run["data"] != data:
            raise ValueError(f"{folder} was trained on other data. It had {run['data']}, now there is {data}: "
                             "restore the data, or start a new run with --init")
        return model, train_set, val_set, run | {"options": vars(options)}
    model = build_model(options, len(train_set.names))
    for dataset in [train_set] if options.overfit else [train_set, val_set]:
        log(dataset.describe(model.config.num_queries))
    return model, train_set, val_set, {
        "epoch": 0, "step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "history": [], "matching": {}, "data": data,
        "config": dataclasses.asdict(model.config), "names": train_set.names, "options": vars(options),
        "image_size": options.image_size if options.coco_train else SIDE}


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
    epochs, seconds = run["options"]["epochs"], run["seconds"]
    log(f"epoch {run['epoch']:2}/{epochs}  loss {row['loss']:5.2f} (denoising {row['loss_denoising']:5.2f})  "
        f"AP {row['AP']:4.1f}  AP50 {row['AP50']:4.1f}  IS {math.nan if instability is None else instability:.2f}  "
        f"{seconds:.0f} s, {seconds / run['epoch'] * (epochs - run['epoch']):.0f} s left")


def train(options, device, after_epoch=None):
    """A whole run, or the rest of one -> its history, a dict for each epoch. The checkpoint last.pt holds all
    of it; the other files are made from it. Raises ValueError, naming step and images, if a loss or a gradient
    is not finite. `after_epoch`, if given, is called with the model."""
    model, train_set, val_set, run = start(options)
    if options.overfit:     # repeated, or most of the time would be spent on evaluating after every few steps
        train_set = ConcatDataset([train_set] * math.ceil(200 / len(train_set)))
    num_steps = math.ceil(len(train_set) / options.batch_size) * options.epochs
    model.to(device).backbone.to(memory_format=torch.channels_last)
    optimizer, schedule = build_optimizer(model, options.lr, num_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and amp_dtype(device) == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    folder = Path(options.output_dir)
    if options.resume:
        for name, part in parts.items():
            part.load_state_dict(run[name])
    elif rank() == 0:
        save(run, parts, folder)
    parallel_model, criterion = parallel(model, device), DNDETRCriterion(model.config)

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
            # The rest is as for any network. The scaler is for float16, and skips infinite gradients by itself.
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
        if rank() == 0:
            save(run, parts, folder)
        if after_epoch:
            after_epoch(model)
    if rank() == 0:
        save_figure(draw_curves({"this run": [run["history"]]}), folder / "curves.png")
        save_figure(draw_detections(model, val_set, device), folder / "detections.png")
    log(class_table(val_set, run["history"][-1]["AP_per_class"]) if options.coco_train else "")
    log(f"curves.png, detections.png, metrics.jsonl and checkpoints are in {folder}")
    if run["history"][-1]["AP"] < 1:
        log("AP is below 1. Can the model learn a few images by heart (--overfit 8)? If it can't, look at the truth "
            "in detections.png. If it can, train longer, with another --lr, or from --init CHECKPOINT.")
    return run["history"]


def evaluate_checkpoint(options, device):
    """The command evaluate: COCO's twelve numbers, and AP of each class, on the held-out images of the run, or
    on those of --coco-val."""
    model, checkpoint = load_detector(options.checkpoint)
    given = {name: value for name, value in vars(options).items() if value is not None}
    if options.coco_val:
        given |= {"coco_train": None, "overfit": None, "model": None, "seed": 0}
    elif "options" not in checkpoint:
        raise ValueError(f"{options.checkpoint} knows no data: add --coco-val IMAGES_DIR ANNOTATIONS_JSON")
    described = {"image_size": checkpoint["image_size"]} | checkpoint.get("options", {}) | given
    dataset = build_dataset(argparse.Namespace(**described), "val", names=checkpoint["names"])
    log(dataset.describe(model.config.num_queries))
    metrics, _ = evaluate(model.to(device), dataset, device, options.batch_size, options.workers, options.amp,
                          verbose=True)
    log(class_table(dataset, metrics["AP_per_class"]))


# ---- 9. Predictions ------------------------------------------------------------------------------


def predict(options, device):
    """The command predict: a picture with boxes of every image, and predictions.json, in COCO's result format
    and in pixels of the file. An image that can't be read costs only itself; after an interruption, what was
    found so far is there. Returns the number of images that failed."""
    model, checkpoint = load_detector(options.checkpoint)
    model, names, folder = model.to(device).eval(), checkpoint["names"], Path(options.output_dir)
    files = [file for path in map(Path, options.images)
             for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = [file for file in files if file.suffix.lower() in readable or str(file) in options.images]
    if not paths:
        raise ValueError(f"there are no images in {', '.join(options.images)}")
    folder.mkdir(parents=True, exist_ok=True)
    key = lambda path: str(path.resolve()).lower()              # some file systems ignore case
    taken, results, failed = set(map(key, paths)), [], 0
    try:
        for image_id, path in enumerate(progress(paths, "predicting"), 1):
            try:
                size = options.image_size or checkpoint["image_size"]
                image, (height, width) = read_image(path, size, upright=True)
                found = detect(model, image, device, options.threshold)
                # The first name that belongs neither to an input nor to another picture.
                targets = (folder / f"{path.stem}{end}.png" for end in ["", *(f"-{n}" for n in range(len(paths)))])
                target = next(target for target in targets if key(target) not in taken)
                draw_boxes(image, names=names, **found).save(target)
                taken.add(key(target))
                found["boxes"] = found["boxes"] * torch.tensor([width, height] * 2)
                results += [row | {"file_name": str(path)} for row in coco_results(image_id, found, list(names))]
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
RATES = {"normal": {"without denoising": 1e-3, "1 group, no mask": 2e-3, "5 groups": 2e-3},
         "grid": {"without denoising": 2e-3, "1 group, no mask": 3e-3, "5 groups": 3e-3}}


def experiment(options, device):
    """The commands compare and ablate: train every configuration with every seed, several at a time, each in a
    folder of its own; runs that are there are continued, or kept. Then print a table, and write numbers and
    figure."""
    names = CONFIGURATIONS if options.command == "ablate" else ("without denoising", "5 groups")
    rates, plan, folder = RATES[options.anchors], {}, Path(options.output_dir)
    shared = {key: getattr(options, key) for key in ("anchors", "epochs", "batch_size", "train_size", "val_size")}
    for seed, name in itertools.product(options.seeds, names):
        own = CONFIGURATIONS[name] | {"seed": seed, "lr": rates.get(name, rates["5 groups"])}
        run = "-".join(map(str, [*shared.values(), name, own["lr"], seed])).replace(",", "").replace(" ", "-")
        settings = DEFAULTS["shapes"] | shared | own | {"command": "train", "output_dir": str(folder / run)}
        settings["resume"] = settings["output_dir"] if (folder / run / "last.pt").exists() else None
        plan[name, seed] = argparse.Namespace(**settings)
    jobs = options.jobs or (os.cpu_count() if device.type == "cpu" else 1)
    context, threads = multiprocessing.get_context("spawn"), max(1, os.cpu_count() // jobs)
    with ProcessPoolExecutor(jobs, context, be_quiet, (threads,)) as pool:
        # If a run fails, and at Ctrl-C, map cancels the runs that have not started.
        done = pool.map(train, plan.values(), itertools.repeat(device))
        histories = dict(zip(plan, progress(done, f"{len(plan)} runs")))
    runs = {name: [histories[name, seed] for seed in options.seeds] for name in names}
    print_table(runs, "cpu_seconds" if device.type == "cpu" else "seconds")
    path = folder / f"{options.command}-{options.anchors}.json"
    about = {"device": str(device), "torch": torch.__version__, "options": vars(options), "runs": runs}
    write(path, lambda temporary: temporary.write_text(json.dumps(about)))
    # Without the loss, which has more terms with denoising.
    save_figure(draw_curves(runs, list(CURVES)[1:]), path.with_suffix(".png"))


def be_quiet(threads):
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def print_table(runs, clock):
    """Final AP of each configuration: median and range over the seeds. Then its difference to the baseline, at
    equal steps and at equal time, and the epochs it took to reach the baseline's final AP: mean and 95 % interval
    over pairs of runs with the same seed."""
    print("| | AP | AP50 | difference | at equal time | epochs to the baseline's AP |\n|---|---|---|---|---|---|")
    for name, histories in runs.items():
        cells = []
        for metric in ("AP", "AP50"):
            values = [history[-1][metric] for history in histories]
            cells.append(f"{np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        pairs = [(history, other[-1]) for history, other in zip(histories, runs["without denoising"])]
        cells.append(interval([history[-1]["AP"] - goal["AP"] for history, goal in pairs]))
        cells.append(interval([ap_at(history, goal[clock], clock) - goal["AP"] for history, goal in pairs]))
        reached = [next((row["epoch"] for row in history if row["AP"] >= goal["AP"]), None)
                   for history, goal in pairs]
        cells.append("not by all" if None in reached else interval(reached))
        print(f"| {name} | {' | '.join(cells)} |")


def ap_at(history, moment, clock):
    """AP at this moment, interpolated between the epochs."""
    return np.interp(moment, [0, *(row[clock] for row in history)], [0, *(row["AP"] for row in history)])


def interval(values):
    """Mean and half the width of its 95 % interval, Student's t over the seeds."""
    if np.ptp(values) == 0:
        return f"{np.mean(values):.1f}"
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    return f"{np.mean(values):.1f} ± {(high - low) / 2:.1f}"


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):     # a name that the console can't show must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = parse_options(argv)
    command = {"train": train, "evaluate": evaluate_checkpoint, "predict": predict}.get(options.command, experiment)
    try:
        result = command(options, pick_device(options.device))
        if command is predict and result:
            sys.exit(1)
    except (ValueError, OSError) as error:
        # Of an error in a process that loads images, only the last line is ours.
        text = str(error).strip().splitlines()[-1] if "DataLoader worker" in str(error) else error
        sys.exit(f"train_toy.py: error: {text}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; continue a training with --resume DIR, an experiment with the same command")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
