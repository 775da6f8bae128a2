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

Each command has a --help. A training also takes the fields of DNDETRConfig but num_classes: --dn-groups 2.
Start reading at train() in section 8: its inner loop is the training step. What it uses stands above it.
"""
import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib import ft2font, get_data_path
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.models import get_model_weights
from torchvision.ops import box_convert, box_iou
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

import dn_detr
from dn_detr import DNDETR, DNDETRConfig, postprocess, read_checkpoint, require, to_device

# ---- 1. Options ----------------------------------------------------------------------------------

TOY = dict(num_queries=25, hidden_dim=64, num_heads=4, num_encoder_layers=0, num_decoder_layers=3,
           dim_feedforward=256, backbone="small", anchor_temperature=20.0, position_frequency=4.0,
           cell_centers=True, loss_class=2.0, dn_groups=3)
TOY_COCO = TOY | dict(num_queries=100, hidden_dim=128, num_encoder_layers=1, dim_feedforward=512,
                      small_widths=(32, 64, 128, 256))
OPTIONS = {     # default and help; the type of the default is the type of the option
    "coco_train": ((), "a folder of images, and their annotations in COCO format"),
    "coco_val": ((), "the same for the held-out images"),
    "overfit": (0, "learn the first N training images by heart"),
    "resume": ("", "continue the run in this folder; its data may have moved"),
    "init": ("", "start from this checkpoint, ours or the authors'"),
    "pretrained_backbone": (False, "ImageNet weights, downloaded; needs --backbone resnet50 or the like"),
    "anchors": ("grid", "initial anchors; normal: at random, as in the paper"),
    "epochs": (8, "passes over the training images"),
    "batch_size": (8, "images a step, over all processes"),
    "lr": (3e-3, "learning rate"),
    "seed": (0, "decides weights, shapes, order, augmentation and noise"),
    "seeds": ((0, 1, 2, 3, 4), "of the runs of each configuration"),
    "train_size": (3200, "training images of shapes"),
    "val_size": (300, "held-out images of shapes"),
    "image_size": (0, "shorter side of a photograph (paper: 800), by default that of the checkpoint, or 256"),
    "threshold": (0.3, "lowest score of a detection that is kept"),
    "workers": (0, "processes that load images"),
    "amp": (False, "mixed precision in bfloat16"),
    "device": ("", "cuda, mps or cpu; if not given, the first that is there"),
    "output_dir": ("runs/shapes", "where the files go")}
FIELDS = {each.name: (each.default, argparse.SUPPRESS) for each in dataclasses.fields(DNDETRConfig)}
PRESETS = {     # other defaults, of a command, or of a training with this option
    "coco_train": dict(epochs=50, lr=1e-3, image_size=256, output_dir="runs/coco"),
    "overfit": dict(epochs=6, lr=1e-3, batch_size=4, output_dir="runs/overfit"),
    "init": dict(lr=1e-4),
    "predict": dict(output_dir="runs/predictions"),
    "compare": dict(epochs=12, train_size=800, val_size=200, anchors="normal", output_dir="runs/experiment")}
PRESETS["ablate"] = PRESETS["compare"]
TAKES = {       # the options of each command
    "train": {*OPTIONS, *FIELDS} - {"seeds", "threshold", "num_classes"},
    "evaluate": {"coco_val", "image_size", "batch_size", "workers", "amp", "device"},
    "predict": {"image_size", "threshold", "device", "output_dir"},
    "compare": {"anchors", "epochs", "batch_size", "train_size", "val_size", "seeds", "device", "output_dir"}}
TAKES["ablate"] = TAKES["compare"]
WITHOUT_EFFECT = {      # in a training with this option
    "resume": TAKES["train"] - {"resume", "coco_train", "coco_val", "workers", "device"},
    "init": {"anchors", "pretrained_backbone"},
    "overfit": {"train_size", "val_size"}, "coco_train": {"train_size", "val_size"}}


def parse_options(argv=None):
    """The options of a command, with its defaults. Ends the program if one is impossible or without effect.
    Raises ValueError if the checkpoint to start from can't be read."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv.pop(0) if argv and argv[0] in TAKES else "train"
    defaults = {name: default for name, (default, _) in OPTIONS.items()} | PRESETS.get(command, {})
    parser = argparse.ArgumentParser(
        f"train_toy.py {command}", description=__doc__, argument_default=argparse.SUPPRESS,
        epilog=f"Defaults: {defaults}\nOther defaults, of a command or with an option: {PRESETS}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    if command in ("evaluate", "predict"):
        parser.add_argument("checkpoint", help="ours or the authors'")
    if command == "predict":
        parser.add_argument("images", nargs="+", help="image files, and folders of them")
    for name, (default, text) in (OPTIONS | FIELDS).items():
        how = dict(type=type(default), choices=("grid", "normal") if name == "anchors" else None)
        if isinstance(default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            how = dict(nargs="+", type=int) if default else dict(nargs=2, metavar=("IMAGES_DIR", "JSON"))
        if name in TAKES[command]:
            parser.add_argument(f"--{name.replace('_', '-')}", help=text, **how)
    given = vars(parser.parse_args(argv))
    for name in filter(given.get, PRESETS):
        defaults |= PRESETS[name]
    if given.get("init") and given.get("coco_train"):
        defaults["image_size"] = read_checkpoint(given["init"]).get("image_size", 800)
    if given.get("resume"):
        saved = read_checkpoint(Path(given["resume"], "last.pt")).get("options")
        require(saved, f"{given['resume']}/last.pt is not from a run")
        defaults |= saved | {"output_dir": given["resume"], "device": ""}
    options = {"command": command} | defaults | given

    for name in given.keys() & OPTIONS.keys():
        smallest = 1 if name in ("epochs", "batch_size", "train_size", "val_size") else 0
        if isinstance(given[name], (int, float)) and not smallest <= given[name] < math.inf:
            parser.error(f"{name} can't be {given[name]}")
    if command == "train":
        for kind in filter(options.get, WITHOUT_EFFECT):
            for name in given.keys() & WITHOUT_EFFECT[kind]:
                parser.error(f"{name} has no effect with {kind}: drop it, or start a new run with --init")
        if bool(options["coco_val"]) != bool(options["coco_train"] and not options["overfit"]):
            parser.error("--coco-val belongs to --coco-train without --overfit, and is needed there")
    return argparse.Namespace(**options)


# ---- 2. Processes, devices, files: nothing here is about detection ------------------------------

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # from torchrun


@contextmanager
def explain(what, *errors):
    """Turn these errors into a ValueError that begins with `what`."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{what}: {error if isinstance(error, ValueError) else repr(error)}") from error


def pick_device(name=""):
    """The device of that name, or the best there is; joins the other processes if torchrun started some."""
    has_mps = torch.backends.mps.is_available()
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    with explain(f"--device {name} can't be used here", RuntimeError, AssertionError):
        if WORLD_SIZE > 1 and name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.zeros(1, device=name).device
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def parallel(model, device):
    """The model, with its gradients averaged over the processes, if there are several."""
    if WORLD_SIZE == 1:
        return model
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model
    # A single decoder layer does not use position_scale, which the authors' weights contain all the same.
    is_single = model.config.num_decoder_layers == 1
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=is_single)


def seed_of(*numbers):
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def log(text):
    if RANK == 0:
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding))   # a console may lack letters of a name
        sys.stdout.flush()


def progress(iterable, description):
    # None: no bar where stderr is no terminal.
    return tqdm(iterable, desc=description, leave=False, disable=True if RANK else None)


def write(path, write_to):
    """Write a file, in the first process only. A killed process or a full disk leaves the old one, whole."""
    if RANK == 0:
        temporary = path.with_name(f"tmp-{path.name}")      # with its ending, which picks a picture's format
        with explain(f"{path} can't be written (a full disk, an open file?)", OSError, RuntimeError):
            write_to(temporary)
            os.replace(temporary, path)


# ---- 3. Shapes: a detection dataset out of nothing -----------------------------------------------

SIDE = 64   # pixels of an image
SHAPE_MASKS = {  # in a box from -1 to 1, u to the right and v down; 0.06 and 0.01 let tips touch its border
    "circle": lambda u, v: u ** 2 + v ** 2 <= 1,
    "square": lambda u, v: np.ones_like(u + v, dtype=bool),
    "triangle": lambda u, v: abs(u) <= (v + 1) / 2 + 0.06,
    "diamond": lambda u, v: abs(u) + abs(v) <= 1.01,
    "cross": lambda u, v: (abs(u) <= 1 / 3) | (abs(v) <= 1 / 3),
    "ring": lambda u, v: (u ** 2 + v ** 2 <= 1) & (u ** 2 + v ** 2 >= 0.3)}


def overlap(a, b):
    """Intersection of two xywh boxes over the area of the smaller one."""
    w, h = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return w * h / min(a[2] * a[3], b[2] * b[3])


def draw_scene(seed):
    """-> image uint8 [3, SIDE, SIDE] and its objects, (label, [x, y, w, h] in pixels). One image of twenty is
    empty, another one has 9 to 12 small shapes, the others have 1 to 8; fewer where no more fit."""
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


def draw_shapes(size, seed, split):
    """-> a dict in COCO format, but with the image instead of a file_name. Image i of a (seed, split) is
    always the same one."""
    scenes = [draw_scene((seed, split == "train", index)) for index in range(size)]
    return {"images": [{"id": index, "height": SIDE, "width": SIDE, "image": image}
                       for index, (image, _) in enumerate(scenes)],
            "categories": [{"id": index, "name": name} for index, name in enumerate(SHAPE_MASKS)],
            "annotations": [{"image_id": index, "category_id": label, "bbox": box}
                            for index, (_, objects) in enumerate(scenes) for label, box in objects]}


# ---- 4. Datasets in COCO format, and batches -----------------------------------------------------

def read_image(path, image_size, upright=False):
    """An image file as uint8 [3, h, w], and the (height, width) that it had. As in DETR, the shorter side
    becomes `image_size`, and the longer one at most 5/3 of it. `upright`: turned as its EXIF tag says. Raises
    a ValueError that names the file, whatever goes wrong."""
    with explain(f"image {path} can't be read", Exception):
        image = Image.open(path)
        require(image.mode[0] not in "IF", f"its mode is {image.mode}, convert it to 8 bits")
        is_turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        height, width = image.size if is_turned else image.size[::-1]
        image.draft(None, (image_size, image_size))     # decodes a large JPEG at a fraction of its size
        image = ImageOps.exif_transpose(image) if upright else image
        scale = min(image_size / min(height, width), image_size * 5 / 3 / max(height, width))
        size = [max(1, round(side * scale)) for side in (width, height)]
        image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
        return v2.functional.pil_to_tensor(image), (height, width)


class DetectionDataset(Dataset):
    """Images with objects. An item is an image, uint8 [3, h, w], and its target: labels [n], boxes [n, 4]
    (cxcywh in [0, 1]), index, image_id, and size, the (height, width) in which AP is measured.

    `data` is a dict in COCO format, of which the first `count` images are taken. A label is the place of its
    category id in `names` {category id: name}, by default those of `data`. Augmentation is drawn from (seed,
    epoch, index): the same in every process, whatever happened before. Training and `truth`, by which AP is
    measured, have the same boxes, clipped to the image; only crowds are in `truth` alone, so that detections
    on them are ignored. Raises a ValueError that shows the first record that is wrong.
    """
    epoch = 0

    def __init__(self, data, folder, count, image_size, augmentation, seed=0, names=None):
        self.image_size, self.transform, self.seed = image_size, v2.Compose(augmentation), seed
        self.images, self.sizes, self.truth, record = [], [], [], data
        index_of, seen, own_names, dropped, clipped = {}, {}, {}, 0, 0
        try:
            for record in data["images"]:
                self.images.append(f"{folder}/{record['file_name']}" if folder else record["image"])
                index_of[record["id"]] = seen[self.images[-1]] = len(self.sizes)
                self.sizes.append((record["height"], record["width"]))
                require(len(index_of) == len(seen) == len(self.sizes), "its id or its file is listed twice")
                require(0 < min(self.sizes[-1]) <= max(self.sizes[-1]) < math.inf, "sizes are in pixels")
            for record in data["categories"]:
                require(record["id"] not in own_names, "another category has this id")
                own_names[record["id"]] = str(record["name"])
            self.image_ids, self.names = list(index_of), names or dict(sorted(own_names.items()))
            label_of = {id: label for label, id in enumerate(self.names)}
            self.images = self.images[:count]
            objects = [[] for _ in self.images]
            for number, record in enumerate(data["annotations"], 1):    # to pycocotools, the id 0 is "none"
                index, id, (x, y, w, h) = index_of[record["image_id"]], record["category_id"], record["bbox"]
                require(self.names.get(id) == own_names[id], f"the model has no class {own_names[id]} ({id})")
                require(math.isfinite(x + y + w + h), "bbox is not finite")
                if index >= len(objects):                               # left out by `count`
                    continue
                height, width = self.sizes[index]
                x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
                if min(x1 - x0, y1 - y0) <= 1:
                    dropped += 1
                    continue
                clipped += max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 1      # less is rounding
                w, h, is_crowd = x1 - x0, y1 - y0, int(record.get("iscrowd") or 0)
                # A mask is never larger than its box. Clockwise polygons have a negative area.
                area = min(abs(record.get("area") or math.inf), w * h)
                self.truth.append({"id": number, "image_id": index, "category_id": label_of[id],
                                   "bbox": [x0, y0, w, h], "area": area, "iscrowd": is_crowd})
                center = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height
                objects[index] += [] if is_crowd else [(label_of[id], *center, w / width, h / height)]
        except Exception as error:      # KeyError, TypeError, ...
            raise ValueError(f"{error!r}, in {str(record)[:300]}") from error
        tables = [torch.tensor(each, dtype=torch.float32).reshape(-1, 5) for each in objects]
        self.labels, self.boxes = [each[:, 0].long() for each in tables], [each[:, 1:] for each in tables]
        self.class_counts = torch.cat(self.labels).bincount(minlength=len(self.names)).tolist()
        self.description = (
            f"{len(self)} images, {sum(self.class_counts)} objects of {np.count_nonzero(self.class_counts)} "
            f"of {len(self.names)} classes, at most {max(map(len, objects))} in an image; {dropped} boxes of "
            f"a pixel or less dropped, {clipped} clipped to their image")
        require(any(objects) and clipped <= len(self.truth) / 2,
                f"{self.description}. A bbox is [x, y, width, height] in pixels, neither relative nor "
                "[x0, y0, x1, y1]; crowds (iscrowd) and images after the first --overfit are left out")
        missing = [path for path in self.images if isinstance(path, str) and not os.path.isfile(path)]
        require(not missing, f"{len(missing)} of {len(self)} images are missing, e.g. {missing[:1]}")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if isinstance(image, str):
            path, (image, size) = image, read_image(image, self.image_size)
            require(size == self.sizes[index], f"{path} has {size} pixels (height, width), and not "
                    f"{self.sizes[index]} as annotated: was it resized, or turned by its EXIF tag?")
        # Boxes are relative, so the canvas is 1 x 1.
        boxes = tv_tensors.BoundingBoxes(self.boxes[index], format="CXCYWH", canvas_size=(1, 1))
        with torch.random.fork_rng(devices=[]):         # leaves the random numbers of denoising alone
            torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
            image, boxes = self.transform(image, boxes)
        return image, {"labels": self.labels[index], "boxes": boxes.as_subclass(Tensor), "index": index,
                       "image_id": self.image_ids[index], "size": self.sizes[index]}


def build_dataset(options, split, names=None):
    """The "train" or the "val" dataset of a run; with --overfit, both are the same plain images."""
    count, split, folder = options.overfit or None, "train" if options.overfit else split, ""
    if options.coco_train or options.coco_val:
        folder, title = options.coco_train if split == "train" else options.coco_val
        steps = [v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()]
    else:
        require(options.image_size in (0, SIDE), "--image-size has no effect on shapes: drop it")
        title, size = f"shapes ({split})", count or getattr(options, f"{split}_size")
        steps = [v2.RandomHorizontalFlip(), v2.RandomInvert(), v2.RandomChannelPermutation()]
    steps = steps if split == "train" and not count else [v2.Identity()]
    with explain(title, OSError, ValueError):       # json finds out the encoding of bytes
        data = json.loads(Path(title).read_bytes()) if folder else draw_shapes(size, options.seed, split)
        dataset = DetectionDataset(data, folder, count, options.image_size, steps, options.seed, names)
    log(f"{title}: {dataset.description}")
    return dataset


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


IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))     # mean and std of red, green, blue


def normalize(images, padding_mask, device):
    """The images of a batch as float, normalized (padding stays 0), and the mask, both on `device`."""
    mean, std = (to_device(values, device) for values in torch.tensor(IMAGENET).view(2, 3, 1, 1))
    # Moved first, as only pinned memory is copied without waiting. A step is 5 % faster in channels_last.
    images = (to_device(images, device).to(memory_format=torch.channels_last) - mean) / std
    if padding_mask is not None:
        padding_mask = to_device(padding_mask, device)
        images = images.masked_fill(padding_mask[:, None], 0)
    return images, padding_mask


# ---- 5. Model and optimizer ----------------------------------------------------------------------

@torch.no_grad()
def initialize_for_toy(model, on_grid=True):
    """Not in the paper: an initialization that lets a small model train in minutes. Anchors start `on_grid`,
    0.3 of the image wide and high, and cross-attention starts by looking at the anchor."""
    if on_grid:
        count = model.config.num_queries
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
        boxes = nn.functional.pad(torch.cartesian_prod(y, x)[:count].flip(1), (0, 2), value=0.3)
        model.anchor_logits.weight.copy_(dn_detr.inverse_sigmoid(boxes))
    # The sine parts of query and key start as the same rotation (times 2 each, for a sharper peak), and the
    # scales of positions as 1. At equal temperatures, scores summed over the heads are largest at the anchor.
    for layer in model.decoder.layers:
        nn.init.orthogonal_(layer.cross_key_position.weight, gain=2)
        nn.init.zeros_(layer.cross_key_position.bias)
        layer.cross_query_sine.load_state_dict(layer.cross_key_position.state_dict())
    for part in (model.encoder, model.decoder):
        if len(part.layers):
            nn.init.zeros_(part.position_scale.layers[-1].weight)
            nn.init.ones_(part.position_scale.layers[-1].bias)


def load_detector(path, **overrides):
    """-> model and checkpoint (dict) of our own file, or of the authors', whose labels are COCO's ids. Raises
    ValueError for a file that is absent, broken or of another kind, and for overrides that do not fit."""
    checkpoint = read_checkpoint(path)
    with explain(f"{path} does not fit", TypeError, RuntimeError, KeyError, ValueError):
        if "config" in checkpoint:
            model = DNDETR(DNDETRConfig(**checkpoint["config"] | overrides))
            model.load_state_dict(checkpoint["model"])
        else:
            model = dn_detr.load_official(checkpoint, **overrides)
            names = get_model_weights("fasterrcnn_resnet50_fpn")["COCO_V1"].meta["categories"]
            checkpoint = {"names": dict(enumerate(names)), "image_size": 800}
        require(all(x.isfinite().all() for x in model.state_dict().values()), "not all weights are finite")
    return model, checkpoint


def build_model(options, names):
    """The model that the options describe, for the classes in `names`, with the weights they name. If the
    checkpoint of --init has other classes, what belongs to a class starts anew."""
    chosen = {name: value for name, value in vars(options).items() if name in FIELDS}
    if options.init:
        old, checkpoint = load_detector(options.init, **chosen)
        model = DNDETR(dataclasses.replace(old.config, num_classes=len(names)))
        state, fresh = old.state_dict(), model.state_dict()
        # The last row, "unknown", means the same whatever the classes are.
        fresh["label_embedding.weight"][-1] = state["label_embedding.weight"][-1]
        heads = () if checkpoint["names"] == names else ("class_head.", "label_embedding.")
        anew = {name: fresh[name] for name in state if name.startswith(heads)}
        model.load_state_dict(state | anew)
        log(f"{options.init}: of {len(state)} tensors, these start anew: {', '.join(anew) or 'none'}")
        return model
    defaults = (TOY_COCO if options.coco_train else TOY) | {"frozen_norm": options.pretrained_backbone}
    model = DNDETR(DNDETRConfig(**defaults | chosen, num_classes=len(names)))
    initialize_for_toy(model, on_grid=options.anchors == "grid")
    if options.pretrained_backbone:
        name, folder = model.config.backbone, f"{torch.hub.get_dir()}/checkpoints"
        with explain(f"no ImageNet weights for {name} online or in {folder}/{name}-*.pth", Exception):
            state = get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True)
            model.backbone.load_state_dict({key: state[key] for key in model.backbone.state_dict()})
    return model


def build_optimizer(model, lr, num_steps):
    """AdamW and its schedule: linear decay from the first step on to zero, and at most 100 steps of warm-up.
    Betas and weight decay suit short trainings; the authors have (0.9, 0.999) and 1e-4. A pretrained backbone
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

AP_NAMES = "AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split()


def coco_metrics(dataset, detections, verbose=False):
    """COCO's twelve numbers in percent, those by size only if `verbose`, and "AP_per_class", {category id:
    AP}. None where there is nothing to measure, as of large objects in small images."""
    truth = COCO()
    truth.dataset = {"info": {}, "images": [{"id": index} for index in range(len(dataset))],
                     "categories": [{"id": label} for label in range(len(dataset.names))],
                     "annotations": dataset.truth}
    with redirect_stdout(sys.stdout if verbose else None):          # None: print nothing
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(detections), "bbox")
        if not verbose:             # sizes take three quarters of the time
            evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    # precision: [IoU, recall, class, area, detections]
    precision = evaluator.eval["precision"][:, :, :, 0, -1].mean((0, 1))                # [classes]
    numbers = [None if x < 0 else 100 * float(x) for x in (*evaluator.stats, *precision)]     # COCO says -1
    return dict(zip(AP_NAMES, numbers)) | {"AP_per_class": dict(zip(dataset.names, numbers[len(AP_NAMES):]))}


def coco_results(image_id, result, category_ids):
    """One image's predictions in COCO's result format."""
    boxes = box_convert(result["boxes"], "xyxy", "xywh").tolist()
    return [{"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(result["labels"].tolist(), boxes, result["scores"].tolist())]


def anchor_distances(model, boxes, matched, true_boxes):
    """The L1 distance from the learned anchor of a query to the object that it is matched with, if its box
    has an IoU of at least 0.5. boxes [N, 4], matched [N], true_boxes [n, 4] -> [number of such objects]."""
    query = (matched >= 0).nonzero().flatten()
    true_boxes = true_boxes[matched[query]]
    corners = (box_convert(x, "cxcywh", "xyxy") for x in (boxes[query], true_boxes))
    is_found = box_iou(*corners).diagonal() >= 0.5
    anchors = model.anchor_logits.weight.cpu().sigmoid()[query % model.config.num_queries]  # of any pattern
    return (anchors - true_boxes)[is_found].abs().sum(1)


@torch.no_grad()
def evaluate(model, dataset, device, options, verbose=False):
    """-> metrics (dict), and the object that each query is matched with, long [images, N]."""
    model.eval()
    loader = DataLoader(dataset, max(1, options.batch_size // WORLD_SIZE), collate_fn=collate,
                        sampler=range(RANK, len(dataset), WORLD_SIZE), num_workers=options.workers)
    found = {}
    for images, padding_mask, targets in progress(loader, "evaluating"):
        with torch.autocast(device.type, torch.bfloat16) if options.amp else nullcontext():
            outputs = model(*normalize(images, padding_mask, device))
        results = postprocess(outputs, [target["size"] for target in targets])
        matched, boxes = dn_detr.matched_objects(outputs, targets, model.config), outputs["pred_boxes"].cpu()
        for i, target in enumerate(targets):
            index, distances = target["index"], anchor_distances(model, boxes[i], matched[i], target["boxes"])
            found[index] = coco_results(index, results[i], range(len(dataset.names))), distances, matched[i]
    if WORLD_SIZE > 1:
        parts = [None] * WORLD_SIZE
        dist.all_gather_object(parts, found)
        found = {index: each for part in parts for index, each in part.items()}
    detections, distances, matched = zip(*(found[index] for index in range(len(dataset))))
    metrics = coco_metrics(dataset, [row for rows in detections for row in rows], verbose and RANK == 0)
    metrics["anchor_distance"] = torch.cat(distances).mean().item() if any(map(len, distances)) else None
    return metrics, torch.stack(matched)


def class_table(dataset, metrics):
    """AP and number of objects of each class that has objects, as text."""
    rows = zip(dataset.names.values(), metrics["AP_per_class"].values(), dataset.class_counts)
    return "\n".join(f"{name:20} AP {ap:5.1f}, {count} objects" for name, ap, count in rows if count)


# ---- 7. Pictures ---------------------------------------------------------------------------------

# Okabe and Ito's colors, which color-blind readers can tell apart too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
CURVES = {"loss": "loss", "AP": "AP, %", "instability": "IS", "anchor_distance": "anchor to found object, l1"}
FONT = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
LETTERS = ft2font.FT2Font(FONT).get_charmap()


def draw_curves(runs, metrics=tuple(CURVES)):
    """Metrics over the epochs of {name: [history of each seed]}: medians, in bands from lowest to highest."""
    figure = Figure(figsize=(3.2 * len(metrics), 2.8), layout="constrained", dpi=130)
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for (name, histories), color in zip(runs.items(), COLORS):
            values = np.array([[row[metric] for row in history] for history in histories], dtype=float)
            epochs = range(1, values.shape[1] + 1)
            axis.plot(epochs, np.median(values, 0), "o-", color=color, markersize=3, label=name)
            axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15)
        axis.set(xlabel="epoch", title=CURVES[metric], ylim=(0, None))
    figure.axes[0].legend(frameon=False)
    return figure


def draw_boxes(image, boxes, labels, names, scores=None):
    """An image uint8 [3, h, w] as the model sees it, enlarged if it is small, with boxes [n, 4] (xyxy, in
    [0, 1] of the image), their classes `names` {category id: name} and scores, as a PIL image."""
    scale = max(1, 400 // max(image.shape))
    picture = v2.functional.to_pil_image(image.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
    draw, font = ImageDraw.Draw(picture), ImageFont.truetype(FONT, max(10, max(picture.size) // 28))
    corners = (boxes * torch.tensor(picture.size * 2)).tolist()
    for number, ((x0, y0, x1, y1), label) in enumerate(zip(corners, labels.tolist())):
        category_id, name = list(names.items())[label]
        text = name if LETTERS.keys() >= set(map(ord, name)) else f"category {category_id}"     # e.g. Chinese
        text += "" if scores is None else f" {scores[number]:.2f}"
        draw.rectangle((x0, y0, x1, y1), outline=COLORS[label % len(COLORS)], width=2)
        draw.text((x0, y0), text, "white", font, stroke_width=2, stroke_fill="black")
    return picture


@torch.no_grad()
def detect(model, image, device, threshold):
    """Detections in one image, uint8 [3, h, w]: boxes (xyxy in [0, 1]), labels and scores, best first."""
    result = postprocess(model.eval()(*normalize(image[None], None, device)), [(1, 1)])[0]
    is_kept = result["scores"] >= threshold
    return {name: values[is_kept].cpu() for name, values in result.items()}


def draw_detections(model, dataset, device, count=6, threshold=0.5):
    """The first images that hold something: the truth, and below it what the model finds, as a PIL image."""
    truth, found = [], []
    for index in [index for index, labels in enumerate(dataset.labels) if len(labels)][:count]:
        image, target = dataset[index]
        boxes = box_convert(target["boxes"], "cxcywh", "xyxy")
        truth.append(draw_boxes(image, boxes, target["labels"], dataset.names))
        found.append(draw_boxes(image, names=dataset.names, **detect(model, image, device, threshold)))
    pictures, _, _ = collate([(v2.functional.pil_to_tensor(each), None) for each in truth + found])
    return v2.functional.to_pil_image(make_grid(pictures, nrow=len(truth), padding=8))


# ---- 8. Training ---------------------------------------------------------------------------------

def load_or_start(options):
    """-> model, training and held-out dataset, and the run: a dict of what a checkpoint holds, at the start
    or as the last checkpoint left it. Raises ValueError if another run is in its folder, or data changed."""
    folder = Path(options.output_dir)
    require(options.batch_size % WORLD_SIZE == 0, f"{WORLD_SIZE} processes can't share --batch-size")
    require(options.resume or not (folder / "last.pt").exists(),
            f"{folder} holds another run: --resume {folder}, or choose another --output-dir")
    train_set = build_dataset(options, "train")
    val_set = train_set if options.overfit else build_dataset(options, "val", names=train_set.names)
    data = {"training": train_set.description, "held-out": val_set.description, "classes": train_set.names}
    torch.manual_seed(options.seed)
    if options.resume:
        model, run = load_detector(folder / "last.pt")
        require(run["data"] == data, f"{folder} was trained on other data, {run['data']}, and not on {data}: "
                "restore them, or start a new run with --init")
        return model, train_set, val_set, run | {"options": vars(options)}
    model = build_model(options, train_set.names)
    return model, train_set, val_set, {
        "history": [], "config": dataclasses.asdict(model.config), "names": train_set.names, "data": data,
        "options": vars(options), "image_size": options.image_size or SIDE}


def save(run, parts, folder):
    """Write the checkpoints, and the history. A run killed in between repeats the epoch after last.pt and
    writes the same again; that is why best.pt comes first."""
    state, history = run | {name: part.state_dict() for name, part in parts.items()}, run["history"]
    folder.mkdir(parents=True, exist_ok=True)
    if history and history[-1]["AP"] >= max(row["AP"] for row in history):
        write(folder / "best.pt", lambda path: torch.save(state, path))
    write(folder / "last.pt", lambda path: torch.save(state, path))
    rows = "".join(json.dumps(row) + "\n" for row in history)
    write(folder / "metrics.jsonl", lambda path: path.write_text(rows))


def train(options, device):
    """A whole run, or the rest of one -> its history, a dict for each epoch. The checkpoint last.pt holds
    all of it. Raises ValueError, naming step and images, if a prediction or a gradient is not finite."""
    model, train_set, val_set, run = load_or_start(options)
    # With --overfit, the few images are repeated, or evaluation would take most of the time.
    repeated = ConcatDataset([train_set] * math.ceil(200 / len(train_set) if options.overfit else 1))
    sampler = DistributedSampler(repeated, WORLD_SIZE, RANK, seed=options.seed)
    batches = DataLoader(repeated, options.batch_size // WORLD_SIZE, sampler=sampler, collate_fn=collate,
                         num_workers=options.workers, pin_memory=device.type == "cuda")
    model.to(device).backbone.to(memory_format=torch.channels_last)
    optimizer, schedule = build_optimizer(model, options.lr, len(batches) * options.epochs)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for name, part in parts.items() if options.resume else ():
        part.load_state_dict(run[name])
    parallel_model = parallel(model, device)
    folder = Path(options.output_dir)
    # `parallel` has waited for all processes: each has looked for another run's last.pt before there is one.
    save(run, parts, folder)

    last = run["history"][-1] if run["history"] else {"seconds": 0.0, "cpu_seconds": 0.0}
    started, cpu_started = time.time() - last["seconds"], time.process_time() - last["cpu_seconds"]
    for epoch in range(len(run["history"]), options.epochs):
        torch.manual_seed(seed_of(options.seed, epoch, RANK))           # of the noise and of dropout
        train_set.epoch = epoch                                         # of the augmentation
        sampler.set_epoch(epoch)                                        # of the order
        model.train()
        bar, totals = progress(batches, f"epoch {epoch + 1}/{options.epochs}"), 0
        for step, (images, padding_mask, targets) in enumerate(bar, epoch * len(batches)):
            images, padding_mask = normalize(images, padding_mask, device)
            with explain(f"step {step}, images {[each['image_id'] for each in targets]}", ValueError):
                # The method: the forward pass draws the noise; the loss matches, and compares.
                with torch.autocast(device.type, torch.bfloat16) if options.amp else nullcontext():
                    outputs = parallel_model(images, padding_mask, targets)
                losses = dn_detr.training_loss(outputs, targets, model.config)
                # The rest is as for any network. 0.1 is the authors' limit.
                optimizer.zero_grad()
                losses["loss"].backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)
                require(norm.isfinite(), "the gradient is not finite: is the learning rate too high?")
                optimizer.step()
                schedule.step()
            totals += torch.stack(list(losses.values())).detach()
        if WORLD_SIZE > 1:
            dist.all_reduce(totals)
        metrics, matched = evaluate(model, val_set, device, options)
        metrics |= dict(zip(losses, (totals / len(batches) / WORLD_SIZE).tolist())) | {
            "epoch": epoch + 1, "step": step + 1, "lr": schedule.get_last_lr()[-1],
            "seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu_started,
            "instability": dn_detr.matching_instability(run["matched"], matched) if epoch else None}
        run |= {"matched": matched, "history": [*run["history"], metrics]}
        log("epoch {epoch:2}/{0}  loss {loss:5.2f} (denoising {loss_denoising:5.2f})  AP {AP:4.1f}  "
            "AP50 {AP50:4.1f}  IS {instability!s:.4}  {seconds:.0f} s".format(options.epochs, **metrics))
        save(run, parts, folder)
    write(folder / "curves.png", draw_curves({"this run": [run["history"]]}).savefig)
    write(folder / "detections.png", draw_detections(model, val_set, device).save)
    log(class_table(val_set, run["history"][-1]))
    log(f"curves.png, detections.png (above, the truth), metrics.jsonl and checkpoints are in {folder}")
    return run["history"]


def evaluate_checkpoint(options, device):
    """COCO's twelve numbers, and AP of each class, on the held-out images of the run or on --coco-val."""
    model, checkpoint = load_detector(options.checkpoint)
    data = vars(options) if options.coco_val else checkpoint.get("options")
    require(data, f"{options.checkpoint} knows no data: add --coco-val IMAGES_DIR ANNOTATIONS_JSON")
    data = data | {"image_size": options.image_size or checkpoint["image_size"]}
    dataset = build_dataset(argparse.Namespace(**data), "val", checkpoint["names"])
    log(class_table(dataset, evaluate(model.to(device), dataset, device, options, verbose=True)[0]))


# ---- 9. Predictions ------------------------------------------------------------------------------

def predict(options, device):
    """A picture with boxes of every image, and predictions.json, also after an interruption: COCO's result
    format, in pixels of the upright image, with the path as image_id. An image that can't be read does not
    stop the others: it is named, and the program ends with status 1."""
    model, checkpoint = load_detector(options.checkpoint)
    names, folder, model = checkpoint["names"], Path(options.output_dir), model.to(device)
    size = options.image_size or checkpoint["image_size"]
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [file for path in map(Path, options.images)
             for file in (sorted(path.iterdir()) if path.is_dir() else [path])
             if file == path or file.suffix.lower() in readable and not file.name.startswith(".")]
    require(files, f"there are no images in {', '.join(options.images)}")
    folder.mkdir(parents=True, exist_ok=True)
    require(not any(path.parent.samefile(folder) for path in files if path.exists()),
            f"--output-dir {folder} holds images to predict: choose another one")
    results, written, failed = [], set(), 0
    try:
        for path in progress(files, "predicting"):
            try:
                image, (height, width) = read_image(path, size, upright=True)
                found = detect(model, image, device, options.threshold)
                target = folder / f"{path.stem}.png"
                while target.name.lower() in written:       # some file systems ignore case
                    target = target.with_stem(target.stem + "_")
                written.add(target.name.lower())
                draw_boxes(image, names=names, **found).save(target)
                found["boxes"] = found["boxes"] * torch.tensor([width, height] * 2)
                results += coco_results(str(path), found, list(names))
            except Exception as error:
                failed += 1
                log(f"{path}: {error}")
    finally:
        write(folder / "predictions.json", lambda path: path.write_text(json.dumps(results)))
    log(f"{len(files) - failed} pictures, and predictions.json with {len(results)} detections of a score of "
        f"at least {options.threshold}, are in {folder}")
    require(not failed, f"{failed} of {len(files)} images failed")


# ---- 10. Experiments: many runs, one after the other ---------------------------------------------

CONFIGURATIONS = {  # the first one is the baseline
    "without denoising": "--dn-groups 0",
    "1 group, boxes only": "--dn-groups 1 --label-noise 0",
    "1 group": "--dn-groups 1",
    "1 group, no mask": "--dn-groups 1 --no-dn-mask",
    "2 groups": "--dn-groups 2",
    "5 groups": "--dn-groups 5",
    "10 groups": "--dn-groups 10"}
# Learning rates chosen on seeds 100 and 101 (see assets/rates.json); all others have that of 5 groups.
RATES = {"normal": {"without denoising": 1e-3, "1 group, no mask": 1e-3, "5 groups": 2e-3},
         "grid": {"without denoising": 3e-3, "5 groups": 3e-3}}


def interval(values):
    """Mean and half the width of its 95 % interval, Student's t over the seeds."""
    if np.isnan(values).any():
        return "not by all"
    half = stats.t.ppf(0.975, len(values) - 1) * (stats.sem(values) if len(values) > 1 else 1)  # nan for one
    return f"{np.mean(values):.1f} ± {half:.1f}"


def results_table(runs, clock):
    """Final AP of each configuration, median and range over the seeds. Then means and 95 % intervals over
    pairs of runs with the same seed: differences in AP to the first row, at equal steps and at equal time,
    and to the row above, and the epochs until the final AP of the first row is reached."""
    lines = ["| | AP | difference | at equal time | to row above | epochs to row 1's AP |", 6 * "|---" + "|"]
    baseline = above = next(iter(runs.values()))
    for name, histories in runs.items():
        rows = []
        for history, other, neighbor in zip(histories, baseline, above):
            goal, times, values = other[-1], *([0, *(row[key] for row in history)] for key in (clock, "AP"))
            reached = next((row["epoch"] for row in history if row["AP"] >= goal["AP"]), math.nan)
            gains = [values[-1], np.interp(goal[clock], times, values)] - np.array(goal["AP"])
            rows.append((values[-1], *gains, values[-1] - neighbor[-1]["AP"], reached))
        final, *others = zip(*rows)
        cells = [f"{np.median(final):.1f} ({min(final):.1f} to {max(final):.1f})", *map(interval, others)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        above = histories
    return "\n".join(lines)


def experiment(options, device):
    """Train every configuration with every seed, each in a folder of its own; runs that are there are
    continued, or kept. Then print a table, and write numbers and figure."""
    names = CONFIGURATIONS if options.command == "ablate" else ("without denoising", "5 groups")
    folder, rates, runs = Path(options.output_dir), RATES[options.anchors], {name: [] for name in names}
    shared = [f"--{name.replace('_', '-')}={getattr(options, name)}"
              for name in ("anchors", "epochs", "batch_size", "train_size", "val_size")]
    for seed, name in itertools.product(options.seeds, names):
        own = [*CONFIGURATIONS[name].split(), f"--lr={rates.get(name, rates['5 groups'])}", f"--seed={seed}"]
        run = folder / "_".join([name, *own, *shared]).replace(" ", "_")
        flags = [f"--resume={run}"] if (run / "last.pt").exists() else [*own, *shared, f"--output-dir={run}"]
        log(f"{name}, seed {seed}, in {run}")
        runs[name].append(train(parse_options(flags), device))
    log(results_table(runs, "cpu_seconds" if device.type == "cpu" else "seconds"))
    path = folder / f"{options.command}-{options.anchors}.json"
    about = {"device": str(device), "torch": torch.__version__, "options": vars(options), "runs": runs}
    write(path, lambda temporary: temporary.write_text(json.dumps(about)))
    # Without the loss, which has more terms with denoising.
    write(path.with_suffix(".png"), draw_curves(runs, list(CURVES)[1:]).savefig)


def main(argv=None):
    try:
        options = parse_options(argv)
        commands = {"train": train, "evaluate": evaluate_checkpoint, "predict": predict}
        commands.get(options.command, experiment)(options, pick_device(options.device))
    except (ValueError, OSError, RuntimeError) as error:
        text = str(error).strip()
        if "DataLoader worker" in text:     # an error while loading images; only its last line is ours
            text = "one of the --workers: " + text.splitlines()[-1].removeprefix("ValueError: ")
        elif isinstance(error, RuntimeError):
            raise
        sys.exit(f"train_toy.py: error: {text}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; continue a training with --resume DIR, an experiment with the same command")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
