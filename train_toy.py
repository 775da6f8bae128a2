"""Train dn_detr.py on shapes drawn on the fly, or on any data set in COCO format.

    python train_toy.py                                 shapes, a few minutes on two CPU cores
    python train_toy.py --dn-groups 0                   the same without denoising: DAB-DETR
    python train_toy.py --coco-train IMAGES_DIR ANNOTATIONS_JSON --coco-val IMAGES_DIR ANNOTATIONS_JSON
    python train_toy.py --coco-train IMAGES_DIR ANNOTATIONS_JSON --overfit 8        try this first
    python train_toy.py --resume runs/shapes            continue after an interruption
    python train_toy.py --evaluate runs/shapes/best.pt
    python train_toy.py --predict runs/shapes/best.pt photo.jpg folder_of_photos
    python train_toy.py --compare                       with and without denoising, 5 seeds
    python train_toy.py --ablate                        the paper's Tables 4 and 5
    torchrun --nproc-per-node 8 train_toy.py ...        several processes, one per GPU

Read train_one_epoch first: its loop is the training step. Sections: 1 data sets, 2 shapes, 3 COCO format,
4 batches, 5 model and optimiser, 6 evaluation, 7 one epoch, 8 a run, 9 pictures, 10 predictions,
11 experiments, and the plumbing: 12 options, 13 processes and devices, 14 main.
"""
import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset
from torchvision import tv_tensors
from torchvision.models import get_model_weights
from torchvision.ops import box_area, box_convert, box_iou, clip_boxes_to_image
from torchvision.transforms import v2
from tqdm import tqdm

import dn_detr
from dn_detr import DNDETR, DNDETRConfig, DNDETRCriterion, matched_objects, postprocess, to_device

# ---- 1. Data sets --------------------------------------------------------------------------------


class DetectionDataset(Dataset):
    """Images with objects, described as in COCO's annotation files. An item is an image, uint8 [3, h, w], and
    its target: labels [n], boxes [n, 4] (cxcywh in [0, 1]), image_id, and size, the (height, width) before
    resizing, in which AP is measured.

    `names` {category id: name} are the classes of the model; a label is the rank of its category id in them.
    Crowds are not trained on. Boxes are clipped to their image, and dropped if nothing is left.
    Augmentation is drawn from (seed, epoch, index): the same in every process, whatever happened before.
    """
    epoch = clipped = dropped = 0

    def __init__(self, data, transform, seed=0, subset=None, names=None):
        # Files may lack these. Ids start at 1, because pycocotools takes the id 0 for "not found".
        for number, annotation in enumerate(data["annotations"], 1):
            area = annotation.get("area") or annotation["bbox"][2] * annotation["bbox"][3]
            annotation |= {"id": number, "iscrowd": annotation.get("iscrowd") or 0, "area": area}
        self.transform, self.seed, self.coco = transform, seed, COCO()
        self.coco.dataset = data
        with redirect_stdout(None):                     # that is, print nothing
            self.coco.createIndex()
        self.names = names or {id: str(category["name"]) for id, category in sorted(self.coco.cats.items())}
        self.label_of = {id: rank for rank, id in enumerate(self.names)}
        if unknown := {annotation["category_id"] for annotation in data["annotations"]} - self.names.keys():
            raise ValueError(f"the checkpoint has no classes for the category ids {sorted(unknown)}")
        self.image_ids = sorted(self.coco.imgs)[:subset]
        self.sizes = [(image["height"], image["width"]) for image in self.coco.loadImgs(self.image_ids)]
        self.labels, self.boxes = map(list, zip(*map(self.clean_objects, self.image_ids, self.sizes)))
        counts = torch.cat(self.labels).bincount(minlength=len(self.names)).tolist()
        self.class_counts = dict(zip(self.names.values(), counts))

    def clean_objects(self, image_id, size):
        """-> labels [n] and boxes [n, 4] (xyxy in pixels) of an image."""
        annotations = [a for a in self.coco.imgToAnns[image_id] if not a["iscrowd"]]
        labels = torch.tensor([self.label_of[a["category_id"]] for a in annotations], dtype=torch.long)
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        inside = clip_boxes_to_image(boxes, size)
        keep = ((inside[:, 2:] - inside[:, :2]) > 0.5).all(1) & boxes.isfinite().all(1)
        self.clipped += int(((inside - boxes).abs() > 1).any(1)[keep].sum())            # less is rounding
        self.dropped += int((~keep).sum())
        return labels[keep], inside[keep]

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        boxes = tv_tensors.BoundingBoxes(self.boxes[index], format="XYXY", canvas_size=self.sizes[index])
        target = {"labels": self.labels[index], "boxes": boxes}
        with torch.random.fork_rng(devices=[]):         # leaves the random numbers of denoising alone
            torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
            image, target = self.transform(tv_tensors.Image(self.load(index)), target)
        boxes = box_convert(target["boxes"].as_subclass(Tensor), "xyxy", "cxcywh").reshape(-1, 4)
        boxes = boxes / torch.tensor(image.shape[-2:]).flip(0).repeat(2)                # w, h, w, h
        about = {"boxes": boxes, "image_id": self.image_ids[index], "size": self.sizes[index]}
        return image.as_subclass(Tensor), target | about


def seed_of(*numbers):
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ---- 2. Shapes: a detection data set out of nothing ----------------------------------------------

SIDE = 64   # pixels of an image
SHAPES = {  # inside the unit box, u to the right and v down; the slack lets tips reach the box's border
    "circle": lambda u, v: u ** 2 + v ** 2 <= 1,
    "square": lambda u, v: np.ones_like(u + v, dtype=bool),
    "triangle": lambda u, v: abs(u) <= (v + 1) / 2 + 0.06,
    "diamond": lambda u, v: abs(u) + abs(v) <= 1.01,
    "cross": lambda u, v: (abs(u) <= 1 / 3) | (abs(v) <= 1 / 3),
    "ring": lambda u, v: (u ** 2 + v ** 2 <= 1) & (u ** 2 + v ** 2 >= 0.3),
}


class ShapesDataset(DetectionDataset):
    """`size` images with up to 12 shapes each. Image i of a (seed, split) is always the same one. All are
    drawn at the start: drawing them again in every epoch would take longer than training on them."""

    def __init__(self, size, seed, split, augment=False):
        self.seeds = [(seed, split == "train", index) for index in range(size)]
        self.images, objects = zip(*(draw_shapes(each, SIDE) for each in self.seeds))
        data = {"images": [{"id": index, "height": SIDE, "width": SIDE} for index in range(size)],
                "categories": [{"id": index, "name": name} for index, name in enumerate(SHAPES)],
                "annotations": [{"image_id": index, "category_id": label, "bbox": box}
                                for index in range(size) for label, box in objects[index]]}
        recolor = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomInvert(), v2.RandomChannelPermutation()])
        super().__init__(data, recolor if augment else v2.Identity(), seed)

    def load(self, index):
        return self.images[index]

    def picture(self, index):
        """The scene, drawn larger than the model sees it: uint8 [3, 256, 256]."""
        return draw_shapes(self.seeds[index], 4 * SIDE)[0]


def draw_shapes(seed, side):
    """-> image uint8 [3, side, side] and its objects, (label, [x, y, w, h] in 64ths of the image). One image
    of twenty is empty, another one has 9 to 12 small shapes, and the others have 1 to 8."""
    rng = np.random.default_rng(seed)
    image, background = draw_background(rng, side)
    kind, scale, objects = rng.random(), side // SIDE, []
    count = 0 if kind < 0.05 else rng.integers(9, 13) if kind < 0.1 else rng.integers(1, 9)
    smallest, largest = (18, 40) if count <= 4 else (15, 30) if count <= 8 else (12, 18)
    for _ in range(20 * count):                     # a shape that overlaps too much gets another chance
        w, h = rng.integers(smallest, largest + 1, 2).tolist()
        x, y = rng.integers(0, (SIDE - w + 1, SIDE - h + 1)).tolist()
        too_close = any(overlap((x, y, w, h), other) > 0.3 for _, other in objects)
        if len(objects) == count or too_close or not 0.6 < w / h < 1.7:
            continue
        label, color = int(rng.integers(len(SHAPES))), rng.uniform(0, 255, 3)
        while (np.linalg.norm(color - background, axis=1) < 110).any():                 # hard to see
            color = rng.uniform(0, 255, 3)
        u, v = ((np.arange(length * scale) + 0.5) / (length * scale) * 2 - 1 for length in (w, h))
        inside = list(SHAPES.values())[label](u, v[:, None])
        image[y * scale:(y + h) * scale, x * scale:(x + w) * scale][inside] = color
        objects.append((label, [x, y, w, h]))
    image += rng.normal(0, 7, image.shape)          # last, so that a scene is the same at every resolution
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous(), objects


def draw_background(rng, side):
    """A gradient with a few strokes that are no objects, float [side, side, 3], and its two colors."""
    v, u = (np.mgrid[:side, :side] + 0.5) * SIDE / side
    first, second = colors = rng.uniform(0, 255, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    blend = ((u * np.cos(angle) + v * np.sin(angle)) / SIDE + 1) / 2
    image = first + (second - first) * blend.clip(0, 1)[..., None]
    for _ in range(rng.integers(0, 5)):
        x, y, angle, length = *rng.uniform(0, SIDE, 2), rng.uniform(0, np.pi), rng.uniform(8, 40)
        along = (u - x) * np.cos(angle) + (v - y) * np.sin(angle)
        across = (u - x) * np.sin(angle) - (v - y) * np.cos(angle)
        image[(abs(along) < length / 2) & (abs(across) < rng.uniform(0.6, 1.2))] = rng.uniform(0, 255, 3)
    return image, colors


def overlap(a, b):
    """Intersection of two xywh boxes over the area of the smaller one."""
    w, h = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return w * h / min(a[2] * a[3], b[2] * b[3])


# ---- 3. Data in COCO format ----------------------------------------------------------------------


class CocoDataset(DetectionDataset):
    """Any data set in COCO format. Raises ValueError that says which file is missing or broken, before
    training starts."""

    def __init__(self, folder, annotation_file, image_size, augment=False, crop=False, **options):
        super().__init__(read_coco(annotation_file), coco_transform(image_size, augment, crop), **options)
        self.paths = [Path(folder) / image["file_name"] for image in self.coco.loadImgs(self.image_ids)]
        missing = [path.name for path in self.paths if not path.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self)} images are not in {folder}, e.g. {missing[0]}")
        if self.clipped > sum(map(len, self.labels)) / 2:
            raise ValueError(f"{annotation_file}: {self.clipped} boxes reach out of their image: are they "
                             "[x0, y0, x1, y1]? A bbox is [x, y, width, height] in pixels")

    def load(self, index):
        image, size = read_image(self.paths[index]), self.sizes[index]
        if image.shape[1:] != size:
            raise ValueError(f"{self.paths[index]} has {tuple(image.shape[1:])} pixels (height, width), not "
                             f"{size} as annotated: was it resized, or turned by its EXIF tag?")
        return image

    picture = load


def read_image(path, upright=False):
    """uint8 [3, H, W] of any image file: as stored, or turned `upright` as its EXIF tag says. Raises
    ValueError if it can't be read."""
    with explain(f"image {path} can't be read", OSError, ValueError, SyntaxError):      # as PIL raises
        image = Image.open(path)
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):              # 16 bits, of which PIL would cut off all above 255
            image = Image.fromarray((np.asarray(image) / 256).astype(np.uint8))
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def read_coco(path):
    """The dict in an annotation file. Raises ValueError that names what is wrong with it."""
    with explain(f"{path} can't be read as JSON", OSError, ValueError):
        data = json.loads(Path(path).read_text())
    with explain(f"{path} is not in COCO format", KeyError, TypeError):
        images = {each["id"]: (each["file_name"], each["height"], each["width"]) for each in data["images"]}
        names = {each["id"]: each["name"] for each in data["categories"]}
        bad = [a for a in data["annotations"] if a["image_id"] not in images or a["category_id"] not in names
               or [isinstance(number, (int, float)) for number in a["bbox"]] != [True] * 4]
    if bad:
        raise ValueError(f"{path}: an annotation needs the image_id of an image, the category_id of a "
                         f"category, and a bbox [x, y, width, height], not {str(bad[0])[:200]}")
    if not images or len(images) < len(data["images"]) or len(names) < len(data["categories"]):
        raise ValueError(f"{path} has no images, or two images or two categories have the same id")
    return data


def coco_transform(image_size, augment=False, crop=False):
    """Resize the shorter side to `image_size`, the longer one to 5/3 of it at most (DETR: 800 and 1333). To
    augment, also mirror and recolor. With `crop`, which takes a long training, also crop and rescale."""
    longest = image_size * 5 // 3
    steps = [v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()] if augment else []
    if not crop:
        return v2.Compose([*steps, v2.Resize(image_size, max_size=longest)])
    sizes = [image_size * sixteenths // 16 for sixteenths in range(10, 17)]
    return v2.Compose([*steps, v2.RandomApply([v2.RandomIoUCrop(min_scale=0.5)], p=0.5),
                       v2.RandomShortestSize(sizes, max_size=longest), v2.SanitizeBoundingBoxes(min_size=1)])


# ---- 4. Batches ----------------------------------------------------------------------------------

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))     # mean and deviation of red, green, blue
MEMORY_FORMAT = torch.channels_last     # convolutions are faster in it, on CPUs and GPUs


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


def normalize(images, padding_mask, device, normalization=IMAGENET):
    """The images of a batch as float, normalised but for the padding, and the mask, both on `device`."""
    mean, deviation = (to_device(x, device) for x in torch.tensor(normalization).view(2, 3, 1, 1))
    images = (to_device(images.to(memory_format=MEMORY_FORMAT), device) - mean) / deviation
    if padding_mask is not None:
        padding_mask = to_device(padding_mask, device)
        images = images.masked_fill(padding_mask[:, None], 0)
    return images, padding_mask


def train_batches(dataset, batch_size, seed, epoch, workers=0, pin_memory=False):
    """One epoch's batches for this process. Seed and epoch decide their order and the augmentation."""
    dataset.epoch = epoch
    sampler = DistributedSampler(dataset, world_size(), rank(), seed=seed)
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size // world_size(), sampler=sampler, collate_fn=collate,
                      num_workers=workers, pin_memory=pin_memory)


def build_datasets(options):
    """-> training and held-out data set. With --overfit they hold the same images."""
    count, size, seed = options.overfit, options.image_size, options.seed
    if options.coco_train:
        subset = count or options.subset
        crop = options.model == "paper" and not count
        train_set = CocoDataset(*options.coco_train, size, not count, crop, seed=seed, subset=subset)
        val_set = train_set if count else CocoDataset(*options.coco_val, size, subset=subset)
        same_classes("--coco-train", train_set.names, "--coco-val", val_set.names)
    else:
        train_set = ShapesDataset(count or options.train_size, seed, "train", augment=not count)
        val_set = train_set if count else ShapesDataset(options.val_size, seed, "val")
    if not sum(map(len, val_set.labels)):
        raise ValueError("the held-out images hold no object, so there is no AP to measure")
    if count:           # repeated, or most of the time would be spent on evaluating after every few steps
        train_set = ConcatDataset([train_set] * math.ceil(200 / len(train_set)))
    return train_set, val_set


def same_classes(source, names, other_source, other_names):
    """Raise ValueError if the categories {id: name} differ: labels would mean different things."""
    if names != other_names:
        raise ValueError(f"the categories differ: {source} has {names}, {other_source} {other_names}")


def describe(dataset, config, image_size, is_random):
    """A line about the training data, and a warning of everything that will not work with them.
    `is_random`: the model starts from random weights, on photographs."""
    counts, per_class = [len(labels) for labels in dataset.labels], dataset.class_counts
    absent = [name for name, count in per_class.items() if not count]
    scales = [min(image_size / min(size), image_size * 5 / 3 / max(size)) for size in dataset.sizes]
    sides = torch.cat([box_area(boxes).sqrt() * scale for boxes, scale in zip(dataset.boxes, scales)])
    stride = 2 ** len(config.small_widths) if config.backbone == "small" else 32
    small = (sides < stride).float().mean().item()
    warnings = (
        (max(counts) > config.num_queries, f"an image has {max(counts)} objects, more than the model has "
         f"queries ({config.num_queries}): raise --num-queries"),
        (absent, f"no training object is a {' or a '.join(absent)}"),
        (0 < len(absent) == len(per_class) - 1, "all objects are of one class: are the category ids right?"),
        (dataset.dropped, f"{dataset.dropped} boxes without area dropped"),
        (dataset.clipped, f"{dataset.clipped} boxes that reached out of their image clipped"),
        (small > 0.1, "objects smaller than a feature cell are hardly found: raise --image-size"),
        (is_random and len(counts) < 1000, f"random weights and {len(counts)} photographs: expect boxes as "
         "large as the image. Start from --backbone resnet50 --pretrained-backbone, or from --init"))
    summary = (f"{len(counts)} training images, {sum(counts)} objects, {np.mean(counts):.1f} per image and "
               f"at most {max(counts)}, {small:.0%} of them smaller than a feature cell of {stride} pixels; "
               + ", ".join(f"{name} {count}" for name, count in per_class.items()))
    return "\n".join([summary, *(f"warning: {text}" for is_true, text in warnings if is_true)])


# ---- 5. Model and optimiser ----------------------------------------------------------------------

TOY = dict(num_queries=25, hidden_dim=64, num_heads=4, num_encoder_layers=0, num_decoder_layers=3,
           dim_feedforward=256, backbone="small", anchor_temperature=20.0, position_frequency=4.0,
           cell_centers=True, loss_class=2.0, dn_groups=3)
TOY_COCO = TOY | dict(num_queries=100, hidden_dim=128, num_encoder_layers=1, dim_feedforward=512,
                      small_widths=(32, 64, 128, 256))


def build_model(options, num_classes):
    """The model that the options describe, with the weights they name."""
    chosen = {name: getattr(options, name) for name in CONFIG_FIELDS if getattr(options, name) is not None}
    if options.init:
        return start_from(options.init, num_classes, chosen)
    sizes = {} if options.model == "paper" else TOY_COCO if options.coco_train else TOY
    config = sizes | chosen | {"num_classes": num_classes, "frozen_norm": options.pretrained_backbone}
    model = DNDETR(DNDETRConfig(**config))
    if options.model == "toy":
        ease_start(model, on_grid=options.anchors == "grid")
    if options.pretrained_backbone:
        load_imagenet(model)
    return model


@torch.no_grad()
def ease_start(model, on_grid=True):
    """An easier start for a small model with random weights; not in the paper. Anchors start `on_grid`,
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
    checkpoint = dn_detr.read_checkpoint(path)
    if "config" not in checkpoint:
        names = dict(enumerate(get_model_weights("fasterrcnn_resnet50_fpn")["COCO_V1"].meta["categories"]))
        about = {"names": names, "image_size": 800, "normalization": IMAGENET, "options": {}}
        return DNDETR.from_official(checkpoint, **overrides), about
    with explain(f"{path} is of another version or configuration", TypeError, RuntimeError, KeyError):
        model = DNDETR(DNDETRConfig(**(checkpoint["config"] | overrides)))
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


def build_optimizer(model, lr, num_steps):
    """AdamW and its schedule: at most 100 steps of warm-up, then linear decay to zero. A pretrained backbone
    has a tenth of the rate, as in the authors' code."""
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


@torch.no_grad()
def evaluate(model, dataset, device, batch_size=8, workers=0, amp=False, normalization=IMAGENET,
             verbose=False):
    """-> metrics (dict), and {image id: (object that each query is matched with or -1 [N], whether its box
    has an IoU of at least 0.5 with it [N])}. On the first process; (None, None) on the others."""
    model.eval()
    shard = Subset(dataset, range(rank(), len(dataset), world_size()))
    loader = DataLoader(shard, batch_size, collate_fn=collate, num_workers=workers)
    anchors = model.anchor_logits.weight.sigmoid().repeat(max(model.config.num_patterns, 1), 1).cpu()
    found = {}      # of each image: detections, matching, and distances from anchors to objects
    for images, padding_mask, targets in progress(loader, "evaluating"):
        with autocast(device, amp):
            outputs = model(*normalize(images, padding_mask, device, normalization))
        results = postprocess(outputs, [target["size"] for target in targets])
        matched = matched_objects(outputs, targets, model.config)                       # [B, N]
        for result, boxes, target, row in zip(results, outputs["pred_boxes"].cpu(), targets, matched):
            query, is_found = (row >= 0).nonzero().flatten(), torch.zeros_like(row, dtype=torch.bool)
            truth = target["boxes"][row[query]]                                         # [R, 4]
            corners = (box_convert(x, "cxcywh", "xyxy") for x in (boxes[query], truth))
            is_found[query] = box_iou(*corners).diagonal() >= 0.5
            distance, image_id = (anchors[query, :2] - truth[:, :2]).norm(dim=1), target["image_id"]
            found[image_id] = (coco_results(image_id, result, dataset.names), (row, is_found),
                               distance.tolist(), distance[is_found[query]].tolist())
    parts = gather(found)
    if parts is None:
        return None, None
    found = {image_id: values for part in parts for image_id, values in part.items()}
    detections, matching, *distances = zip(*found.values())
    metrics = coco_metrics(dataset, list(itertools.chain(*detections)), verbose)
    # How far the learned anchors are from the objects their queries are matched with; in the second
    # number only where the object is found, because bad matches are far from everything.
    for name, values in zip(("anchor_distance", "anchor_distance_found"), distances):
        metrics[name] = mean(list(itertools.chain(*values)))
    return metrics, dict(zip(found, matching))


def mean(values):
    return float(np.mean(values)) if values else None


def coco_results(image_id, result, names):
    """One image's predictions in COCO's result format; a label is a rank in `names` {category id: name}."""
    ids, boxes = list(names), box_convert(result["boxes"], "xyxy", "xywh").tolist()
    return [{"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score}
            for label, box, score in zip(result["labels"].tolist(), boxes, result["scores"].tolist())]


def coco_metrics(dataset, detections, verbose=False):
    """COCO's twelve numbers in percent, of which those by size only if `verbose`, and "AP_per_class",
    {name: AP}. None where there is nothing to measure, as of large objects in small images."""
    with redirect_stdout(None):
        evaluator = COCOeval(dataset.coco, dataset.coco.loadRes(detections), "bbox")
        evaluator.params.imgIds = dataset.image_ids
        if not verbose:             # sizes take three quarters of the time
            evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    with redirect_stdout(sys.stdout if verbose else None):
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1].mean((0, 1))                # of each class
    numbers = [None if x < 0 else 100 * float(x) for x in (*evaluator.stats, *precision)]     # COCO says -1
    names = [dataset.names[id] for id in evaluator.params.catIds]
    return dict(zip(AP_NAMES, numbers)) | {"AP_per_class": dict(zip(names, numbers[len(evaluator.stats):]))}


def class_table(dataset, per_class):
    """AP and number of objects of each class, as text."""
    rows = ((name, "-" if ap is None else f"{ap:.1f}") for name, ap in per_class.items())
    return "\n".join(f"{name:20} AP {ap:>5}, {dataset.class_counts[name]} objects" for name, ap in rows)


def compare_matching(previous, current):
    """Between two epochs: IS (Sec. 3.1), mean over the images, and the percentage of objects that moved
    to another query, among those found both times. IS is low, too, if nothing is found; the percentage is
    not. None for the first epoch."""
    if previous.keys() != current.keys():
        return None, None
    changes, found, stayed = [], 0, 0
    for image_id, (matched, is_found) in current.items():
        old_matched, old_is_found = previous[image_id]
        changes.append(dn_detr.matching_instability(old_matched, matched))
        found += int(torch.isin(matched[is_found], old_matched[old_is_found]).sum())
        stayed += int((is_found & old_is_found & (matched == old_matched)).sum())
    return mean(changes), 100 * (1 - stayed / found) if found else None


# ---- 7. One epoch --------------------------------------------------------------------------------


def train_one_epoch(run, batches, description=""):
    """-> the mean of every loss term, by name. Raises FloatingPointError, naming step and images, if one
    is not finite."""
    run.model.train()
    totals, latest = 0, ("before the first step", {})
    for images, padding_mask, targets in progress(batches, description):
        step = f"step {run.step}, images {[target['image_id'] for target in targets]}"
        # Forward. Denoising draws its noise in here.
        images, padding_mask = normalize(images, padding_mask, run.device)
        try:
            with autocast(run.device, run.amp):
                outputs = run.parallel_model(images, padding_mask, targets)
            losses = run.criterion(outputs, targets)
        except FloatingPointError as error:
            check_finite(*latest)               # was the step before it to blame?
            raise FloatingPointError(f"{step}: {error}") from error
        # Backward. The scaler only acts on float16 gradients.
        run.optimizer.zero_grad()
        run.scaler.scale(losses["loss"]).backward()
        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=0.1)           # the authors' limit
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
        # Losses are read a step late. By then matching has waited for the GPU, so this need not.
        check_finite(*latest)
        if not run.scaler.is_enabled():         # it skips steps with infinite gradients by itself
            losses["gradient_norm"] = norm
        values = torch.stack([value.detach() for value in losses.values()])
        totals = totals + values
        latest = step, dict(zip(losses, values.to("cpu", non_blocking=values.is_cuda)))
        run.step += 1
    means = dict(zip(losses, (totals / len(batches)).tolist()))
    check_finite(*latest)
    return means


def check_finite(step, losses):
    """Raise FloatingPointError unless the losses {name: value} of a step are finite."""
    bad = [name for name, value in losses.items() if not value.isfinite()]
    if bad:
        raise FloatingPointError(f"{step}: {', '.join(bad)} not finite")


def autocast(device, amp):
    return torch.autocast(device.type, amp_dtype(device)) if amp else nullcontext()


def amp_dtype(device):
    """bfloat16, or float16 on GPUs that only emulate bfloat16 (such as Colab's T4)."""
    is_slow = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if is_slow else torch.bfloat16


# ---- 8. A run ------------------------------------------------------------------------------------


class Run:
    """Everything that training changes, and that a checkpoint must therefore hold. Random state is not
    included, because each epoch starts from a seed of its own."""
    STATEFUL = ("model", "optimizer", "schedule", "scaler")
    PLAIN = ("epoch", "step", "seconds", "history", "matching")

    def __init__(self, model, lr, num_steps, device, amp=False):
        self.model, self.device, self.amp = model.to(device), device, amp
        self.model.backbone.to(memory_format=MEMORY_FORMAT)
        self.criterion = DNDETRCriterion(model.config)
        self.optimizer, self.schedule = build_optimizer(model, lr, num_steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp and amp_dtype(device) == torch.float16)
        self.parallel_model = parallel(model, device)
        self.epoch, self.step, self.seconds, self.history, self.matching = 0, 0, 0.0, [], {}

    def state_dict(self):
        return ({name: getattr(self, name).state_dict() for name in self.STATEFUL}
                | {name: getattr(self, name) for name in self.PLAIN})

    def load_state_dict(self, state):
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        for name in self.PLAIN:
            setattr(self, name, state[name])


def train(options, device):
    """A whole run, or the rest of one -> its history, a dict for each epoch. The checkpoint last.pt holds
    all of it; the other files are made from it."""
    run, about, train_set, val_set = start_run(options, device)
    folder = Path(options.output_dir)
    for epoch in range(run.epoch, options.epochs):
        started = time.time()
        torch.manual_seed(seed_of(options.seed, epoch, rank()))         # of the noise and of dropout
        batches = train_batches(train_set, options.batch_size, options.seed, epoch, options.workers,
                                pin_memory=device.type == "cuda")
        losses = train_one_epoch(run, batches, f"epoch {epoch + 1}/{options.epochs}")
        metrics, matching = evaluate(run.model, val_set, device, options.batch_size, options.workers, run.amp)
        run.epoch, run.seconds = epoch + 1, run.seconds + time.time() - started
        if rank() == 0:
            record(run, losses, metrics, matching, options.epochs)
            save(run, about, folder)
    if rank() == 0:
        save_figure(draw_curves({"this run": [run.history]}), folder / "curves.png")
        save_figure(draw_detections({"prediction": run.model}, val_set, device), folder / "detections.png")
        if options.coco_train:
            log(class_table(val_set, run.history[-1]["AP_per_class"]))
        if run.history[-1]["AP"] < 1:
            log(ADVICE)
    return run.history


ADVICE = """AP is below 1. First see with --overfit 8 whether the model can learn a few images by heart.
If it can't, look at the truth in detections.png: are these the objects, in the right places?
If it can, train longer, with another --lr, or from --pretrained-backbone or --init."""


def start_run(options, device):
    """-> the run at its start or as its checkpoint left it, what checkpoints say about it, and its data."""
    folder = Path(options.output_dir)
    if options.batch_size % world_size():
        raise ValueError(f"--batch-size {options.batch_size} can't be shared by {world_size()} processes")
    if (folder / "last.pt").exists() and not options.resume:
        raise ValueError(f"{folder} holds another run: --resume {folder}, or choose another --output-dir")
    train_set, val_set = build_datasets(options)
    image_size = options.image_size if options.coco_train else SIDE
    torch.manual_seed(options.seed)
    if options.resume:
        model, saved = load_detector(folder / "last.pt")
        same_classes("the checkpoint", saved["names"], "the data", val_set.names)
    else:
        model = build_model(options, len(val_set.names))
        fresh = options.coco_train and not (options.init or options.pretrained_backbone or options.overfit)
        log(describe(val_set if options.overfit else train_set, model.config, image_size, fresh))
    if options.no_mask:     # for --ablate: only empty slots are blocked
        model.query_mask = lambda slots, num_queries: F.pad(~slots.is_real, (0, num_queries))[:, None, None]
    num_steps = math.ceil(len(train_set) / options.batch_size) * options.epochs
    run = Run(model, options.lr, num_steps, device, options.amp)
    if options.resume:
        run.load_state_dict(saved)
    about = {"config": dataclasses.asdict(model.config), "names": val_set.names, "image_size": image_size,
             "normalization": IMAGENET, "options": vars(options) | {"resume": None}}
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save(run, about, folder)
    return run, about, train_set, val_set


def record(run, losses, metrics, matching, epochs):
    """Add an epoch to the history, and print its line."""
    denoising = sum(run.criterion.weights[name.removeprefix("dn_").rstrip("_0123456789")] * value
                    for name, value in losses.items() if name.startswith("dn_"))
    instability, moved = compare_matching(run.matching, matching)
    row = {"epoch": run.epoch, "step": run.step, "seconds": run.seconds, **losses,
           "loss_matching": losses["loss"] - denoising, "loss_denoising": denoising, **metrics,
           "instability": instability, "moved": moved, "lr": run.optimizer.param_groups[-1]["lr"]}
    run.matching, run.history = matching, [*run.history, row]
    left = run.seconds / run.epoch * (epochs - run.epoch)
    log(f"epoch {run.epoch:2}/{epochs}  loss {row['loss']:5.2f} (denoising {denoising:5.2f})  "
        f"AP {row['AP']:4.1f}  AP50 {row['AP50']:4.1f}  "
        f"IS {'-' if instability is None else f'{instability:.2f}'}  {run.seconds:.0f} s, {left:.0f} s left")


def save(run, about, folder):
    """Write the checkpoints, and the files made from them. A run killed in between repeats the epoch after
    last.pt and writes the same again; that is why best.pt comes first."""
    state, history = run.state_dict() | about, run.history
    if history and history[-1]["AP"] >= max(row["AP"] for row in history):
        write(folder / "best.pt", lambda path: torch.save(state, path))
    write(folder / "last.pt", lambda path: torch.save(state, path))
    rows = "".join(json.dumps(row) + "\n" for row in history)
    write(folder / "metrics.jsonl", lambda path: path.write_text(rows))
    write(folder / "config.json", lambda path: path.write_text(json.dumps(about, indent=1)))


def write(path, write_to):
    """Write a file so that a process killed at any moment leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    write_to(temporary)
    os.replace(temporary, path)


def evaluate_checkpoint(options, device):
    """--evaluate: COCO's twelve numbers, and AP of each class."""
    model, checkpoint = load_detector(options.evaluate)
    trained, names = checkpoint["options"], checkpoint["names"]
    if paths := options.coco_val or trained.get("coco_val") or trained.get("coco_train"):
        size = options.image_size or checkpoint["image_size"]
        dataset = CocoDataset(*paths, size, subset=options.subset, names=None if trained else names)
    else:
        dataset = ShapesDataset(options.val_size, options.seed, "val")
    same_classes(options.evaluate, names, "the data", dataset.names)
    metrics, _ = evaluate(model.to(device), dataset, device, options.batch_size, options.workers, options.amp,
                          checkpoint["normalization"], verbose=True)
    if metrics:
        log(class_table(dataset, metrics["AP_per_class"]))


# ---- 9. Pictures ---------------------------------------------------------------------------------

# Okabe and Ito's colors, which colour-blind readers can tell apart too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
METRICS = {"loss": "loss", "AP": "AP, %", "AP50": "AP50, %", "instability": "instability IS",
           "moved": "found objects that moved, %", "anchor_distance_found": "anchor to found object"}


def pyplot():
    """matplotlib.pyplot in the one style of this project's figures."""
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True})
    return plt


def save_figure(figure, path):
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    pyplot().close(figure)


def draw_curves(runs, metrics=tuple(METRICS)):
    """Metrics over the epochs of {name: [history of each seed]}: medians, in bands from least to most."""
    figure, axes = pyplot().subplots(1, len(metrics), figsize=(3.2 * len(metrics), 2.8), squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for (name, histories), color in zip(runs.items(), COLORS):
            values = np.array([[row[metric] for row in history] for history in histories], dtype=float)
            epochs = range(1, values.shape[1] + 1)
            axis.plot(epochs, np.median(values, 0), "o-", color=color, markersize=3, label=name)
            axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15)
        axis.set(xlabel="epoch", title=METRICS[metric], ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    return figure


@torch.no_grad()
def draw_detections(models, dataset, device, columns=6, threshold=0.5):
    """The first images that hold something: the truth in the first row, and below it what each of `models`
    {name: model} finds. Misses and false detections are red."""
    shown = [index for index in range(len(dataset)) if len(dataset.labels[index])][:columns]
    rows, names = 1 + len(models), list(dataset.names.values())
    figure, axes = pyplot().subplots(rows, len(shown), figsize=(2.6 * len(shown), 2.8 * rows), squeeze=False)
    for (first, *others), index in zip(axes.T, shown):
        image, _ = dataset[index]
        picture, labels = dataset.picture(index), dataset.labels[index]
        boxes = dataset.boxes[index] * picture.shape[1] / dataset.sizes[index][0]       # in its pixels
        first.imshow(draw_boxes(picture, boxes, [names[label] for label in labels], map(color_of, labels)))
        for axis, model in zip(others, models.values()):
            result = postprocess(model.eval()(*normalize(image[None], None, device)), [picture.shape[1:]])[0]
            axis.imshow(draw_boxes(picture, *judge(result, labels, boxes, names, threshold)))
    for axis, title in zip(axes[:, 0], ("truth", *(f"{name}, score > {threshold}" for name in models))):
        axis.set_title(title, loc="left", fontweight="bold")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def color_of(label):
    return COLORS[int(label) % len(COLORS)]


def judge(result, true_labels, true_boxes, names, threshold):
    """-> boxes, texts and colors of an image's confident detections, and of the objects they missed."""
    keep, texts, colors = result["scores"] > threshold, [], []
    labels, scores, boxes = (result[key][keep].cpu() for key in ("labels", "scores", "boxes"))
    fits = (labels[:, None] == true_labels) & (box_iou(boxes, true_boxes) >= 0.5)      # [detections, objects]
    is_missed = torch.ones(len(true_labels), dtype=torch.bool)
    for label, score, row in zip(labels, scores, fits):
        new = (row & is_missed).nonzero()[:1]
        is_missed[new] = False
        texts.append(f"{names[label]} {score:.2f}{'' if len(new) else ' again' if row.any() else ' wrong'}")
        colors.append(color_of(label) if len(new) else "red")
    texts += [f"{names[label]} missed" for label in true_labels[is_missed]]
    return torch.cat([boxes, true_boxes[is_missed]]), texts, colors + ["red"] * int(is_missed.sum())


def draw_boxes(picture, boxes, texts, colors):
    """A picture uint8 [3, H, W] with boxes [n, 4] (xyxy in its pixels), each with a text and a color, as a
    PIL image."""
    image, size = v2.functional.to_pil_image(picture), max(picture.shape) // 20
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for (x0, y0, x1, y1), text, color in zip(boxes.tolist(), texts, colors):
        draw.rectangle((x0, y0, x1, y1), outline=color, width=1 + size // 6)
        draw.rectangle(draw.textbbox((x0, y0), text, font), fill=color)
        draw.text((x0, y0), text, "white", font)
    return image


# ---- 10. Predictions -----------------------------------------------------------------------------


@torch.no_grad()
def predict(options, device):
    """--predict: a picture with boxes for every image, and all detections in predictions.json. A folder
    stands for the images in it. Returns the number of images that can't be read."""
    (checkpoint_path, *given), folder = options.predict, Path(options.output_dir)
    model, checkpoint = load_detector(checkpoint_path)
    model, names = model.to(device).eval(), checkpoint["names"]
    transform = coco_transform(options.image_size or checkpoint["image_size"], augment=False)
    known, paths, results, unread = Image.registered_extensions(), [], [], 0
    for path in map(Path, given):
        inside = [file for file in path.glob("*") if file.suffix.lower() in known]
        paths += sorted(inside) if path.is_dir() else [path]
    if not paths:
        raise ValueError("--predict needs images after the checkpoint, or a folder that holds some")
    stems = [path.stem for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    for image_id, path in enumerate(progress(paths, "predicting"), 1):
        try:
            image = read_image(path, upright=True)
        except ValueError as error:
            log(str(error))
            unread += 1
            continue
        images, _ = normalize(transform(image)[None], None, device, checkpoint["normalization"])
        result = postprocess(model(images), [image.shape[1:]])[0]
        results += [row | {"file_name": str(path)} for row in coco_results(image_id, result, names)]
        shown = int((result["scores"] >= options.threshold).sum())                      # best first
        labels, scores = (result[key][:shown].tolist() for key in ("labels", "scores"))
        texts = [f"{list(names.values())[label]} {score:.2f}" for label, score in zip(labels, scores)]
        picture = draw_boxes(image, result["boxes"][:shown], texts, map(color_of, labels))
        is_unique = stems.count(path.stem) == 1
        picture.save(folder / (f"{path.stem}.png" if is_unique else f"{path.stem}-{image_id}.png"))
    write(folder / "predictions.json", lambda temporary: temporary.write_text(json.dumps(results)))
    log(f"{len(paths) - unread} pictures and predictions.json are in {folder}")
    return unread


# ---- 11. Experiments: many runs, side by side ----------------------------------------------------

ARMS = {  # the first one is the baseline
    "without denoising": dict(dn_groups=0),
    "1 group, boxes only": dict(dn_groups=1, label_noise=0.0),
    "1 group": dict(dn_groups=1),
    "1 group, no mask": dict(dn_groups=1, no_mask=True),
    "2 groups": dict(dn_groups=2),
    "5 groups": dict(dn_groups=5),
    "10 groups": dict(dn_groups=10),
}
RATES = {"normal": (1e-3, 2e-3), "grid": (2e-3, 3e-3)}     # best without and with denoising, see the README


def experiment(options, device):
    """--compare and --ablate: train every arm with every seed, several at a time, each in a folder of its
    own; finished runs are kept, stopped ones continue. Then print a table, and write numbers and figure."""
    arms = ARMS if options.ablate else {arm: ARMS[arm] for arm in ("without denoising", "5 groups")}
    given, anchors, plan = vars(options), options.anchors, {}
    shared = {key: given[key] for key in ("anchors", "epochs", "batch_size", "train_size", "val_size")}
    for seed, (arm, settings) in itertools.product(options.seeds, arms.items()):
        folder = f"{anchors} anchors, {arm}, seed {seed}".replace(",", "").replace(" ", "-")
        own = {"seed": seed, "lr": RATES[anchors][settings["dn_groups"] > 0],
               "output_dir": f"{options.output_dir}/{folder}"}
        plan[arm, seed] = vars(parse_options([])) | shared | settings | own
    jobs = options.jobs or (os.cpu_count() if device.type == "cpu" else 1)
    context, threads = multiprocessing.get_context("spawn"), max(1, os.cpu_count() // jobs)
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        # If a run fails, and at Ctrl-C, map cancels the runs that have not started.
        done = pool.map(run_quietly, plan.values(), itertools.repeat(device))
        histories = dict(zip(plan, list(tqdm(done, f"{anchors} anchors", len(plan), unit="run"))))
    runs = {arm: [histories[arm, seed] for seed in options.seeds] for arm in arms}
    print_table(runs, options.seeds)
    path = Path(options.output_dir) / f"{'ablate' if options.ablate else 'compare'}-{anchors}.json"
    about = {"device": str(device), "cores": os.cpu_count(), "torch": torch.__version__, "options": given}
    write(path, lambda temporary: temporary.write_text(json.dumps(about | {"runs": runs})))
    # Without the loss, which has more terms with denoising.
    save_figure(draw_curves(runs, list(METRICS)[1:]), path.with_suffix(".png"))


def run_quietly(settings, device):
    """One run of an experiment, in a process of its own -> its history. What it prints is in log.txt."""
    options, folder = argparse.Namespace(**settings), Path(settings["output_dir"])
    if (folder / "last.pt").exists():
        saved = dn_detr.read_checkpoint(folder / "last.pt")
        if saved["options"] != settings:
            raise ValueError(f"{folder} holds a run with other options: remove it, or change --output-dir")
        if saved["epoch"] == options.epochs:
            return saved["history"]
        options.resume = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as file, redirect_stdout(file), redirect_stderr(file):
        return train(options, device)


def print_table(runs, seeds):
    """What each arm reached: median and range. How it differs from the baseline, and when it reached the
    baseline's final AP: mean and 95 % interval of the differences between runs with the same seed."""
    goals = {seed: history[-1]["AP"] for seed, history in zip(seeds, runs["without denoising"])}
    learned = [seed for seed in seeds if goals[seed] > np.median(list(goals.values())) / 2]
    for kept in [seeds] if learned in (seeds, []) else [seeds, learned]:
        print(f"\nseeds {kept}; reaching the final AP without denoising took:\n\n"
              "| | AP | AP50 | difference in AP | epochs | steps | seconds |\n|---|---|---|---|---|---|---|")
        for arm, histories in runs.items():
            pairs = [(history, goals[seed]) for seed, history in zip(seeds, histories) if seed in kept]
            cells = [spread([history[-1][key] for history, _ in pairs]) for key in ("AP", "AP50")]
            cells.append(interval([history[-1]["AP"] - goal for history, goal in pairs]))
            reached = [next((row for row in history if row["AP"] >= goal), None) for history, goal in pairs]
            cells += ["not by all" if None in reached else interval([row[key] for row in reached])
                      for key in ("epoch", "step", "seconds")]
            print(f"| {arm} | {' | '.join(cells)} |")


def spread(values):
    return f"{np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def interval(values):
    """Mean and the half width of its 95 % interval, Student's t over the seeds."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else math.nan
    return f"{np.mean(values):.1f} ± {half:.1f}"


# ---- 12. Options ---------------------------------------------------------------------------------

TOY_RUN = dict(batch_size=8, workers=0, seed=0, model="toy", anchors="grid")
DEFAULTS = {  # of each mode
    "shapes": TOY_RUN | dict(epochs=8, lr=3e-3, train_size=3200, val_size=300, output_dir="runs/shapes"),
    "coco": TOY_RUN | dict(epochs=50, lr=1e-3, image_size=256, workers=2, output_dir="runs/coco"),
    "overfit": TOY_RUN | dict(epochs=6, lr=1e-3, image_size=256, batch_size=4, output_dir="runs/overfit"),
    "experiment": dict(epochs=12, batch_size=8, train_size=800, val_size=200, anchors="normal",
                       seeds=[0, 1, 2, 3, 4], output_dir="runs/experiment"),
    "evaluate": dict(batch_size=8, val_size=300, workers=2, seed=0),
    "predict": dict(threshold=0.3, output_dir="runs/predictions"),
    "resume": dict(),
}
TRAIN, ALL = "shapes coco overfit", "shapes coco overfit experiment evaluate predict resume"
TEXT, INT, FLOAT, SWITCH = dict(type=str), dict(type=int), dict(type=float), dict(action="store_true")
OPTIONS = {  # name: (how argparse reads it, least value, modes in which it has an effect, help)
    "epochs": (INT, 1, TRAIN + " experiment", "passes over the training images"),
    "batch_size": (INT, 1, TRAIN + " experiment evaluate", "images a step, over all processes"),
    "lr": (FLOAT, 1e-9, TRAIN, "learning rate; 1e-4 with --model paper and --init, else"),
    "seed": (INT, 0, TRAIN + " evaluate", "decides weights, shapes, order, augmentation and noise"),
    "train_size": (INT, 1, "shapes experiment", "training images of shapes"),
    "val_size": (INT, 1, "shapes experiment evaluate", "held-out images of shapes"),
    "overfit": (INT, 1, "overfit", "learn only the first N training images, and evaluate on them"),
    "output_dir": (TEXT, None, TRAIN + " experiment predict", "where the files go"),
    "device": (TEXT, None, ALL, "cuda, mps or cpu; the first that is there"),
    "workers": (INT, 0, TRAIN + " evaluate resume", "processes that load images"),
    "amp": (SWITCH, None, TRAIN + " evaluate", "bfloat16 where the device has it, else float16"),
    "coco_train": (dict(nargs=2), None, "coco overfit", "folder of images, and annotations in COCO format"),
    "coco_val": (dict(nargs=2), None, "coco evaluate", "the same for the held-out images"),
    "subset": (INT, 1, "coco evaluate", "only the first N images"),
    "image_size": (INT, 64, "coco overfit evaluate predict", "short side (paper: 800); the checkpoint's, or"),
    "model": (dict(choices=("toy", "paper")), None, TRAIN, "for minutes, or the paper's R50"),
    "anchors": (dict(choices=("grid", "normal")), None, TRAIN + " experiment", "initial ones; paper: normal"),
    "pretrained_backbone": (SWITCH, None, TRAIN, "ImageNet weights (downloaded)"),
    "init": (TEXT, None, TRAIN, "start from a checkpoint, ours or the authors'"),
    "no_mask": (SWITCH, None, TRAIN, "no attention mask, only empty slots are blocked"),
    "resume": (TEXT, None, "resume", "continue the run in this folder, with its options"),
    "evaluate": (TEXT, None, "evaluate", "a checkpoint, ours or the authors'"),
    "predict": (dict(nargs="+"), None, "predict", "a checkpoint, then images and folders of images"),
    "threshold": (FLOAT, 0, "predict", "lowest score in pictures"),
    "compare": (SWITCH, None, "experiment", "with and without denoising"),
    "ablate": (SWITCH, None, "experiment", "kinds of noise, mask, numbers of groups"),
    "seeds": (INT | dict(nargs="+"), 0, "experiment", "of the runs of each arm"),
    "jobs": (INT, 1, "experiment", "runs at a time; otherwise one per CPU core, or one on a GPU"),
}
MODES = {"resume": "resume", "evaluate": "evaluate", "predict": "predict", "compare": "experiment",
         "ablate": "experiment", "overfit": "overfit", "coco_train": "coco", "coco_val": "coco"}
CONFIG_FIELDS = {field.name: field.type for field in dataclasses.fields(DNDETRConfig)
                 if field.type in (int, float, str) and field.name != "num_classes"}
OPTIONS |= {name: (dict(type=kind), None, TRAIN, "see DNDETRConfig") for name, kind in CONFIG_FIELDS.items()}


def parse_options(argv=None):
    """All options with their defaults. Ends the program for wrong ones, and for those without effect."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = lambda name: "--" + name.replace("_", "-")
    for name, (how, _, _, text) in OPTIONS.items():
        known = ", ".join(f"{mode} {values[name]}" for mode, values in DEFAULTS.items() if name in values)
        parser.add_argument(flag(name), help=text + (f" (default: {known})" if known else ""), **how)
    said = vars(parser.parse_args(argv))
    mode = next((MODES[name] for name in MODES if name in said), "shapes")
    of_model = said.keys() & {"model", "anchors", "pretrained_backbone"} if "init" in said else ()
    for name, value in said.items():
        _, least, modes, _ = OPTIONS[name]
        if mode not in modes.split() or name in of_model:
            parser.error(f"{flag(name)} has no effect here: drop it")
        if least is not None and not np.min(value) >= least:
            parser.error(f"{flag(name)} is {value}, it must be at least {least}")
    if mode == "coco" and not {"coco_train", "coco_val"} <= said.keys():
        parser.error("training needs --coco-train and --coco-val: AP is measured on images it has not seen")
    options = {name: False if how is SWITCH else None for name, (how, *_) in OPTIONS.items()}
    options |= DEFAULTS[mode] | ({"lr": 1e-4} if "init" in said or said.get("model") == "paper" else {})
    if mode == "resume":
        try:
            options |= dn_detr.read_checkpoint(Path(said["resume"]) / "last.pt")["options"]
        except (ValueError, KeyError) as error:
            parser.error(f"there is no run to continue: {error}")
        options |= {"output_dir": said["resume"], "device": None}
    return argparse.Namespace(**(options | said))


# ---- 13. Processes and devices: nothing here is about detection ----------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


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


def gather(value):
    """A list of every process's `value` on the first process, None on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def parallel(model, device):
    """The model, with its gradients averaged over the processes."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model), [device])
    return nn.parallel.DistributedDataParallel(model)


def pick_device(name=None):
    """The device of that name, or the best there is; joins the other processes if torchrun started some."""
    has_mps = torch.backends.mps.is_available()
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if "RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    with explain(f"--device {name} can't be used here", RuntimeError, AssertionError, NotImplementedError):
        return torch.zeros(1, device=name).device


# ---- 14. Main ------------------------------------------------------------------------------------


def main(argv=None):
    options = parse_options(argv)
    try:
        device = pick_device(options.device)
        if options.compare or options.ablate:
            experiment(options, device)
        elif options.evaluate:
            evaluate_checkpoint(options, device)
        elif options.predict:
            sys.exit(1 if predict(options, device) else 0)
        else:
            train(options, device)
            log(f"curves.png, detections.png, metrics.jsonl and checkpoints are in {options.output_dir}")
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"train_toy.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; continue a run with --resume DIR, an experiment with the same command")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
