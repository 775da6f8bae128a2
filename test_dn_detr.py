"""Tests of dn_detr.py: `pytest test_dn_detr.py`, on a CPU, without network, in about half a minute.

Each test is named after the property it protects, and was seen to fail on the bug it is there
for. Results are compared with a naive loop, a case worked by hand, or the authors' own numbers.
"""
import argparse
import ast
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import tokenize
import types
import urllib.error
import warnings
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d, box_convert

import dn_detr
import train_toy
from dn_detr import (
    DNDETR,
    DenoisingSlots,
    DNDETRConfig,
    DNDETRCriterion,
    FrozenBatchNorm,
    assign_slots,
    build_backbone,
    check_targets,
    dn_attention_mask,
    generalized_iou,
    grid_anchors,
    inverse_sigmoid,
    match,
    matched_objects,
    matching_cost,
    matching_instability,
    mean_over_processes,
    noise_boxes,
    noise_labels,
    pixel_coordinates,
    postprocess,
    sine_encoding,
)

FILE = Path(dn_detr.__file__)
SOURCE = FILE.read_text()
TREE = ast.parse(SOURCE)
CLASSES = 5
TINY = dict(num_classes=CLASSES, num_queries=7, hidden_dim=32, num_heads=4, num_encoder_layers=1,
            num_decoder_layers=2, dim_feedforward=48, backbone="small", small_widths=(8, 16, 32),
            dn_groups=2)
NO_NOISE = dict(label_noise=0, center_noise=0, size_noise=0)


# ---------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def same_seed_for_every_test():
    torch.manual_seed(0)


def tiny_model(**options):
    """A small model whose boxes depend on its contents (a fresh one starts them at the anchors)."""
    torch.manual_seed(0)
    model = DNDETR(DNDETRConfig(**(TINY | options)))
    nn.init.normal_(model.box_head.layers[-1].weight, std=0.2)
    return model


def patch_model(**options):
    """A tiny model that sees 8 x 8 patches: no batch norm and no border effect couples anything."""
    model = tiny_model(**options)
    model.backbone = nn.Conv2d(3, TINY["small_widths"][-1], kernel_size=8, stride=8)
    return model


def random_targets(*counts, seed=0):
    """Targets for images with these numbers of objects."""
    generator = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(CLASSES, (count,), generator=generator),
             "boxes": torch.rand(count, 4, generator=generator) * 0.3
             + torch.tensor([0.35, 0.35, 0.1, 0.1])} for count in counts]


def random_images(batch_size=2, height=32, width=32):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))


def run(model, images, targets=None, padding_mask=None):
    """One forward pass in the mode the model is in, with noise that is the same every time."""
    torch.manual_seed(0)
    return model(images, padding_mask, targets)


def edit_denoising(model, edit):
    """From now on the model's noised copies are (content, anchors) = edit(content, anchors)."""
    original = model.denoising_queries

    def edited(targets, device):
        slots, content, anchors = original(targets, device)
        return slots, *edit(content, anchors)
    model.denoising_queries = edited


def random_predictions(layers=2, images=2, queries=4, seed=0):
    """-> logits [L, B, N, C], boxes [L, B, N, 4]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, images, queries, CLASSES, generator=generator)
    boxes = torch.rand(layers, images, queries, 4, generator=generator) * 0.3 + 0.2
    return logits, boxes


def as_outputs(logits, boxes, **more):
    return {"pred_logits": logits[-1], "pred_boxes": boxes[-1],
            "all_logits": logits, "all_boxes": boxes, **more}


def naive_giou(a, b):
    """Of two cxcywh boxes, in plain numbers."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / (union + 1e-6) - (hull - union) / (hull + 1e-6)   # the authors' epsilon


def naive_focal(logit, is_object, alpha, gamma):
    p = 1 / (1 + math.exp(-logit))
    if is_object:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p ** gamma * math.log(1 - p)


def naive_l1(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


def naive_cost(logits, box, label, truth, config):
    """What it costs to match one query (logits [C], box [4]) with one object."""
    alpha, gamma = config.focal_alpha, config.focal_gamma
    focal = (naive_focal(logits[label], True, alpha, gamma)
             - naive_focal(logits[label], False, alpha, gamma))
    return (config.cost_class * focal + config.cost_box * naive_l1(box, truth)
            - config.cost_giou * naive_giou(box, truth))


def cheapest_permutation(logits, boxes, target, config):
    """{query: object} of one image, by trying every way to give each object a query of its own."""
    logits, boxes = logits.tolist(), boxes.tolist()
    labels, truth = target["labels"].tolist(), target["boxes"].tolist()

    def total(queries):
        return sum(naive_cost(logits[query], boxes[query], labels[index], truth[index], config)
                   for index, query in enumerate(queries))
    best = min(itertools.permutations(range(len(boxes)), len(labels)), key=total)
    return {query: index for index, query in enumerate(best)}


def pairs_as_dicts(pairs, layer, targets):
    """Pairs -> one {query: object of the image} per image."""
    first = list(itertools.accumulate([0] + [len(target["labels"]) for target in targets]))
    owners = [{} for _ in targets]
    for image, query, source in zip(*(x[layer].tolist() for x in pairs)):
        owners[image][query] = source - first[image]
    return owners


def assert_uniform(values, low, high):
    """Spread evenly from low to high, reaching both ends, beyond neither (Kolmogorov-Smirnov)."""
    values, count = values.double().sort().values, values.numel()
    assert values[0] >= low - 1e-6 and values[-1] <= high + 1e-6
    assert values[0] < low + 0.01 * (high - low) and values[-1] > high - 0.01 * (high - low)
    expected = torch.linspace(low, high, count, dtype=torch.float64)
    assert (values - expected).abs().max() < 2 / math.sqrt(count) * (high - low)


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(num_classes=0), "num_classes is 0"), (dict(num_queries=0), "num_queries is 0"),
    (dict(num_heads=0), "num_heads is 0"), (dict(hidden_dim=-4), "hidden_dim is -4"),
    (dict(num_decoder_layers=0), "num_decoder_layers is 0"),
    (dict(dim_feedforward=0), "dim_feedforward is 0"),
    (dict(dn_size_multiple=0), "dn_size_multiple is 0"),
    (dict(num_encoder_layers=-1), "num_encoder_layers is -1"),
    (dict(num_patterns=-2), "num_patterns is -2"), (dict(dn_groups=-1), "dn_groups is -1"),
    (dict(dn_max_queries=-9), "dn_max_queries is -9"),
    (dict(label_noise=1.5), "label_noise is 1.5"), (dict(label_noise=-0.1), "label_noise is -0.1"),
    (dict(center_noise=1.01), "center_noise is 1.01"), (dict(size_noise=-1), "size_noise is -1"),
    (dict(size_noise=float("nan")), "size_noise is nan"),
    (dict(hidden_dim=32, num_heads=5), "hidden_dim 32 must be divisible by num_heads 5"),
    (dict(hidden_dim=6, num_heads=3), "hidden_dim 6 must be divisible .* by 4"),
    (dict(activation="swish"), "activation is 'swish', choose one of prelu, relu, gelu"),
    (dict(anchor_start="circle"), "anchor_start is 'circle', choose one of normal, grid"),
    (dict(dropout=1.0), "dropout is 1.0"), (dict(image_temperature=0), "image_temperature is 0"),
    (dict(anchor_temperature=-1), "anchor_temperature is -1"),
    (dict(position_frequency=0), "position_frequency is 0"), (dict(small_widths=()), "small_widths is empty"),
    (dict(local_start=True), "anchor_temperature 10000.0 must be image_temperature 20.0"),
    (dict(backbone="resnet34", dilation=True), "needs resnet50 or a larger ResNet, not 'resnet34'")])
def test_impossible_configurations_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DNDETRConfig(**options)


def test_every_knob_of_the_configuration_is_read():
    read = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("config", "self.config")}
    assert read == set(DNDETRConfig.__dataclass_fields__)


@pytest.mark.parametrize("options", [
    dict(hidden_dim=24, num_heads=3), dict(num_encoder_layers=0), dict(num_decoder_layers=1),
    dict(num_classes=1), dict(num_queries=1), dict(activation="gelu"), dict(activation="relu"),
    dict(dropout=0.1), dict(dn_groups=0), dict(dn_groups=1), dict(label_noise=1.0),
    dict(num_patterns=2), dict(small_widths=(8,)), dict(**NO_NOISE), dict(backbone="resnet18")],
    ids=str)
def test_a_training_step_works_for_every_choice(options):
    model = tiny_model(**options)
    targets = random_targets(1, 3)
    for target in targets:
        target["labels"] = target["labels"].clamp(max=model.config.num_classes - 1)
    losses = DNDETRCriterion(model.config)(run(model, random_images(), targets), targets)
    losses["loss"].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert losses["loss"].isfinite() and model.class_head.weight.grad.abs().sum() > 0


def test_dropout_acts_in_training_only():
    model = patch_model(dropout=0.5)
    images = random_images()
    assert not torch.equal(model(images)["pred_logits"], model(images)["pred_logits"])
    model.eval()
    assert torch.equal(model(images)["pred_logits"], model(images)["pred_logits"])


# ---------------------------------------------------------------------------------------------
# Boxes and targets
# ---------------------------------------------------------------------------------------------


def test_inverse_sigmoid_undoes_the_sigmoid():
    logits = torch.linspace(-6.8, 6.8, 50, dtype=torch.float64)
    assert_close(inverse_sigmoid(logits.sigmoid()), logits)


def test_inverse_sigmoid_is_clamped_at_one_thousandth():
    values = inverse_sigmoid(torch.tensor([-3.0, 0.0, 0.0005, 0.25, 0.9995, 1.0, 2.0]))
    low, high = math.log(0.001), -math.log(0.001)
    expected = [low, low, math.log(0.001 / 0.9995), math.log(1 / 3), math.log(0.9995 / 0.001),
                high, high]
    assert_close(values, torch.tensor(expected))


def test_generalized_iou_by_hand():
    square = torch.tensor([1.0, 1.0, 2.0, 2.0])                # x 0..2, y 0..2
    others = torch.tensor([[1.0, 1.0, 2.0, 2.0],               # itself
                           [2.0, 1.0, 2.0, 2.0],               # half beside it: 2 of 6, no gap
                           [1.5, 1.0, 1.0, 1.0],               # inside it: 1 of 4
                           [4.0, 1.0, 2.0, 2.0],               # apart: the hull of 10 holds 8
                           [1.0, 3.5, 2.0, 1.0],               # below: the hull of 8 holds 6
                           [3.0, 3.0, 2.0, 2.0]])              # diagonal: the hull of 16 holds 8
    expected = torch.tensor([1, 1 / 3, 1 / 4, -2 / 10, -2 / 8, -8 / 16])
    assert_close(generalized_iou(square, others), expected, rtol=0, atol=1e-5)
    assert_close(generalized_iou(others, square), expected, rtol=0, atol=1e-5)
    assert generalized_iou(others[:, None], others[None]).shape == (6, 6)


def test_generalized_iou_has_the_epsilon_of_the_authors():
    box = torch.tensor([0.5, 0.5, 0.001, 0.001])               # an area as large as the epsilon
    assert_close(generalized_iou(box, box), torch.tensor(0.5), rtol=1e-3, atol=0)


def test_generalized_iou_of_random_boxes_is_the_naive_one():
    boxes = torch.rand(2, 30, 4, dtype=torch.float64) * 0.5 + 0.05
    expected = [naive_giou(a, b) for a, b in zip(*boxes.tolist())]
    assert_close(generalized_iou(*boxes), torch.tensor(expected, dtype=torch.float64))


GOOD = [0.5, 0.5, 0.2, 0.2]


@pytest.mark.parametrize("labels, boxes, message", [
    ([1], [[0.2, 0.2, 0.9, 0.9]], r"targets\[1\].*0\.2, 0\.2, 0\.9, 0\.9.*\(x0, y0, x1, y1\)"),
    ([1], [[0.7, 0.1, 0.9, 0.2]], r"0\.7, 0\.1, 0\.9, 0\.2.*reaches out"),
    ([1], [[0.1, 0.7, 0.2, 0.9]], r"0\.1, 0\.7, 0\.2, 0\.9.*reaches out"),
    ([1], [[0.1, 0.1, 0.4, 0.2]], r"0\.1, 0\.1, 0\.4, 0\.2.*reaches out"),
    ([1], [[120.0, 80.0, 30.0, 20.0]], r"120\.0, 80\.0, 30\.0, 20\.0.*pixels"),
    ([1, 2], [GOOD, [-0.3, 0.5, 0.2, 0.2]], r"-0\.3, 0\.5.*outside \[0, 1\]"),
    ([1], [[0.5, float("nan"), 0.2, 0.2]], r"nan.*not finite"),
    ([1], [[0.5, 0.5, float("inf"), 0.2]], r"inf.*not finite"),
    ([1], [[0.5, 0.5, 0.0, 0.2]], r"0\.0, 0\.2.*no area"),
    ([1], [[0.5, 0.5, 0.2, -0.0005]], r"-0\.0005.*no area"),
    ([CLASSES], [GOOD], rf"targets\[1\] has label {CLASSES}, .*num_classes - 1 = {CLASSES - 1}"),
    ([2, -1], [GOOD, GOOD], "has label -1"),
    ([1, 2], [GOOD], r"\[2, 4\] for its 2 labels.*\[1, 4\]"),
    ([1], [GOOD[:3]], r"\[1, 3\]"), ([1.0], [GOOD], "must be long.*float32"),
    ([[1]], [GOOD], r"must be long of shape \[n\].*\[1, 1\]"),
    ([1], [[0, 0, 1, 1]], "must be float.*int64")])
def test_impossible_targets_are_refused_by_value(labels, boxes, message):
    targets = [*random_targets(2), {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}]
    with pytest.raises(ValueError, match=message):
        check_targets(targets, 2, CLASSES)


def test_targets_without_labels_or_boxes_are_refused():
    for target in ({"boxes": torch.zeros(0, 4)}, {"labels": [1], "boxes": [GOOD]}, None, "labels"):
        with pytest.raises(ValueError, match=r"targets\[0\] must be a dict with tensors 'labels' and"):
            check_targets([target], 1, CLASSES)


def test_boxes_at_the_border_and_empty_images_are_accepted():
    # annotators round, and some leave boxes that stick out: these can't be (x0, y0, x1, y1)
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.9, 0.95, 0.4, 0.2]])
    check_targets([{"labels": torch.tensor([0, CLASSES - 1]), "boxes": boxes},
                   *random_targets(0)], 2, CLASSES)


def test_model_and_criterion_check_their_targets():
    model = tiny_model()
    targets = random_targets(1, 1)
    outputs = run(model, random_images(), targets)
    targets[1]["labels"] = torch.tensor([CLASSES])
    with pytest.raises(ValueError, match=f"has label {CLASSES}"):
        model(random_images(), targets=targets)
    with pytest.raises(ValueError, match=f"has label {CLASSES}"):
        DNDETRCriterion(model.config)(outputs, targets)
    with pytest.raises(ValueError, match="3 targets for a batch of 2"):
        DNDETRCriterion(model.config)(outputs, random_targets(1, 1, 1))


def test_the_model_refuses_targets_for_another_number_of_images():
    with pytest.raises(ValueError, match="1 targets for a batch of 2"):
        tiny_model()(random_images(2), targets=random_targets(1))


@pytest.mark.parametrize("images, mask, message", [
    (torch.rand(3, 32, 32), None, r"\[B, 3, H, W\].*\[3, 32, 32\]"),
    (torch.rand(2, 1, 32, 32), None, r"\[2, 1, 32, 32\]"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, "uint8"),
    (torch.zeros(0, 3, 32, 32), None, r"\[0, 3, 32, 32\]"),
    (torch.zeros(2, 3, 0, 32), None, r"\[2, 3, 0, 32\]"),
    (torch.zeros(2, 3, 32, 32).half(), None, "images are torch.float16 and the weights torch.float32"),
    (torch.zeros(2, 3, 32, 32).double(), None, "images are torch.float64"),
    (torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 16, dtype=torch.bool), r"\[2, 32, 16\]"),
    (torch.rand(2, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool), r"\[1, 32, 32\]"),
    (torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32), "float32"),
    (torch.rand(2, 3, 32, 32), torch.arange(2).bool()[:, None, None].expand(2, 32, 32),
     r"padding_mask\[1\] is all padding")], ids=range(11))
def test_impossible_images_are_refused_by_value(images, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(images, mask)


# ---------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------

BOX = torch.tensor([0.5, 0.45, 0.4, 0.2])                      # wide, far from every border


@pytest.mark.parametrize("center_noise, size_noise", [(0.4, 0.2), (0.1, 0.9), (1.0, 1.0)])
def test_box_noise_is_uniform_between_its_bounds(center_noise, size_noise):
    cx, cy, w, h = noise_boxes(BOX.expand(20000, 4), center_noise, size_noise).unbind(-1)
    assert_uniform(cx, 0.5 - center_noise * 0.4 / 2, 0.5 + center_noise * 0.4 / 2)
    assert_uniform(cy, 0.45 - center_noise * 0.2 / 2, 0.45 + center_noise * 0.2 / 2)
    assert_uniform(w, 0.4 * (1 - size_noise), 0.4 * (1 + size_noise))
    assert_uniform(h, 0.2 * (1 - size_noise), 0.2 * (1 + size_noise))


def test_the_four_numbers_of_a_box_are_noised_independently():
    noised = noise_boxes(BOX.expand(20000, 4), 0.4, 0.4)
    assert_close(torch.corrcoef(noised.T), torch.eye(4), rtol=0, atol=0.03)


def test_a_noised_center_stays_in_its_box():
    boxes = random_targets(2000)[0]["boxes"]
    noised = noise_boxes(boxes, 0.99, 1.0)
    assert ((noised - boxes).abs()[:, :2] < boxes[:, 2:] / 2).all()


def test_noised_boxes_at_the_border_stay_within_zero_and_one():
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.049, 0.951, 0.1, 0.1]]).repeat(500, 1)
    noised = noise_boxes(boxes, 1.0, 1.0)
    assert noised.min() == 0 and noised.max() == 1


@pytest.mark.parametrize("center_noise, size_noise", [(0, 0), (0.4, 0), (0, 0.4)])
def test_each_box_noise_acts_on_its_own_part_and_zero_is_none(center_noise, size_noise):
    boxes = random_targets(50)[0]["boxes"]
    noised = noise_boxes(boxes, center_noise, size_noise)
    for part, noise in ((slice(0, 2), center_noise), (slice(2, 4), size_noise)):
        if noise:
            assert (noised[:, part] != boxes[:, part]).all()
        else:
            assert torch.equal(noised[:, part], boxes[:, part])


def test_noise_leaves_its_inputs_alone():
    boxes, labels = BOX.repeat(20, 1), torch.arange(20) % CLASSES
    noise_boxes(boxes, 1.0, 1.0)
    noise_labels(labels, CLASSES, 1.0)
    assert torch.equal(boxes, BOX.repeat(20, 1))
    assert torch.equal(labels, torch.arange(20) % CLASSES)


def test_noise_is_decided_by_its_generator_alone():
    boxes, labels = BOX.expand(20, 4), torch.zeros(20, dtype=torch.long)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return (noise_boxes(boxes, 0.4, 0.4, generator), noise_labels(labels, 91, 0.5, generator))
    state = torch.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_classes", [1, 2, 5, 91])
def test_labels_change_at_the_rate_gamma_times_one_minus_one_over_c(num_classes):
    labels = torch.randint(num_classes, (100000,))
    changed = (noise_labels(labels, num_classes, 0.2) != labels).float().mean()
    assert_close(changed.item(), 0.2 * (1 - 1 / num_classes), rtol=0, atol=0.005)


def test_label_noise_of_zero_changes_nothing():
    labels = torch.randint(CLASSES, (1000,))
    assert torch.equal(noise_labels(labels, CLASSES, 0.0), labels)


def test_redrawn_labels_are_uniform_over_the_classes_and_never_unknown():
    drawn = noise_labels(torch.full((50000,), 3), CLASSES, 1.0)
    share = drawn.bincount() / 50000          # one entry more if "unknown" was drawn
    assert_close(share, torch.full((CLASSES,), 1 / CLASSES), rtol=0, atol=0.01)


def test_noise_out_of_range_is_refused_by_value():
    labels = torch.tensor([0])
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"center_noise is {bad}"):
            noise_boxes(BOX[None], bad, 0.4)
        with pytest.raises(ValueError, match=f"size_noise is {bad}"):
            noise_boxes(BOX[None], 0.4, bad)
        with pytest.raises(ValueError, match=f"label_noise is {bad}"):
            noise_labels(labels, CLASSES, bad)


# ---------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------


def naive_slots(counts, num_groups, group_size):
    """-> [(image, slot, source)], is_real, one copy at a time."""
    copies, is_real = [], [[False] * (num_groups * group_size) for _ in counts]
    for group in range(num_groups):
        source = 0
        for image, count in enumerate(counts):
            for index in range(count):
                copies.append((image, group * group_size + index, source))
                is_real[image][group * group_size + index] = True
                source += 1
    return copies, is_real


def copies_in(slots):
    """The copies that these slots hold, in the form of naive_slots, sorted."""
    return sorted(zip(*(x.tolist() for x in (slots.image, slots.slot, slots.source))))


def test_the_slots_in_the_docstring_are_the_slots():
    slots = assign_slots([1, 3], num_groups=2)
    text = DenoisingSlots.__doc__
    for name in ("image", "slot", "source"):
        row = re.search(rf"{name} +((\d +)+\d)$", text, re.MULTILINE).group(1)
        assert getattr(slots, name).tolist() == [int(number) for number in row.split()]
    pictures = re.findall(r"image [01]    ([-a-d ]+?)        ", text)
    assert len(pictures) == 2
    for picture, is_real in zip(pictures, slots.is_real.tolist()):
        assert [letter != "-" for letter in picture.split()] == is_real
    for image, slot, source in zip(slots.image, slots.slot, slots.source):
        assert pictures[image].split()[slot] == "abcd"[source]
    assert (slots.num_groups, slots.group_size) == (2, 3)


@pytest.mark.parametrize(
    "counts", [[0], [0, 0, 0], [4], [1, 3], [3, 0, 1], [0, 5, 0, 2, 2]], ids=str)
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_slots_are_those_of_a_naive_loop(counts, num_groups):
    slots = assign_slots(counts, num_groups)
    copies, is_real = naive_slots(counts, num_groups, max(counts))
    assert copies_in(slots) == sorted(copies)
    assert slots.is_real.shape == (len(counts), num_groups * max(counts))
    assert slots.is_real.tolist() == is_real
    assert (slots.num_groups, slots.group_size) == (num_groups, max(counts))


@pytest.mark.parametrize("max_queries, num_groups", [
    (0, 5), (100, 5), (20, 5), (19, 4), (8, 2), (7, 1), (4, 1), (1, 1)])
def test_a_budget_of_queries_lowers_the_groups_but_never_below_one(max_queries, num_groups):
    slots = assign_slots([2, 4], 5, max_queries=max_queries)
    copies, _ = naive_slots([2, 4], num_groups, 4)
    assert slots.num_groups == num_groups
    assert assign_slots([0, 0], 5, max_queries=max_queries).is_real.shape == (2, 0)
    assert copies_in(slots) == sorted(copies)


def test_a_budget_of_queries_never_raises_the_groups():
    assert assign_slots([2, 4], 0, max_queries=100).num_groups == 0


@pytest.mark.parametrize("arguments, message", [
    (([1, -2], 3), r"counts \[1, -2\] must not be negative"), (([1], -3), "num_groups -3"),
    (([1], 3, -8), "max_queries -8"), (([1], 3, 0, 0), "size_multiple 0 at least 1"), (([], 3), "not empty")])
def test_impossible_slots_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        assign_slots(*arguments)


@pytest.mark.parametrize("count, multiple, group_size", [
    (0, 4, 0), (1, 4, 4), (4, 4, 4), (5, 4, 8), (5, 1, 5), (3, 2, 4)])
def test_group_size_is_rounded_up_to_a_multiple(count, multiple, group_size):
    slots = assign_slots([0, count], 2, size_multiple=multiple)
    copies, is_real = naive_slots([0, count], 2, group_size)
    assert slots.group_size == group_size
    assert slots.is_real.tolist() == is_real
    assert copies_in(slots) == sorted(copies)


def test_the_model_keeps_to_its_budget_and_multiple():
    targets = random_targets(1, 3)
    for options, queries in ((dict(), 10 * 3), (dict(dn_max_queries=10), 3 * 3),
                             (dict(dn_size_multiple=4), 10 * 4)):
        outputs = run(tiny_model(dn_groups=10, **options), random_images(), targets)
        assert outputs["dn_logits"].shape[2] == outputs["dn_boxes"].shape[2] == queries


# ---------------------------------------------------------------------------------------------
# Attention mask
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups, size, matching", [
    (0, 0, 3), (0, 4, 3), (3, 0, 2), (1, 1, 1), (1, 4, 2), (2, 2, 3), (5, 1, 4), (3, 4, 1),
    (5, 7, 6)])
def test_mask_is_equation_7(groups, size, matching):
    denoising = groups * size
    expected = torch.zeros(denoising + matching, denoising + matching, dtype=torch.bool)
    for i in range(denoising + matching):
        for j in range(denoising + matching):
            if j < denoising and (i >= denoising or i // size != j // size):
                expected[i, j] = True
    mask = dn_attention_mask(groups, size, matching)
    assert mask.dtype == torch.bool and torch.equal(mask, expected)
    assert not mask.all(1).any()                              # a row that sees nothing becomes NaN


def test_the_mask_in_the_docstring_is_the_mask():
    rows = re.findall(r"^ +[01m] ((?:[.x] ){6}[.x])", dn_attention_mask.__doc__, re.MULTILINE)
    picture = torch.tensor([[cell == "x" for cell in row.split()] for row in rows])
    assert torch.equal(dn_attention_mask(2, 2, 3), picture)


@pytest.mark.parametrize("counts", [[1, 3], [0, 2, 1], [2, 2], [0, 0]], ids=str)
def test_empty_slots_are_hidden_from_everybody(counts):
    slots = assign_slots(counts, 3)
    blocked = tiny_model().blocked_queries(slots, num_queries=4)
    denoising = 3 * max(counts)
    assert blocked.shape == (len(counts), 1, denoising + 4, denoising + 4)
    for image, i, j in itertools.product(range(len(counts)), *[range(denoising + 4)] * 2):
        other_group = j < denoising and (i >= denoising or i // max(counts) != j // max(counts))
        is_empty = j < denoising and j % max(counts) >= counts[image]
        assert blocked[image, 0, i, j] == (other_group or is_empty)


# ---------------------------------------------------------------------------------------------
# Positions, backbone, encoder, start values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, frequency", [(20, 1), (10000, 1), (20, 4)])
def test_sine_encoding_is_that_of_a_naive_loop(temperature, frequency):
    coordinates = torch.rand(3, 2)
    expected = torch.zeros(3, 16)
    for row, column, feature in itertools.product(range(3), range(2), range(4)):
        angle = (2 * math.pi * frequency * coordinates[row, column].item()
                 / temperature ** (2 * feature / 8))
        expected[row, column * 8 + 2 * feature] = math.sin(angle)
        expected[row, column * 8 + 2 * feature + 1] = math.cos(angle)
    encoded = sine_encoding(coordinates, 8, temperature, frequency)
    assert_close(encoded, expected, rtol=1e-5, atol=1e-5)


def test_pixel_coordinates_end_at_the_border_of_the_image_not_of_the_padding():
    padding = torch.tensor([[[False, False, True], [False, False, True], [True, True, True]]])
    yx = pixel_coordinates(padding)[0]
    assert_close(yx[:2, :2, 0], torch.tensor([[0.5, 0.5], [1.0, 1.0]]), rtol=0, atol=1e-5)
    assert_close(yx[:2, :2, 1], torch.tensor([[0.5, 1.0], [0.5, 1.0]]), rtol=0, atol=1e-5)
    centers = pixel_coordinates(padding, cell_centers=True)[0]
    assert_close(centers[:2, :2, 0], torch.tensor([[0.25, 0.25], [0.75, 0.75]]), rtol=0, atol=1e-5)
    assert_close(centers[:2, :2, 1], torch.tensor([[0.25, 0.75], [0.25, 0.75]]), rtol=0, atol=1e-5)


def test_padding_does_not_change_what_is_found():
    model = patch_model(num_encoder_layers=2).eval()
    image = random_images(1, 32, 24)
    padded, mask = torch.randn(1, 3, 48, 56), torch.ones(1, 48, 56, dtype=torch.bool)
    padded[:, :, :32, :24], mask[:, :32, :24] = image, False
    alone, within = model(image), model(padded, mask)
    assert_close(within["all_logits"], alone["all_logits"], rtol=1e-4, atol=1e-4)
    assert_close(within["all_boxes"], alone["all_boxes"], rtol=1e-4, atol=1e-4)


def test_no_mask_means_no_padding():
    model = tiny_model().eval()
    images = random_images()
    outputs = model(images, torch.zeros(2, 32, 32, dtype=torch.bool))
    assert_close(outputs, model(images), rtol=1e-5, atol=1e-5)


def test_frozen_batch_norm_is_that_of_torchvision():
    ours, theirs = FrozenBatchNorm(6), FrozenBatchNorm2d(6)
    state = {name: torch.rand(6) + 0.5 for name in ours.state_dict()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(2, 6, 4, 5)
    assert_close(ours(x.clone()), theirs(x))
    assert not list(ours.parameters())


def test_pretrained_first_stages_are_frozen_unless_asked_for():
    frozen, _ = build_backbone(DNDETRConfig(backbone="resnet18"))
    names = {name.split(".")[0] for name, p in frozen.named_parameters() if p.requires_grad}
    assert names == {"layer2", "layer3", "layer4"}
    live, channels = build_backbone(DNDETRConfig(backbone="resnet18", frozen_norm=False))
    assert all(p.requires_grad for p in live.parameters()) and channels == 512
    assert any(isinstance(module, nn.BatchNorm2d) for module in live.modules())


def test_dilation_doubles_the_resolution_of_the_features():
    for options, side in ((dict(), 2), (dict(dilation=True), 4)):
        backbone, channels = build_backbone(DNDETRConfig(**options))
        assert backbone(torch.rand(1, 3, 64, 64)).shape == (1, channels, side, side)


def test_small_backbone_halves_the_resolution_once_per_width():
    for widths in ((8,), (8, 16, 24)):
        backbone, channels = build_backbone(DNDETRConfig(backbone="small", small_widths=widths))
        side = 32 // 2 ** len(widths)
        assert backbone(torch.rand(1, 3, 32, 32)).shape == (1, widths[-1], side, side)
        assert channels == widths[-1]


def test_a_fresh_model_predicts_its_anchors_and_one_percent():
    model = DNDETR(DNDETRConfig(**TINY)).eval()
    nn.init.zeros_(model.class_head.weight)
    outputs = model(random_images())
    anchors = model.anchors.weight.sigmoid().expand(2, 2, -1, -1)
    assert_close(outputs["all_boxes"], anchors, rtol=0, atol=2e-3)
    assert_close(outputs["pred_logits"].sigmoid(), torch.full((2, 7, CLASSES), 0.01))


def test_anchors_can_start_on_a_grid():
    x, y = [1 / 6, 1 / 2, 5 / 6] * 2, [0.25] * 3 + [0.75] * 3
    expected = torch.tensor([x, y, [0.3] * 6, [0.3] * 6]).T[:5]       # the last row is incomplete
    assert_close(grid_anchors(5), expected)
    model = DNDETR(DNDETRConfig(**TINY | dict(num_queries=5, anchor_start="grid")))
    assert_close(model.anchors.weight.sigmoid(), expected)


def test_a_local_start_looks_at_the_place_of_the_anchor():
    model = DNDETR(DNDETRConfig(**TINY | dict(local_start=True, anchor_temperature=20)))
    places = pixel_coordinates(torch.zeros(1, 6, 6, dtype=torch.bool)).flatten(1, 2)           # y, x
    encoded = sine_encoding(places, 16, temperature=20)[0]                                     # [36, 32]
    anchors = torch.cat([places.flip(-1), torch.rand(1, 36, 2) * 0.5 + 0.1], -1)               # any size
    for layer in model.decoder.layers:
        _, query_sine = model.decoder.encode_anchors(anchors, torch.randn(1, 36, 32), is_first=False)
        attention = layer.cross_query_sine(query_sine[0]) @ layer.cross_key_position(encoded).T
        assert torch.equal(attention.argmax(-1), torch.arange(36))
        attention = layer.cross_query_sine(encoded) @ layer.cross_key_position(encoded).T
        assert_close(attention / attention[0, 0], encoded @ encoded.T / (encoded @ encoded.T)[0, 0])
    x = torch.randn(3, 32)
    assert torch.equal(model.decoder.position_scale(x), torch.ones(3, 32))
    assert torch.equal(model.encoder.position_scale(x), torch.ones(3, 32))


def test_images_of_another_type_are_accepted_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_model()(random_images(1).bfloat16())["pred_boxes"].isfinite().all()


def test_predictions_stay_float32_under_autocast():
    model, targets = tiny_model(), random_targets(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model, random_images(), targets)
        losses = DNDETRCriterion(model.config)(outputs, targets)
    for name in ("all_logits", "all_boxes", "dn_logits", "dn_boxes"):
        assert outputs[name].dtype == torch.float32
    losses["loss"].backward()
    assert losses["loss"].isfinite()


# ---------------------------------------------------------------------------------------------
# Denoising queries
# ---------------------------------------------------------------------------------------------


def test_a_denoising_query_is_its_label_row_its_box_and_a_one():
    model, targets = tiny_model(**NO_NOISE), random_targets(1, 3)
    slots, content, anchors = model.denoising_queries(targets, "cpu")
    assert content.shape == (2, 6, 32) and anchors.shape == (2, 6, 4)
    for image, target in enumerate(targets):
        for group, index in itertools.product(range(2), range(len(target["labels"]))):
            row = model.label_embedding.weight[target["labels"][index]]
            box = target["boxes"][index]
            assert torch.equal(content[image, group * 3 + index], torch.cat([row, torch.ones(1)]))
            assert_close(anchors[image, group * 3 + index], (box / (1 - box)).log())


def test_a_matching_query_is_the_unknown_row_its_anchor_and_a_zero():
    model = tiny_model()
    content, anchors = model.matching_queries(2)
    unknown = torch.cat([model.label_embedding.weight[CLASSES], torch.zeros(1)])
    assert torch.equal(content, unknown.expand(2, 7, 32))
    assert torch.equal(anchors, model.anchors.weight.expand(2, 7, 4))


def test_patterns_repeat_all_anchors_for_each_pattern():
    model, targets = tiny_model(num_patterns=3), random_targets(1, 2)
    content, anchors = model.matching_queries(2)
    unknown = torch.cat([model.label_embedding.weight[CLASSES], torch.zeros(1)])
    for image, pattern, query in itertools.product(range(2), range(3), range(7)):
        row = pattern * 7 + query
        assert torch.equal(content[image, row], unknown + model.patterns.weight[pattern])
        assert torch.equal(anchors[image, row], model.anchors.weight[query])
    outputs = run(model, random_images(), targets)
    assert outputs["pred_logits"].shape == (2, 21, CLASSES)
    assert outputs["dn_logits"].shape == (2, 2, 4, CLASSES)


def test_every_group_draws_noise_of_its_own():
    model = tiny_model(num_classes=50, label_noise=1.0, dn_groups=3)
    _, content, anchors = model.denoising_queries(random_targets(6, 6), "cpu")
    for first, second in itertools.combinations(range(3), 2):
        a, b = slice(first * 6, first * 6 + 6), slice(second * 6, second * 6 + 6)
        assert (anchors[:, a] != anchors[:, b]).all()
        assert (content[:, a, :-1] != content[:, b, :-1]).any(-1).float().mean() > 0.7


def test_the_noise_knobs_reach_the_queries():
    targets = random_targets(300)
    rows = {}
    for knob in ("label_noise", "center_noise", "size_noise"):
        model = tiny_model(**NO_NOISE | {knob: 0.5}, dn_groups=1)
        _, content, anchors = model.denoising_queries(targets, "cpu")
        true = model.label_embedding(targets[0]["labels"])
        boxes = anchors[0].sigmoid() - targets[0]["boxes"]
        rows[knob] = [((content[0, :, :-1] != true).any(-1)).float().mean(),
                      boxes[:, :2].abs().max(), boxes[:, 2:].abs().max()]
    changed = torch.tensor(list(rows.values())) > 1e-4
    assert torch.equal(changed, torch.eye(3, dtype=torch.bool))
    assert 0.3 < rows["label_noise"][0] < 0.5                 # 0.5 * (1 - 1/5)


def test_targets_are_left_alone():
    model, targets = tiny_model(label_noise=1.0), random_targets(2, 3)
    DNDETRCriterion(model.config)(run(model, random_images(), targets), targets)
    for target, untouched in zip(targets, random_targets(2, 3)):
        assert torch.equal(target["labels"], untouched["labels"])
        assert torch.equal(target["boxes"], untouched["boxes"])


def test_denoising_runs_in_training_with_targets_only():
    model, images, targets = tiny_model(), random_images(), random_targets(1, 2)
    plain = {"pred_logits", "pred_boxes", "all_logits", "all_boxes"}
    assert model(images, targets=targets).keys() == plain | {"dn_logits", "dn_boxes", "dn_slots"}
    assert model(images).keys() == plain
    model.eval()
    assert model(images, targets=targets).keys() == plain
    assert_close(model(images, targets=targets), model(images), rtol=0, atol=0)


def test_without_groups_the_matching_part_is_left():
    images, targets = random_images(), random_targets(1, 3)
    with_groups, without = tiny_model(dn_groups=5), tiny_model(dn_groups=0)
    outputs = run(with_groups, images, targets)
    plain = run(without, images, targets)
    assert plain.keys() == {name for name in outputs if not name.startswith("dn_")}
    losses = DNDETRCriterion(with_groups.config)(outputs, targets)
    plain_losses = DNDETRCriterion(without.config)(plain, targets)
    assert plain_losses.keys() == {name for name in losses if not name.startswith("dn_")}
    for name in plain:
        assert_close(plain[name], outputs[name], rtol=1e-4, atol=1e-5)
    for name in plain_losses.keys() - {"loss"}:
        assert_close(plain_losses[name], losses[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# No leak
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", [0, 2])
def test_matching_predictions_do_not_depend_on_ground_truth(patterns):
    model, images = tiny_model(num_patterns=patterns), random_images()
    first = run(model, images, random_targets(1, 3, seed=1))
    second = run(model, images, random_targets(1, 3, seed=2))
    others = run(model, images, random_targets(4, 0)), run(model, images, None)
    assert not torch.equal(first["dn_logits"], second["dn_logits"])
    for name in ("all_logits", "all_boxes"):
        assert torch.equal(first[name], second[name])
        for other in others:
            assert_close(first[name], other[name], rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_from_matching_predictions_into_denoising_queries():
    model, leaves = tiny_model(), []

    def as_leaves(content, anchors):
        leaves.extend(x.detach().requires_grad_() for x in (content, anchors))
        return leaves
    edit_denoising(model, as_leaves)
    outputs = run(model, random_images(), random_targets(1, 3))
    matching = outputs["all_logits"].square().sum() + outputs["all_boxes"].square().sum()
    zeros = torch.autograd.grad(matching, leaves, retain_graph=True, materialize_grads=True)
    assert not any(gradient.any() for gradient in zeros)
    denoising = outputs["dn_logits"].square().sum() + outputs["dn_boxes"].square().sum()
    assert all(gradient.any() for gradient in torch.autograd.grad(denoising, leaves))


def test_a_group_does_not_see_another_group():
    images, targets = random_images(), random_targets(3, 3)
    before = run(tiny_model(dn_groups=3), images, targets)
    changed = tiny_model(dn_groups=3)

    def change_group_1(content, anchors):
        content[:, 3:6], anchors[:, 3:6] = torch.randn(2, 3, 32), torch.randn(2, 3, 4)
        return content, anchors
    edit_denoising(changed, change_group_1)
    after = run(changed, images, targets)
    for name in ("all_logits", "all_boxes"):
        assert torch.equal(before[name], after[name])
    for name in ("dn_logits", "dn_boxes"):
        assert torch.equal(before[name][:, :, :3], after[name][:, :, :3])
        assert torch.equal(before[name][:, :, 6:], after[name][:, :, 6:])
        assert (before[name][:, :, 3:6] != after[name][:, :, 3:6]).any(-1).all()


def test_denoising_queries_see_their_group_and_the_matching_queries():
    images, targets = random_images(), random_targets(3, 3)
    before = run(tiny_model(), images, targets)
    other_anchors, other_copy = tiny_model(), tiny_model()
    nn.init.normal_(other_anchors.anchors.weight)

    def change_copy_0(content, anchors):
        content[:, 0] = torch.randn(32)
        return content, anchors
    edit_denoising(other_copy, change_copy_0)
    after = run(other_anchors, images, targets)
    assert (before["dn_logits"] != after["dn_logits"]).any(-1).all()
    after = run(other_copy, images, targets)
    assert (before["dn_logits"] != after["dn_logits"])[:, :, 1:3].any(-1).all()


def test_who_influences_whom_in_the_decoder_is_the_mask():
    model = tiny_model(num_decoder_layers=3)
    mask = dn_attention_mask(2, 2, 3)
    x = torch.randn(1, 7, 32, requires_grad=True)
    anchors = torch.randn(1, 7, 4, requires_grad=True)
    memory, positions = torch.randn(2, 1, 9, 32)
    hidden, starts = model.decoder(x, anchors, memory, positions, mask[None, None], None,
                                   model.box_head)
    result = torch.cat([hidden, starts], dim=-1) * torch.randn(36)
    for i in range(7):
        gradients = torch.autograd.grad(result[:, :, i].sum(), (x, anchors), retain_graph=True)
        for gradient in gradients:
            assert torch.equal(gradient[0].any(-1), ~mask[i])


# ---------------------------------------------------------------------------------------------
# Batches: neighbours, empty images, crowds
# ---------------------------------------------------------------------------------------------


def test_an_image_does_not_notice_a_crowded_neighbour():
    model = patch_model(**NO_NOISE, dn_groups=3)
    images, (few, many) = random_images(2), random_targets(1, 5)
    alone, together = run(model, images[:1], [few]), run(model, images, [few, many])
    real = together["dn_slots"].is_real[0]
    assert alone["dn_logits"].shape[2] == 3 and real.sum() == 3 and len(real) == 15
    for name in ("all_logits", "all_boxes"):
        assert_close(together[name][:, :1], alone[name], rtol=1e-4, atol=1e-5)
    for name in ("dn_logits", "dn_boxes"):
        assert_close(together[name][:, 0, real], alone[name][:, 0], rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_batch_is_the_sum_of_its_images():
    model = patch_model(**NO_NOISE)
    images, targets = random_images(3), random_targets(1, 5, 2)
    criterion = DNDETRCriterion(model.config)

    def loss_of(some):
        return criterion(run(model, images[some], targets[some]), targets[some])
    together, alone = loss_of(slice(0, 3)), [loss_of(slice(i, i + 1)) for i in range(3)]
    for name, value in together.items():
        expected = sum(losses[name] * count for losses, count in zip(alone, (1, 5, 2)))
        assert_close(value * 8, expected, rtol=1e-4, atol=1e-4)


def test_empty_slots_get_no_gradient():
    model, leaves, targets = tiny_model(), [], random_targets(1, 3)

    def as_leaves(content, anchors):
        leaves.extend(x.detach().requires_grad_() for x in (content, anchors))
        return leaves
    edit_denoising(model, as_leaves)
    outputs = run(model, random_images(), targets)
    loss = DNDETRCriterion(model.config)(outputs, targets)["loss"]
    of_predictions = torch.autograd.grad(loss, (outputs["dn_logits"], outputs["dn_boxes"]),
                                         retain_graph=True)
    real = outputs["dn_slots"].is_real
    assert (~real).sum() == 4
    for gradient in (*torch.autograd.grad(loss, leaves), *of_predictions[0], *of_predictions[1]):
        assert not gradient[~real].any() and gradient[real].any(-1).all()   # gradient [B, P*M, *]


@pytest.mark.parametrize("counts", [(0, 2), (0, 0), (12, 1)], ids=str)
def test_empty_images_and_crowds_train(counts):
    model, targets = tiny_model(), random_targets(*counts)
    outputs = run(model, random_images(), targets)
    losses = DNDETRCriterion(model.config)(outputs, targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert outputs["dn_logits"].shape[2] == 2 * max(counts)
    assert losses["loss_ce"] > 0
    for name, value in losses.items():
        if name.startswith("dn_") or name.startswith(("loss_bbox", "loss_giou")):
            assert (value == 0) == (max(counts) == 0)


def test_the_same_seed_gives_the_same_loss_and_another_does_not():
    model, images, targets = tiny_model(), random_images(), random_targets(1, 3)
    criterion = DNDETRCriterion(model.config)
    first, again = (criterion(run(model, images, targets), targets)["loss"] for _ in range(2))
    torch.manual_seed(1)
    other = criterion(model(images, targets=targets), targets)["loss"]
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---------------------------------------------------------------------------------------------
# Matching
# ---------------------------------------------------------------------------------------------

UNUSUAL = DNDETRConfig(**TINY | dict(cost_class=1.5, cost_box=0.7, cost_giou=3.0, loss_class=0.3,
                                     loss_box=2.5, loss_giou=1.7, focal_alpha=0.4, focal_gamma=1.5))


@pytest.mark.parametrize("config", [DNDETRConfig(**TINY), UNUSUAL], ids=["default", "unusual"])
def test_matching_cost_is_that_of_a_naive_loop(config):
    logits, boxes = random_predictions()
    targets = random_targets(3, 3)
    labels = torch.stack([target["labels"] for target in targets])
    truth = torch.stack([target["boxes"] for target in targets])
    expected = torch.zeros(2, 2, 4, 3)
    for layer, image, query, index in itertools.product(range(2), range(2), range(4), range(3)):
        expected[layer, image, query, index] = naive_cost(
            logits[layer, image, query].tolist(), boxes[layer, image, query].tolist(),
            int(labels[image, index]), truth[image, index].tolist(), config)
    cost = matching_cost(logits, boxes, labels, truth, config)
    assert_close(cost, expected, rtol=1e-4, atol=1e-5)


def test_matching_is_the_cheapest_of_all_permutations():
    targets = random_targets(3, 0, 1, 4)
    config = DNDETRConfig(**TINY)
    for seed in range(5):
        logits, boxes = random_predictions(layers=2, images=4, queries=5, seed=seed)
        pairs = match(logits, boxes, targets, config)
        assert pairs.image.shape == pairs.query.shape == pairs.source.shape == (2, 8)
        for layer in range(2):
            owners = pairs_as_dicts(pairs, layer, targets)
            for image, target in enumerate(targets):
                assert owners[image] == cheapest_permutation(
                    logits[layer, image], boxes[layer, image], target, config)


def test_matching_all_layers_and_images_at_once_is_one_at_a_time():
    logits, boxes = random_predictions(layers=3, images=3, queries=9)
    targets, config = random_targets(2, 6, 1), DNDETRConfig(**TINY)
    pairs = match(logits, boxes, targets, config)
    for layer, image in itertools.product(range(3), range(3)):
        here = (slice(layer, layer + 1), slice(image, image + 1))
        alone = match(logits[here], boxes[here], targets[image:image + 1], config)
        owners = pairs_as_dicts(pairs, layer, targets)[image]
        assert owners == pairs_as_dicts(alone, 0, targets[image:image + 1])[0]


def test_more_objects_than_queries_leave_objects_unmatched():
    logits, boxes = random_predictions(layers=1, images=2, queries=3)
    targets, config = random_targets(5, 2), DNDETRConfig(**TINY)
    labels, truth = (targets[0][name].tolist() for name in ("labels", "boxes"))

    def total(objects):
        return sum(naive_cost(logits[0, 0, query].tolist(), boxes[0, 0, query].tolist(),
                              labels[index], truth[index], config)
                   for query, index in enumerate(objects))
    best = min(itertools.permutations(range(5), 3), key=total)
    owners = pairs_as_dicts(match(logits, boxes, targets, config), 0, targets)
    assert owners[0] == dict(enumerate(best)) and len(owners[1]) == 2


def test_predictions_that_are_not_finite_are_refused():
    targets, config = random_targets(1, 2), DNDETRConfig(**TINY)
    for place, bad in ((0, float("nan")), (1, float("nan")), (1, float("inf"))):
        predictions = random_predictions()
        predictions[place][1, 0, 2] = bad
        with pytest.raises(FloatingPointError, match="not finite"):
            DNDETRCriterion(config)(as_outputs(*predictions), targets)


def test_matched_objects_are_counted_within_their_image():
    boxes = torch.tensor([[[.2, .2, .1, .1], [.8, .8, .1, .1], [.5, .5, .1, .1]]]).repeat(2, 1, 1)
    targets = [{"labels": torch.tensor([0]), "boxes": boxes[0, [1]]},
               {"labels": torch.tensor([0, 0]), "boxes": boxes[0, [2, 0]]}]
    outputs = as_outputs(torch.zeros(1, 2, 3, CLASSES), boxes[None])
    matched = matched_objects(outputs, targets, DNDETRConfig(**TINY))
    assert matched.tolist() == [[-1, 0, -1], [1, -1, 0]]


def test_matching_instability_by_hand():
    assert matching_instability([0, -1, 1, -1], [0, -1, 1, -1]) == 0
    assert matching_instability([0, -1, 1, -1], [-1, 0, 1, -1]) == 2       # object 0 moved on
    assert matching_instability([0, -1, 1, -1], [1, -1, 0, -1]) == 2       # a swap
    assert matching_instability(torch.tensor([0, 1]), torch.tensor([-1, 1])) == 1
    with pytest.raises(ValueError, match=r"\[3\].*\[2\]"):
        matching_instability([0, 1, -1], [0, 1])


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------


def naive_set_loss(logits, boxes, owners, targets, normalizer, config):
    """One layer. owners: {query: object or None} per image; a query that is missing is silent."""
    focal = l1 = giou = 0.0
    for image, target in enumerate(targets):
        for query, index in owners[image].items():
            label = None if index is None else int(target["labels"][index])
            focal += sum(naive_focal(logits[image, query, c].item(), c == label, config.focal_alpha,
                                     config.focal_gamma) for c in range(CLASSES))
            if index is not None:
                box, truth = boxes[image, query].tolist(), target["boxes"][index].tolist()
                l1 += naive_l1(box, truth)
                giou += 1 - naive_giou(box, truth)
    sums = {"loss_ce": focal, "loss_bbox": l1, "loss_giou": giou}
    return {name: value / normalizer for name, value in sums.items()}


def naive_losses(outputs, targets, groups, config):
    """Every unweighted term, by name."""
    losses, size = {}, max(len(target["labels"]) for target in targets)
    objects = sum(len(target["labels"]) for target in targets)
    copies = [{group * size + k: k for group in range(groups) for k in range(len(target["labels"]))}
              for target in targets]
    layers = len(outputs["all_logits"])
    for layer in range(layers):
        logits, boxes = outputs["all_logits"][layer], outputs["all_boxes"][layer]
        owners = [dict.fromkeys(range(logits.shape[1]))
                  | cheapest_permutation(logits[image], boxes[image], target, config)
                  for image, target in enumerate(targets)]
        suffix = "" if layer == layers - 1 else f"_{layer}"
        terms = naive_set_loss(logits, boxes, owners, targets, objects, config)
        losses |= {name + suffix: value for name, value in terms.items()}
        terms = naive_set_loss(outputs["dn_logits"][layer], outputs["dn_boxes"][layer], copies,
                               targets, objects * groups, config)
        losses |= {f"dn_{name}{suffix}": value for name, value in terms.items()}
    return losses


def crafted_outputs(groups, layers=3):
    """Random predictions for 4 matching queries and `groups` groups of 3 slots, and two targets."""
    targets = random_targets(1, 3)
    logits, boxes = random_predictions(layers=layers)
    dn_logits, dn_boxes = random_predictions(layers=layers, queries=3 * groups, seed=1)
    return as_outputs(logits, boxes, dn_logits=dn_logits, dn_boxes=dn_boxes,
                      dn_slots=assign_slots([1, 3], groups)), targets


@pytest.mark.parametrize("config", [DNDETRConfig(**TINY), UNUSUAL], ids=["default", "unusual"])
def test_every_loss_term_is_that_of_a_naive_loop(config):
    outputs, targets = crafted_outputs(groups=2)
    losses = DNDETRCriterion(config)(outputs, targets)
    expected = naive_losses(outputs, targets, 2, config)
    assert losses.keys() == expected.keys() | {"loss"}
    for name, value in expected.items():
        assert_close(losses[name].item(), value, rtol=1e-4, atol=1e-5)
    weights = {"ce": config.loss_class, "bbox": config.loss_box, "giou": config.loss_giou}
    total = sum(weights[re.search("ce|bbox|giou", name).group()] * value
                for name, value in expected.items())
    assert_close(losses["loss"].item(), total, rtol=1e-4, atol=1e-5)


def test_the_matching_loss_does_not_change_when_noise_slots_are_appended():
    outputs, targets = crafted_outputs(groups=2)
    plain = {name: value for name, value in outputs.items() if not name.startswith("dn_")}
    criterion = DNDETRCriterion(DNDETRConfig(**TINY))
    losses, plain_losses = criterion(outputs, targets), criterion(plain, targets)
    for name in plain_losses.keys() - {"loss"}:
        assert torch.equal(losses[name], plain_losses[name])
    denoising = {name: value for name, value in losses.items() if name.startswith("dn_")}
    assert len(denoising) == 9 and losses["loss"] > plain_losses["loss"]


def test_more_groups_do_not_mean_a_larger_loss():
    images, targets = random_images(), random_targets(1, 3)
    losses = []
    for groups in (1, 3):
        model = tiny_model(**NO_NOISE, dn_groups=groups)
        losses.append(DNDETRCriterion(model.config)(run(model, images, targets), targets))
    for name, value in losses[0].items():
        assert_close(losses[1][name], value, rtol=1e-4, atol=1e-5)


def test_a_perfect_prediction_costs_next_to_nothing():
    targets = random_targets(1, 2)
    logits, boxes = torch.full((1, 2, 4, CLASSES), -20.0), torch.full((1, 2, 4, 4), 0.5)
    for image, target in enumerate(targets):
        for index, label in enumerate(target["labels"]):
            logits[0, image, index, label], boxes[0, image, index] = 20.0, target["boxes"][index]
    losses = DNDETRCriterion(DNDETRConfig(**TINY))(as_outputs(logits, boxes), targets)
    assert 0 <= losses["loss"] < 1e-3


def test_the_normaliser_is_the_mean_over_processes(monkeypatch):
    assert mean_over_processes(4, "cpu") == 4
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(6))
    assert mean_over_processes(4, "cpu") == 5                 # 4 here, 6 in the other process


# ---------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------


def test_postprocess_by_hand():
    logits = torch.tensor([[[2.0, -9.0, -1.0], [0.0, -9.0, 1.0]],               # [B, N = 2, C = 3]
                           [[-3.0, -9.0, -2.0], [4.0, -9.0, -4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]],
                          [[0.1, 0.2, 0.2, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    first, second = postprocess(outputs, [(100, 200), (10, 10)], num_select=3)  # (height, width)
    a, b = [80.0, 30.0, 120.0, 70.0], [0.0, 50.0, 100.0, 100.0]
    assert_close(first["scores"], torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    assert first["labels"].tolist() == [0, 2, 0]
    assert_close(first["boxes"], torch.tensor([a, b, b]))
    c, d = [0.0, 0.0, 2.0, 4.0], [0.0, 0.0, 10.0, 10.0]
    assert_close(second["scores"], torch.tensor([4.0, -2.0, -3.0]).sigmoid())
    assert second["labels"].tolist() == [0, 2, 0]
    assert_close(second["boxes"], torch.tensor([d, c, c]))


def test_postprocess_selects_at_most_what_there_is():
    outputs = tiny_model().eval()(random_images())
    results = postprocess(outputs, torch.tensor([[32, 32], [32, 32]]))
    assert all(len(result["scores"]) == 7 * CLASSES for result in results)


@pytest.mark.parametrize("image_sizes", [[(10, 10)], [(10, 10)] * 3, [10, 10]], ids=str)
def test_postprocess_refuses_sizes_of_other_images(image_sizes):
    outputs = {"pred_logits": torch.zeros(2, 3, CLASSES), "pred_boxes": torch.rand(2, 3, 4)}
    with pytest.raises(ValueError, match=r"each of the 2 images.*\["):
        postprocess(outputs, image_sizes)


# ---------------------------------------------------------------------------------------------
# The authors' weights and numbers
# ---------------------------------------------------------------------------------------------

GOLDEN = dict(     # of the authors' code: ResNet-18, 2 + 3 layers, 12 queries, seed 7, 2 groups
    pred_logits=[          # [:, :4, :4]
        [[0.427449, -0.923196, 0.242535, -0.10369], [0.425817, -0.885947, 0.256586, -0.082069],
         [0.436679, -0.886382, 0.257491, -0.097182], [0.424997, -0.886821, 0.265332, -0.083845]],
        [[0.631754, -1.087975, 0.188411, 0.029284], [0.618934, -1.06626, 0.194729, 0.029344],
         [0.635787, -1.068255, 0.196301, 0.009789], [0.618692, -1.06641, 0.201342, 0.024116]]],
    pred_boxes=[           # [:, :4]
        [[0.090606, 0.777184, 0.610356, 0.311936], [0.384232, 0.692345, 0.817748, 0.768968],
         [0.045007, 0.215272, 0.877361, 0.329394], [0.64859, 0.340749, 0.794911, 0.591154]],
        [[0.089103, 0.769441, 0.581301, 0.303353], [0.375072, 0.684693, 0.797948, 0.769005],
         [0.043104, 0.21176, 0.863178, 0.32666], [0.639099, 0.334081, 0.773746, 0.590925]]],
    mean_logits_per_layer=[-0.02305660471087748, 0.034439871834775246, 0.04206441767384117],
    mean_boxes_per_layer=[0.5274777500890195, 0.5154991260108849, 0.4940830652291576],
    losses=dict(
        loss_ce=98.12271881103516, loss_bbox=0.7844612002372742, loss_giou=0.9499912261962891,
        loss_ce_0=76.71214294433594, loss_bbox_0=0.49942445755004883,
        loss_giou_0=0.9402205944061279, loss_ce_1=93.2931900024414,
        loss_bbox_1=0.6653967499732971, loss_giou_1=0.9905166029930115,
        dn_loss_ce=24.565433502197266, dn_loss_bbox=0.8603963851928711,
        dn_loss_giou=1.074752926826477, dn_loss_ce_0=20.914323806762695,
        dn_loss_bbox_0=0.2938331067562103, dn_loss_giou_0=0.7584695219993591,
        dn_loss_ce_1=23.5244140625, dn_loss_bbox_1=0.6397346258163452,
        dn_loss_giou_1=1.0718567371368408, loss=367.4200744628906),
    gradient_norm=2192.13525390625,
    owners=[{3: 1, 4: 2, 7: 0}, {3: 1, 4: 2, 7: 0}])


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def layers(name, *sizes):
    return {key: shape for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes))
            for key, shape in linear(f"{name}.layers.{index}", outputs, inputs).items()}


def norm(name, width, *more):
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", *more)}


def convolution(name, norm_name, outputs, inputs, size):
    return {f"{name}.weight": (outputs, inputs, size, size),
            **norm(norm_name, outputs, "running_mean", "running_var")}


def resnet_shapes(blocks, bottleneck):
    """-> names and shapes of the backbone, its channels."""
    body, channels, growth = "backbone.0.body.", 64, 4 if bottleneck else 1
    shapes = convolution(body + "conv1", body + "bn1", 64, 3, 7)
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512)), 1):
        for block in range(count):
            name = f"{body}layer{stage}.{block}."
            sizes = [(width, channels, 3), (width, width, 3)]
            if bottleneck:
                sizes = [(width, channels, 1), (width, width, 3), (4 * width, width, 1)]
            for index, size in enumerate(sizes, 1):
                shapes |= convolution(f"{name}conv{index}", f"{name}bn{index}", *size)
            if block == 0 and channels != growth * width:
                shapes |= convolution(f"{name}downsample.0", f"{name}downsample.1",
                                      growth * width, channels, 1)
            channels = growth * width
    return shapes, channels


def decoder_layer_shapes(name, width, feed_forward, is_first):
    projections = ["sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v", "ca_qcontent",
                   "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"] + ["ca_qpos"] * is_first
    shapes = {}
    for projection in projections:
        shapes |= linear(f"{name}{projection}_proj", width, width)
    for attention in ("self_attn", "cross_attn"):
        shapes |= linear(f"{name}{attention}.out_proj", width, width)
    for index in (1, 2, 3):
        shapes |= norm(f"{name}norm{index}", width)
    return shapes | feed_forward_shapes(name, width, feed_forward)


def feed_forward_shapes(name, width, feed_forward):
    return (linear(name + "linear1", feed_forward, width)
            | linear(name + "linear2", width, feed_forward))


def encoder_layer_shapes(name, width, feed_forward):
    return {f"{name}self_attn.in_proj_weight": (3 * width, width),
            f"{name}self_attn.in_proj_bias": (3 * width,),
            **linear(name + "self_attn.out_proj", width, width),
            **feed_forward_shapes(name, width, feed_forward),
            **norm(name + "norm1", width), **norm(name + "norm2", width)}


def official_shapes(encoder=2, decoder=3, queries=12, feed_forward=64, blocks=(2, 2, 2, 2),
                    bottleneck=False, patterns=0, slopes=True, width=256, classes=91):
    """Names and shapes of the authors' weights, without the alias of bbox_embed."""
    shapes, channels = resnet_shapes(blocks, bottleneck)
    shapes |= {"input_proj.weight": (width, channels, 1, 1), "input_proj.bias": (width,)}
    for kind, count in (("encoder", encoder), ("decoder", decoder)):
        for index in range(count):
            name = f"transformer.{kind}.layers.{index}."
            shapes |= (encoder_layer_shapes(name, width, feed_forward) if kind == "encoder"
                       else decoder_layer_shapes(name, width, feed_forward, is_first=index == 0))
            if slopes:
                shapes[name + "activation.weight"] = (1,)
        shapes |= layers(f"transformer.{kind}.query_scale", width, width, width)
    shapes |= norm("transformer.decoder.norm", width)
    shapes |= layers("transformer.decoder.ref_point_head", 2 * width, width, width)
    shapes |= layers("transformer.decoder.ref_anchor_head", width, width, 2)
    shapes |= layers("bbox_embed", width, width, width, 4) | linear("class_embed", classes, width)
    if patterns:
        shapes["transformer.patterns.weight"] = (patterns, width)
    return shapes | {"label_enc.weight": (classes + 1, width - 1),
                     "refpoint_embed.weight": (queries, 4)}


def blank_weights(**sizes):
    """The authors' state dict, of zeros that take no memory; one box head goes by two names."""
    shapes = official_shapes(**sizes)
    shapes |= {"transformer.decoder." + name: shape for name, shape in shapes.items()
               if name.startswith("bbox_embed")}
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def golden_weights(seed=7):
    """The weights that GOLDEN was computed with: every number from a frozen random stream."""
    random, weights = np.random.RandomState(seed), {}
    for name, shape in sorted(official_shapes().items()):
        n = random.standard_normal(shape)
        if name.endswith("activation.weight"):
            n = np.full(shape, 0.25)
        elif name.endswith("running_var"):
            n = 1 + 0.1 * abs(n)
        elif name.endswith(("running_mean", "bias")):
            n = 0.1 * n
        elif n.ndim == 1:
            n = 1 + 0.1 * n
        elif name not in ("label_enc.weight", "refpoint_embed.weight"):
            n = n / math.sqrt(math.prod(shape[1:]))
        weights[name] = torch.tensor(n, dtype=torch.float32)
    return weights


def golden_batch(seed=7, sizes=((96, 128), (128, 96)), counts=(3, 3)):
    """-> images, padding mask, targets of GOLDEN."""
    random = np.random.RandomState(seed + 1)
    pictures = [random.uniform(-2, 2, (3, *size)) for size in sizes]
    images, padding = torch.zeros(2, 3, 128, 128), torch.ones(2, 128, 128, dtype=torch.bool)
    for index, (picture, (height, width)) in enumerate(zip(pictures, sizes)):
        images[index, :, :height, :width] = torch.tensor(picture)
        padding[index, :height, :width] = False
    targets = []
    for count in counts:
        centers, sides = random.uniform(0.3, 0.7, (count, 2)), random.uniform(0.1, 0.4, (count, 2))
        boxes = torch.tensor(np.concatenate([centers, sides], axis=1))
        targets.append({"boxes": boxes.float(),
                        "labels": torch.tensor(random.randint(0, 91, count))})
    return images, padding, targets


@pytest.fixture(scope="module")
def golden_model():
    return DNDETR.from_official(golden_weights(), dn_groups=2, **NO_NOISE)


def assert_golden(values, expected):
    assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_predictions_are_the_numbers_of_the_authors(golden_model):
    images, padding, _ = golden_batch()
    with torch.no_grad():
        outputs = golden_model.eval()(images, padding)
    assert_golden(outputs["pred_logits"][:, :4, :4], GOLDEN["pred_logits"])
    assert_golden(outputs["pred_boxes"][:, :4], GOLDEN["pred_boxes"])
    assert_golden(outputs["all_logits"].mean((1, 2, 3)), GOLDEN["mean_logits_per_layer"])
    assert_golden(outputs["all_boxes"].mean((1, 2, 3)), GOLDEN["mean_boxes_per_layer"])


def test_losses_gradient_and_matching_are_those_of_the_authors(golden_model):
    images, padding, targets = golden_batch()
    golden_model.train().zero_grad()
    outputs = golden_model(images, padding, targets)
    losses = DNDETRCriterion(golden_model.config)(outputs, targets)
    losses["loss"].backward()
    assert losses.keys() == GOLDEN["losses"].keys()
    for name, value in GOLDEN["losses"].items():
        assert_close(losses[name].item(), value, rtol=1e-4, atol=0)
    gradients = [p.grad.norm() for p in golden_model.parameters() if p.requires_grad]
    assert_close(torch.stack(gradients).norm().item(), GOLDEN["gradient_norm"], rtol=1e-4, atol=0)
    matched = matched_objects(outputs, targets, golden_model.config)
    for image, owners in enumerate(GOLDEN["owners"]):
        assert {q: k for q, k in enumerate(matched[image].tolist()) if k >= 0} == owners


def test_the_released_r50_is_the_default_configuration():
    weights = blank_weights(encoder=6, decoder=6, queries=300, feed_forward=2048,
                            blocks=(3, 4, 6, 3), bottleneck=True)
    assert len(weights) == 591
    args = argparse.Namespace(nheads=8, dropout=0.0, transformer_activation="prelu", dilation=False,
                              scalar=5, label_noise_scale=0.2, box_noise_scale=0.4, lr=1e-4)
    weights = {"module." + name: tensor for name, tensor in weights.items()}
    model = DNDETR.from_official({"model": weights, "args": args, "epoch": 49})
    assert model.config == DNDETRConfig()


def test_a_released_file_is_read_with_its_arguments(tmp_path):
    args = argparse.Namespace(nheads=4, dropout=0.1, transformer_activation="gelu", scalar=3,
                              label_noise_scale=0.5, box_noise_scale=0.3)
    weights = blank_weights(encoder=1, decoder=2, queries=8, slopes=False)
    torch.save({"model": weights, "args": args}, tmp_path / "checkpoint.pth")
    config = DNDETR.from_official(tmp_path / "checkpoint.pth").config
    expected = DNDETRConfig(num_queries=8, num_heads=4, num_encoder_layers=1, num_decoder_layers=2,
                            dim_feedforward=64, dropout=0.1, activation="gelu", backbone="resnet18",
                            dn_groups=3, label_noise=0.5, center_noise=0.3, size_noise=0.3)
    assert config == expected
    again = DNDETR.from_official(str(tmp_path / "checkpoint.pth"), num_heads=2, dn_groups=0).config
    assert (again.num_heads, again.dn_groups, again.dropout) == (2, 0, 0.1)


@pytest.mark.parametrize("blocks, bottleneck, backbone", [
    ((2, 2, 2, 2), False, "resnet18"), ((3, 4, 6, 3), False, "resnet34"),
    ((3, 4, 6, 3), True, "resnet50"), ((3, 4, 23, 3), True, "resnet101")])
def test_sizes_are_read_off_the_weights(blocks, bottleneck, backbone):
    weights = blank_weights(encoder=1, decoder=4, queries=9, feed_forward=40, blocks=blocks,
                            bottleneck=bottleneck, width=64, patterns=3, classes=7)
    args = argparse.Namespace(dilation=bottleneck)            # DC5 exists for bottlenecks only
    config = DNDETR.from_official({"model": weights, "args": args}).config
    assert config == DNDETRConfig(
        num_classes=7, num_queries=9, hidden_dim=64, num_encoder_layers=1, num_decoder_layers=4,
        dim_feedforward=40, num_patterns=3, backbone=backbone, dilation=bottleneck)


def test_weights_that_do_not_fit_are_listed():
    weights = blank_weights(encoder=1, decoder=1, queries=4)
    weights["extra.weight"] = weights.pop("transformer.decoder.norm.weight")
    weights["input_proj.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        DNDETR.from_official(weights)
    message = str(error.value)
    assert "extra.weight: [256] in the file, missing in the model" in message
    assert "decoder.norm.weight: missing in the file, [256] in the model" in message
    assert "input_projection.bias: [3] in the file, [256] in the model" in message
    with pytest.raises(ValueError, match="no DN-DETR checkpoint.*class_head.weight"):
        DNDETR.from_official({"model": {"conv1.weight": torch.zeros(3)}})


class Trap:
    """Its pickle makes a directory when it is opened without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": {}, "args": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="checkpoint.pth can't be read"):
        DNDETR.from_official(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("size", [
    0, 200000, 400000,
    5000])
def test_a_truncated_file_is_refused_by_name(size, tmp_path):
    torch.save({"model": {"input_proj.bias": torch.zeros(100000)}}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    assert size < len(content)
    (tmp_path / "part.pth").write_bytes(content[:size])
    with pytest.raises(ValueError, match="part.pth can't be read.*truncated"):
        DNDETR.from_official(tmp_path / "part.pth")


def test_a_file_that_holds_no_dict_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="tensor.pth can't be read as a checkpoint"):
        DNDETR.from_official(tmp_path / "tensor.pth")


def test_an_absent_file_is_reported_as_absent(tmp_path):
    with pytest.raises(ValueError, match="absent.pth can't be read as a checkpoint; absent.*No such file"):
        DNDETR.from_official(tmp_path / "absent.pth")


# ---------------------------------------------------------------------------------------------
# It learns, it runs
# ---------------------------------------------------------------------------------------------


def drawn_rectangles(side=48):
    """4 images with 1 to 3 rectangles, of a colour that is their class, and their targets."""
    random = np.random.RandomState(3)
    images, targets = torch.zeros(4, 3, side, side), []
    for image, count in zip(images, (1, 2, 3, 2)):
        labels, boxes = random.randint(0, 3, count), []
        for label in labels:
            w, h = random.randint(10, 22, 2)
            x, y = random.randint(0, side - w), random.randint(0, side - h)
            image[:, y:y + h, x:x + w] = -1
            image[label, y:y + h, x:x + w] = 1
            boxes.append([(x + w / 2) / side, (y + h / 2) / side, w / side, h / side])
        targets.append({"labels": torch.tensor(labels), "boxes": torch.tensor(boxes).float()})
    return images, targets


def test_a_small_model_learns_to_find_every_object_of_four_images():
    images, targets = drawn_rectangles()
    config = DNDETRConfig(**TINY | dict(
        num_classes=3, num_queries=9, hidden_dim=64, dim_feedforward=64, dn_groups=3,
        small_widths=(16, 32, 32), position_frequency=4, anchor_temperature=20, anchor_start="grid",
        local_start=True))
    model, criterion = DNDETR(config), DNDETRCriterion(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(250):
        optimizer.zero_grad()
        criterion(model(images, targets=targets), targets)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        outputs = model.eval()(images)
    for index, target in enumerate(targets):
        confident = outputs["pred_logits"][index].sigmoid().amax(-1) > 0.5
        found = outputs["pred_boxes"][index, confident].tolist()
        labels = outputs["pred_logits"][index, confident].argmax(-1).tolist()
        assert len(found) == len(target["labels"])               # everything once, nothing else
        for label, box in zip(target["labels"].tolist(), target["boxes"].tolist()):
            assert max(naive_giou(box, other)
                       for other, guess in zip(found, labels) if guess == label) > 0.75


def test_the_tour_runs_and_shows_its_five_parts():
    result = subprocess.run([sys.executable, FILE], capture_output=True, text=True, check=True)
    assert re.findall(r"^(\d)\. ", result.stdout, re.MULTILINE) == ["1", "2", "3", "4", "5"]
    assert "    x x x x . . . . . ." in result.stdout
    first, last = (float(x) for x in re.findall(r"loss +([\d.]+) ", result.stdout)[::2])
    assert last < 0.9 * first


# ---------------------------------------------------------------------------------------------
# House rules of dn_detr.py
# ---------------------------------------------------------------------------------------------


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def code_lines(source):
    """The lines of a file that hold code: no blank ones, no comments, no docstrings."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type not in layout for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_denoising_is_dozens_of_lines_as_the_readme_says():
    code = SOURCE.split('"""', 2)[2]                          # without the docstring of the file
    count = sum("[DN]" in line and not line.strip().startswith("#") for line in code.splitlines())
    assert 20 <= count <= 80
    readme = " ".join((FILE.parent / "README.md").read_text().split())
    assert f"of which denoising adds {count} to DAB-DETR" in readme
    assert f"is all of it: {code_lines(SOURCE)} lines of code" in readme


def test_without_its_tagged_lines_the_file_is_dab_detr(monkeypatch):
    module = types.ModuleType("dab_detr")
    monkeypatch.setitem(sys.modules, "dab_detr", module)
    _, code = SOURCE.split("\nimport argparse\n", 1)
    lines = [line for line in code.splitlines() if "# [DN]" not in line]
    exec(compile("\n".join(["import argparse", *lines]), "dab_detr", "exec"), module.__dict__)

    full, dab = tiny_model(), module.DNDETR(module.DNDETRConfig(**TINY))
    nn.init.zeros_(full.label_embedding.weight)               # DAB-DETR's contents start from zero
    weights = full.state_dict()
    del weights["label_embedding.weight"]
    dab.load_state_dict(weights)
    images, targets = random_images(), random_targets(1, 3)
    expected, outputs = run(full, images), run(dab, images, targets)
    assert_close(outputs, expected, rtol=0, atol=0)
    losses = module.DNDETRCriterion(dab.config)(outputs, targets)
    assert_close(losses, DNDETRCriterion(full.config)(expected, targets), rtol=0, atol=0)


def test_functions_are_short_and_lines_narrow():
    for function in functions():
        assert function.end_lineno - function.lineno < 60, function.name
    for number, line in enumerate(SOURCE.splitlines(), 1):
        assert len(line) <= 110 and line == line.rstrip(), number


def test_nothing_is_tied_to_a_device_or_left_behind():
    for debris in (".cuda(", "ipdb", "breakpoint(", "TODO", "FIXME", "except:", "import *"):
        assert debris not in SOURCE


def test_everything_public_is_documented_and_docstrings_are_clean():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(SOURCE, str(FILE), "exec")
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            docstring = ast.get_docstring(node)
            assert docstring, node.name
            assert not set(docstring) & set(map(chr, range(32))) - {"\n"}, node.name


# =============================================================================================
# train_toy.py
# =============================================================================================


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def tiny_config(**options):
    return DNDETRConfig(**(TINY | options))


TINY_RUN = ["--train-size", "16", "--val-size", "6", "--epochs", "2", "--device", "cpu"]


def tiny_options(folder, *flags):
    return train_toy.parse_options([*TINY_RUN, "--output-dir", str(folder), *flags])


def run_tiny(folder, *flags):
    return train_toy.train(tiny_options(folder, *flags), train_toy.Process("cpu"))


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def write_coco(folder, images, annotations, categories=((3, "cat"), (7, "dog"))):
    """A COCO folder: images {id: (width, height)} filled with gray noise; returns its two paths."""
    pictures = folder / "images"
    pictures.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for image_id, (width, height) in images.items():
        picture = rng.randint(0, 255, (height, width, 3)).astype(np.uint8)
        Image.fromarray(picture).save(pictures / f"{image_id}.png")
    path = folder / "annotations.json"
    path.write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": w, "height": h}
                   for i, (w, h) in images.items()],
        "annotations": [{"id": k + 1, **annotation} for k, annotation in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for i, name in categories]}))
    return pictures, path


def tiny_coco(folder):
    """Gap ids, a crowd, a degenerate, an out-of-image box, an empty image, mixed sizes."""
    return write_coco(folder, {5: (60, 40), 8: (40, 60), 9: (50, 50)}, [
        {"image_id": 5, "category_id": 7, "bbox": [6, 4, 30, 20]},
        {"image_id": 5, "category_id": 3, "bbox": [40, 10, 40, 20]},        # 20 pixels stick out
        {"image_id": 5, "category_id": 3, "bbox": [10, 10, 0, 5]},          # no width
        {"image_id": 8, "category_id": 3, "bbox": [4, 6, 20, 30]},
        {"image_id": 8, "category_id": 3, "bbox": [0, 0, 40, 60], "iscrowd": 1, "area": 2400}])


# --- shapes ------------------------------------------------------------------------------------


def test_shapes_touch_all_four_sides_of_their_boxes():
    for name, inside in train_toy.SHAPES.items():
        for size in (9, 12, 20):
            v, u = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
            mask = inside(u, v)
            sides = mask[0].any(), mask[-1].any(), mask[:, 0].any(), mask[:, -1].any()
            assert all(sides), f"{name} of {size} pixels does not fill its box: {sides}"


def test_shapes_are_the_same_for_the_same_seed_and_split_only():
    first, again = (train_toy.ShapesDataset(4, seed=1, split="val") for _ in range(2))
    for index in range(4):
        assert torch.equal(first[index].image, again[index].image)
        assert torch.equal(first[index].target["boxes"], again[index].target["boxes"])
    for other in (train_toy.ShapesDataset(4, 2, "val"), train_toy.ShapesDataset(4, 1, "train")):
        assert not torch.equal(first[0].image, other[0].image)
    longer = train_toy.ShapesDataset(6, seed=1, split="val")
    assert torch.equal(first[3].image, longer[3].image), "an image depends on the data set's size"


def test_shapes_hold_empty_and_crowded_images_and_little_overlap():
    dataset = train_toy.ShapesDataset(200, seed=0, split="train")
    counts = [len(labels) for labels in dataset.labels]
    assert min(counts) == 0 and max(counts) > 8
    assert {label for labels in dataset.labels for label in labels.tolist()} == set(range(6))
    for boxes in dataset.boxes:
        x0, y0, x1, y1 = box_convert(boxes, "cxcywh", "xyxy").unbind(1)
        assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 1).all() and (y1 <= 1).all()
        for i in range(len(boxes)):
            for j in range(i):
                w = min(x1[i], x1[j]) - max(x0[i], x0[j])
                h = min(y1[i], y1[j]) - max(y0[i], y0[j])
                smaller = min((x1[i] - x0[i]) * (y1[i] - y0[i]), (x1[j] - x0[j]) * (y1[j] - y0[j]))
                assert max(w, 0) * max(h, 0) <= 0.301 * smaller


def test_mirrored_shapes_keep_their_boxes_on_the_object():
    dataset = train_toy.ShapesDataset(8, seed=0, split="train")
    plain = [dataset[index] for index in range(8)]
    dataset.flips[:] = True
    for before, after in zip(plain, (dataset[index] for index in range(8))):
        assert torch.equal(after.image, before.image.flip(-1))
        for (cx, cy, w, h), mirrored in zip(before.target["boxes"], after.target["boxes"]):
            assert_close(mirrored, torch.stack([1 - cx, cy, w, h]))


def test_flips_change_with_the_epoch_and_not_with_the_global_generator():
    dataset = train_toy.ShapesDataset(64, seed=0, split="train")
    dataset.set_epoch(0)
    first = dataset.flips.clone()
    torch.rand(3)
    dataset.set_epoch(0)
    assert torch.equal(first, dataset.flips) and first.any() and not first.all()
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset.flips)
    held_out = train_toy.ShapesDataset(64, seed=0, split="val")
    held_out.set_epoch(1)
    assert not held_out.flips.any()


# --- COCO format -------------------------------------------------------------------------------


def test_coco_loader_handles_gaps_crowds_degenerate_boxes_and_empty_images(tmp_path):
    with pytest.warns(UserWarning, match="dropped 1 degenerate boxes and clipped 1"):
        dataset = train_toy.CocoDataset(*tiny_coco(tmp_path), image_size=40, is_train=False)
    assert len(dataset) == 3
    wide, tall, empty = (dataset[index] for index in range(3))
    assert wide.target["labels"].tolist() == [1, 0]                  # ids 7 and 3
    expected = torch.tensor([[21 / 60, 14 / 40, 30 / 60, 20 / 40], [50 / 60, 20 / 40, 20 / 60, 20 / 40]])
    assert_close(wide.target["boxes"], expected)
    assert wide.image.shape == (3, 40, 60) and wide.original_size == (40, 60)
    assert tall.target["labels"].tolist() == [0], "the crowd must not be trained on"
    assert empty.target["boxes"].shape == (0, 4) and empty.target["labels"].shape == (0,)


def test_training_augmentation_keeps_boxes_inside_the_image(tmp_path):
    with pytest.warns(UserWarning):
        dataset = train_toy.CocoDataset(*tiny_coco(tmp_path), image_size=48, is_train=True)
    torch.manual_seed(0)
    for index in [0, 1, 2] * 8:
        target = dataset[index].target
        dn_detr.check_targets([target], 1, 2)


def test_batches_of_mixed_sizes_are_padded_and_masked(tmp_path):
    with pytest.warns(UserWarning):
        dataset = train_toy.CocoDataset(*tiny_coco(tmp_path), image_size=40, is_train=False)
    batch = train_toy.collate([dataset[0], dataset[1]])
    assert batch.images.shape == (2, 3, 60, 60)
    for index, (height, width) in enumerate(((40, 60), (60, 40))):
        for y in range(60):
            for x in range(60):
                assert batch.padding_mask[index, y, x] == (y >= height or x >= width)
    images, mask = batch.on(torch.device("cpu"))
    assert (images.permute(0, 2, 3, 1)[mask] == 0).all(), "padding must be zero after normalisation"
    assert train_toy.collate([dataset[2], dataset[2]]).padding_mask is None


def test_average_precision_is_measured_in_original_pixels(tmp_path):
    folder, path = write_coco(tmp_path, {1: (80, 40), 2: (40, 80)}, [
        {"image_id": 1, "category_id": 3, "bbox": [8, 4, 40, 20]},
        {"image_id": 2, "category_id": 7, "bbox": [4, 8, 20, 40]}])
    dataset = train_toy.CocoDataset(folder, path, image_size=20, is_train=False)

    class Perfect(torch.nn.Module):
        config = DNDETRConfig(num_queries=1, backbone="small", num_classes=2)
        anchors = torch.nn.Embedding(1, 4)
        calls = 0

        def forward(self, images, mask):
            self.calls += 1
            box = [[28 / 80, 14 / 40, 0.5, 0.5]] if self.calls == 1 else [[14 / 40, 28 / 80, 0.5, 0.5]]
            logits = [[5.0, -5.0]] if self.calls == 1 else [[-5.0, 5.0]]
            return {"pred_boxes": torch.tensor([box]), "pred_logits": torch.tensor([logits])}

    options = train_toy.parse_options(["--batch-size", "1", "--device", "cpu"])
    metrics, _, matching = train_toy.evaluate(Perfect(), dataset, options, train_toy.Process("cpu"))
    assert metrics["AP"] == pytest.approx(100) and metrics["AP75"] == pytest.approx(100)
    assert {key: value.tolist() for key, value in matching.items()} == {1: [0], 2: [0]}


@pytest.mark.parametrize("damage, message", [
    ("not json", "is not JSON"), ('{"images": []}', "no list of categories"), ("[1]", "not in COCO format"),
    ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
    ('{"images": [3], "annotations": [], "categories": []}', "an entry of images lacks file_name, height"),
    (None, "can't be read: No such file")])
def test_broken_annotations_are_named(tmp_path, damage, message):
    folder, path = tiny_coco(tmp_path)
    path.unlink() if damage is None else path.write_text(damage)
    with pytest.raises(ValueError, match=message) as error:
        train_toy.CocoDataset(folder, path, 40, True)
    assert "annotations.json" in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(image_id=77), "annotation 2 is for image 77, which is not among the images"),
    (dict(category_id=4), "image 5 has category_id 4, which is not among the categories"),
    (dict(id=1), "two of its annotations have the same id"),
    (dict(bbox=[1, 2, 3]), r"annotation 2 has bbox \[1, 2, 3\], it must be"),
    (dict(bbox=["1", 2, 3, 4]), "annotation 2 has bbox"), (dict(bbox=None), "annotation 2 has bbox None")])
def test_broken_annotations_are_named_one_by_one(tmp_path, change, message):
    folder, path = tiny_coco(tmp_path)
    data = json.loads(path.read_text())
    data["annotations"][1] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"annotations.json.*{message}"):
        train_toy.CocoDataset(folder, path, 40, True)


def test_optional_fields_of_annotations_may_be_null(tmp_path):
    folder, path = write_coco(tmp_path, {1: (80, 40)}, [
        {"image_id": 1, "category_id": 3, "bbox": [8, 4, 40, 20], "iscrowd": None, "area": None},
        {"image_id": 1, "category_id": 3, "bbox": [8, 4, 40, 20], "area": 123}])
    dataset = train_toy.CocoDataset(folder, path, 40, False)
    assert dataset.coco.anns[1]["iscrowd"] == 0 and dataset.coco.anns[1]["area"] == 800
    assert dataset.coco.anns[2]["area"] == 123, "the area of a mask is smaller than its box"
    assert len(dataset[0].target["labels"]) == 2


def test_corner_boxes_in_coco_annotations_are_noticed(tmp_path):
    folder, path = write_coco(tmp_path, {1: (80, 40)}, [
        {"image_id": 1, "category_id": 3, "bbox": box} for box in ([30, 10, 70, 30], [50, 5, 75, 39])])
    with pytest.raises(ValueError, match=r"2 boxes reach out of their image.*is this \[x0, y0, x1, y1"):
        train_toy.CocoDataset(folder, path, 40, False)


def test_an_image_of_another_size_than_annotated_is_named(tmp_path):
    folder, path = tiny_coco(tmp_path)
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(folder / "5.png")     # turned by 90 degrees
    with pytest.warns(UserWarning):
        dataset = train_toy.CocoDataset(folder, path, 40, False)
    with pytest.raises(ValueError, match=r"5\.png has 40 x 60 pixels, its annotations are for 60 x 40"):
        dataset[0]


def test_sets_that_cannot_be_compared_are_refused(tmp_path):
    box = {"image_id": 1, "category_id": 3, "bbox": [8, 4, 20, 20]}
    train = write_coco(tmp_path / "train", {1: (40, 40)}, [box])
    others = {"names": ([box], ((3, "cow"), (7, "dog"))), "empty": ([], ((3, "cat"), (7, "dog")))}
    flags = {name: ["--coco-train", *map(str, train), "--coco-val", *map(str, write_coco(
        tmp_path / name, {1: (40, 40)}, annotations, categories))]
        for name, (annotations, categories) in others.items()}
    with pytest.raises(ValueError, match="categories differ: --coco-train has .3: 'cat'.*3: 'cow'"):
        train_toy.build_datasets(train_toy.parse_options(flags["names"]))
    with pytest.raises(ValueError, match="holds no objects"):
        train_toy.build_datasets(train_toy.parse_options(flags["empty"]))
    with pytest.raises(ValueError, match="no object in the 1 held-out images: raise --val-size"):
        train_toy.build_datasets(train_toy.parse_options(["--val-size", "1", "--seed", "43"]))


def test_missing_and_broken_images_are_named(tmp_path):
    folder, path = tiny_coco(tmp_path)
    (folder / "8.png").write_bytes(b"this is no picture")
    with pytest.warns(UserWarning):
        dataset = train_toy.CocoDataset(folder, path, 40, False)
    with pytest.raises(ValueError, match=r"8\.png can't be read"):
        dataset[1]
    (folder / "8.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images are not in .*8\.png"):
        train_toy.CocoDataset(folder, path, 40, False)


# --- training ----------------------------------------------------------------------------------


def test_a_run_leaves_its_metrics_configuration_checkpoints_and_pictures(tmp_path):
    history = run_tiny(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == history and [row["epoch"] for row in rows] == [1, 2] and rows[1]["step"] == 4
    for name in ("loss", "loss_matching", "loss_denoising", "AP", "AP50", "AP75", "instability", "seconds"):
        assert name in rows[1]
    assert rows[0]["instability"] is None and rows[1]["instability"] >= 0
    assert rows[1]["loss"] == pytest.approx(rows[1]["loss_matching"] + rows[1]["loss_denoising"], rel=1e-4)
    weights = {"ce": 1, "bbox": 5, "giou": 2}
    denoising = sum(weight * rows[1][name] for kind, weight in weights.items()
                    for name in rows[1] if name.startswith(f"dn_loss_{kind}"))
    assert rows[1]["loss_denoising"] == pytest.approx(denoising, rel=1e-4)
    for name in ("config.json", "last.pt", "best.pt", "curves.png", "detections.png"):
        assert (tmp_path / "run" / name).stat().st_size > 500
    with pytest.raises(ValueError, match="holds another run"):
        run_tiny(tmp_path / "run")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    first, again = (without_seconds(run_tiny(tmp_path / name)) for name in ("first", "again"))
    assert first == again
    assert without_seconds(run_tiny(tmp_path / "other", "--seed", "1")) != first


def test_a_run_stopped_at_any_moment_ends_as_if_never_stopped(tmp_path, monkeypatch):
    straight = without_seconds(run_tiny(tmp_path / "straight", "--epochs", "3"))
    backward, steps = torch.Tensor.backward, []

    def stop_in_third_epoch(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return backward(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.Tensor, "backward", stop_in_third_epoch)
        run_tiny(tmp_path / "stopped", "--epochs", "3")
    torch.manual_seed(99)
    options = train_toy.parse_options(["--resume", str(tmp_path / "stopped"), "--device", "cpu"])
    resumed = train_toy.train(options, train_toy.Process("cpu"))
    assert without_seconds(resumed) == straight
    weights = [torch.load(tmp_path / name / "last.pt")["model"] for name in ("straight", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class OneOfTwo(train_toy.Process):
    """The first of two processes, with nobody to talk to."""

    def __init__(self):
        super().__init__("cpu")
        self.count = 2

    def parallel(self, model):
        return model

    def gather(self, value):
        return [value]


def test_one_of_several_processes_resumes_with_the_same_noise(tmp_path, monkeypatch):
    train_one_epoch, seeds = train_toy.train_one_epoch, []

    def watched(*args):         # the checkpoint holds the first process's generator: others must not use it
        seeds.append(torch.initial_seed())
        return train_one_epoch(*args)

    monkeypatch.setattr(train_toy, "train_one_epoch", watched)
    straight = train_toy.train(tiny_options(tmp_path / "straight"), OneOfTwo())
    evaluate, calls = train_toy.evaluate, []

    def stop_after_second_epoch(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_toy, "evaluate", stop_after_second_epoch)
        train_toy.train(tiny_options(tmp_path / "stopped"), OneOfTwo())
    options = train_toy.parse_options(["--resume", str(tmp_path / "stopped"), "--device", "cpu"])
    resumed = train_toy.train(options, OneOfTwo())
    assert without_seconds(resumed) == without_seconds(straight)
    assert seeds[0] != seeds[1] and seeds[2:] == [*seeds[:2], seeds[1]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, run_tiny(folder)


@pytest.mark.parametrize("moment", range(9))        # every write of two epochs
def test_a_run_stopped_between_two_writes_ends_as_if_never_stopped(tmp_path, monkeypatch, straight, moment):
    replace, done = os.replace, []

    def stop(source, target):
        if len(done) == moment:
            raise KeyboardInterrupt
        done.append(replace(source, target))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stop)
        run_tiny(tmp_path / "stopped")
    flags = ["--resume", str(tmp_path / "stopped")] if (tmp_path / "stopped/config.json").exists() else [
        *TINY_RUN, "--output-dir", str(tmp_path / "stopped")]
    train_toy.main([*flags, "--device", "cpu"])
    resumed = [json.loads(line) for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert without_seconds(resumed) == without_seconds(straight[1])
    folders = straight[0], tmp_path / "stopped"
    files = [sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp") for folder in folders]
    assert files[0] == files[1]
    best = [torch.load(folder / "best.pt")["epoch"] for folder in folders]
    assert best[0] == best[1]


def test_a_resumed_coco_run_keeps_its_number_of_workers(tmp_path):
    box = {"image_id": 1, "category_id": 3, "bbox": [8, 4, 20, 20]}
    paths = list(map(str, write_coco(tmp_path / "data", {1: (40, 40)}, [box])))
    train_toy.main(["--coco-train", *paths, "--coco-val", *paths, "--image-size", "64", "--workers", "0",
                    "--epochs", "1", "--batch-size", "1", "--output-dir", str(tmp_path / "run"),
                    "--device", "cpu"])
    assert train_toy.parse_options(["--resume", str(tmp_path / "run")]).workers == 0


def test_half_a_run_is_neither_overwritten_nor_gone_on_with(tmp_path):
    run_tiny(tmp_path / "run", "--epochs", "1")
    options = train_toy.parse_options(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    (tmp_path / "run/last.pt").rename(tmp_path / "run/moved")
    with pytest.raises(ValueError, match="has metrics but no last.pt"):
        train_toy.train(options, train_toy.Process("cpu"))
    (tmp_path / "run/moved").rename(tmp_path / "run/last.pt")
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(ValueError, match=r"holds another run \(last.pt\)"):
        run_tiny(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file can't be made"):
        run_tiny(tmp_path / "file")
    (tmp_path / "run/config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json is not that of a run"):
        train_toy.parse_options(["--resume", str(tmp_path / "run")])


def test_a_foreign_or_truncated_last_checkpoint_stops_a_resume(tmp_path):
    run_tiny(tmp_path / "run", "--epochs", "1")
    options = train_toy.parse_options(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    last = tmp_path / "run/last.pt"
    state, whole = torch.load(last), last.read_bytes()
    last.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="last.pt can't be read as a checkpoint"):
        train_toy.train(options, train_toy.Process("cpu"))
    torch.save({"weights": 3}, last)
    with pytest.raises(ValueError, match="not one of a run: it lacks categories, config"):
        train_toy.train(options, train_toy.Process("cpu"))
    torch.save(state | {"categories": [{"id": 0, "name": "cow"}]}, last)
    with pytest.raises(ValueError, match="categories differ: the checkpoint has .0: 'cow'"):
        train_toy.train(options, train_toy.Process("cpu"))


def test_a_killed_process_can_be_resumed(tmp_path):
    command = [sys.executable, str(FILE.parent / "train_toy.py")]
    flags = [*TINY_RUN, "--epochs", "500", "--output-dir", str(tmp_path / "run")]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.time() + 100
    while time.time() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
        time.sleep(0.02)
    process.kill()
    process.wait()
    saved = torch.load(tmp_path / "run/last.pt")
    assert saved["epoch"] >= 2 and len(saved["history"]) == saved["epoch"]


def test_a_half_written_file_never_replaces_a_good_one(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("good")

    def fail(temporary):
        temporary.write_text("hal")
        raise OSError("disk full")

    with pytest.raises(OSError):
        train_toy.write_atomically(path, fail)
    assert path.read_text() == "good"


@pytest.mark.parametrize("call, what", [
    (1, "loss"), (3, "loss"), (4, "loss"), (1, "gradient"), (4, "gradient")])
def test_a_step_that_is_not_finite_stops_the_run_and_is_named(tmp_path, monkeypatch, call, what):
    original, calls = train_toy.DNDETRCriterion.forward, []

    def poisoned(self, outputs, targets):
        losses = original(self, outputs, targets)
        calls.append(1)
        if len(calls) == call and what == "loss":
            losses["loss"] = losses["loss"] * float("nan")
        if len(calls) == call and what == "gradient":
            losses["loss"].register_hook(lambda gradient: gradient * float("inf"))
        return losses

    monkeypatch.setattr(train_toy.DNDETRCriterion, "forward", poisoned)
    left = "the last good checkpoint is .*last.pt" if call > 2 else "there is no checkpoint yet"
    message = rf"step {call - 1}, images \[\d+.*{what}.* not finite; {left}"
    with pytest.raises(FloatingPointError, match=message):
        run_tiny(tmp_path / "run", "--epochs", "3")
    if call > 2:                                # two steps an epoch
        saved = torch.load(tmp_path / "run/last.pt")
        assert saved["epoch"] == 1 and all(value.isfinite().all() for value in saved["model"].values())


def test_losses_are_read_one_step_late_and_averaged():
    log = train_toy.LossLog()
    for step, value in enumerate((1.0, 2.0, 6.0)):
        log.add({"loss": torch.tensor(value)}, step, [step])
        assert log.count == step
    assert log.mean() == {"loss": pytest.approx(3.0)}


def test_learning_rate_warms_up_and_falls_to_zero(tmp_path):
    options = tiny_options(tmp_path, "--lr", "0.01")
    model = DNDETR(tiny_config())
    optimizer, schedule = train_toy.build_optimizer(model, options, num_steps=1000)
    rates = []
    for _ in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.01 / 100) and max(rates) < 0.01 and rates[-1] < 1e-6
    assert rates.index(max(rates)) in range(80, 130)


def test_mixed_precision_stays_close_to_float32(tmp_path):
    plain, mixed = (run_tiny(tmp_path / str(len(flags)), "--epochs", "1", *flags)
                    for flags in ([], ["--amp"]))
    assert mixed[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.03)
    assert mixed[0]["loss"] != plain[0]["loss"], "autocast changed nothing: is it on?"


def test_compiled_shapes_do_not_change_with_every_batch():
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = tiny_config(dn_size_multiple=8)
    model, criterion = DNDETR(config), DNDETRCriterion(config)
    model.decoder.compile(backend=count, dynamic=False)
    for count in (1, 5, 3, 8, 2, 7, 4, 6):
        targets = random_targets(count, 1)
        criterion(model(torch.randn(2, 3, 32, 32), targets=targets), targets)["loss"].backward()
    assert len(compiled) <= 2
    torch._dynamo.reset()


def test_compiling_without_a_compiler_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(train_toy.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler"):
        run_tiny(tmp_path / "run", "--compile")
    assert not (tmp_path / "run/config.json").exists()


def test_padding_the_groups_for_compilation_changes_no_loss():
    targets = random_targets(3, 1)
    losses = []
    for multiple in (1, 8):
        config = tiny_config(dn_size_multiple=multiple, label_noise=0.0, center_noise=0.0, size_noise=0.0)
        torch.manual_seed(0)
        model = DNDETR(config)
        torch.manual_seed(1)
        losses.append(DNDETRCriterion(config)(model(torch.randn(2, 3, 32, 32), targets=targets), targets))
    for name, value in losses[0].items():
        assert_close(value, losses[1][name], rtol=1e-4, atol=1e-5)


# --- checkpoints -------------------------------------------------------------------------------


def test_own_checkpoints_evaluate_and_start_other_classes(tmp_path, capsys):
    run_tiny(tmp_path / "run", "--epochs", "1")
    options = train_toy.parse_options(["--evaluate", str(tmp_path / "run/last.pt"), "--val-size", "6",
                                       "--device", "cpu"])
    train_toy.evaluate_checkpoint(options, train_toy.Process("cpu"))
    printed = capsys.readouterr().out
    assert printed.count("Average Precision") == 6 and printed.count("Average Recall") == 6

    said = []
    model = train_toy.start_from(tmp_path / "run/last.pt", 3, {"dn_groups": 2}, said.append)
    old, _ = train_toy.load_any(tmp_path / "run/last.pt")
    assert model.config.num_classes == 3 and model.config.dn_groups == 2
    assert "class_head.weight" in said[0] and "label_embedding.weight" in said[0]
    fresh = ("class_head.", "label_embedding.")
    for name, tensor in model.state_dict().items():
        if not name.startswith(fresh):
            assert torch.equal(tensor, old.state_dict()[name]), name
    assert torch.equal(model.label_embedding.weight[-1], old.label_embedding.weight[-1])


def test_the_authors_file_evaluates_with_raw_category_ids(tmp_path, capsys):
    # zeros but for this: every query finds a brush, exactly where it is
    weights = blank_weights(encoder=1, decoder=2, queries=10, feed_forward=32)
    weights["class_embed.bias"] = torch.full((91,), -5.0)
    weights["class_embed.bias"][[0, 1, 90]] = torch.tensor([-9.0, -9.0, 5.0])
    box = torch.tensor([28.0, 14.0, 40.0, 20.0]) / 64
    weights["refpoint_embed.weight"] = inverse_sigmoid(box).repeat(10, 1)
    torch.save({"model": weights}, tmp_path / "official.pth")
    folder, path = write_coco(tmp_path / "data", {1: (64, 64)}, [
        {"image_id": 1, "category_id": 90, "bbox": [8, 4, 40, 20]}], categories=((18, "dog"), (90, "brush")))
    options = train_toy.parse_options(
        ["--evaluate", str(tmp_path / "official.pth"), "--coco-val", str(folder), str(path),
         "--image-size", "64", "--device", "cpu", "--workers", "0"])
    train_toy.evaluate_checkpoint(options, train_toy.Process("cpu"))
    assert capsys.readouterr().out.splitlines()[0].endswith("1.000")


def test_broken_and_foreign_checkpoints_are_refused(tmp_path):
    run_tiny(tmp_path / "run", "--epochs", "1")
    whole = (tmp_path / "run/last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pt can't be read"):
        train_toy.load_any(tmp_path / "half.pt")
    with pytest.raises(ValueError, match="there is no checkpoint file"):
        train_toy.load_any(tmp_path / "none.pt")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["options"]["anchors"] = "normal"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    options = train_toy.parse_options(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    with pytest.raises(ValueError, match="another configuration: anchor_start grid, not normal"):
        train_toy.train(options, train_toy.Process("cpu"))


def test_pretrained_weights_offline_give_a_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent-cache")
    monkeypatch.setattr(os, "makedirs", lambda *args, **kwargs: None)
    model = DNDETR(tiny_config(backbone="resnet18"))
    with pytest.raises(ValueError, match="can't be downloaded"):
        train_toy.load_imagenet(model)
    with pytest.raises(ValueError, match="needs a torchvision backbone"):
        train_toy.load_imagenet(DNDETR(tiny_config(backbone="small")))


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "0"], "--epochs is 0"), (["--lr", "-1"], "--lr is -1"), (["--lr", "nan"], "--lr is nan"),
    (["--workers", "-1"], "--workers is -1, it must not be negative"),
    (["--seed", "-1"], "--seed is -1"), (["--train-size", "0"], "--train-size is 0"),
    (["--coco-train", "a", "b", "--coco-val", "a", "b", "--image-size", "32"], "--image-size is 32"),
    (["--compare", "--dn-groups", "3"], "--compare chooses its runs itself: drop --dn-groups"),
    (["--ablate", "--coco-train", "a", "b"], "--ablate chooses its runs itself: drop --coco-train"),
    (["--seeds", "5"], "only --compare and --ablate train many models: drop --seeds"),
    (["--evaluate", "x.pt", "--epochs", "3"], "--evaluate does not train: drop --epochs"),
    (["--init", "x.pt", "--num-queries", "7"], "--init takes the model from its file: drop --num-queries"),
    (["--coco-train", "a", "b", "--train-size", "9"], "see --subset: drop --train-size"),
    (["--subset", "9"], "for data in COCO format: drop --subset"),
    (["--coco-train", "a", "b"], "needs --coco-val"), (["--coco-val", "a", "b"], "needs --coco-train"),
    (["--resume", "nowhere"], "nowhere.config.json can't be read: No such file"),
    (["--resume", "nowhere", "--lr", "1"], "drop --lr")])
def test_impossible_options_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train_toy.parse_options(flags)


@pytest.mark.parametrize("flags, lr, epochs", [
    ([], 2e-3, 5), (["--dn-groups", "0"], 1e-3, 5), (["--compare"], 1e-3, 12), (["--ablate"], 1e-3, 12),
    (["--coco-train", "a", "b", "--coco-val", "a", "b"], 1e-3, 50), (["--model", "paper"], 1e-4, 5),
    (["--init", "x.pt"], 1e-4, 5)])
def test_learning_rate_and_epochs_suit_what_is_trained(flags, lr, epochs):
    options = train_toy.parse_options(flags)
    assert (options.lr, options.epochs) == (lr, epochs)


def test_an_unknown_device_is_refused():
    for name in ("gpu9", "cuda:99"):
        with pytest.raises(ValueError, match=f"--device {name} can't be used"):
            train_toy.pick_device(name)


def test_the_readme_snippet_makes_the_queries_of_the_model():
    snippet = re.search(r"```python\n(.*?)```", (FILE.parent / "README.md").read_text(), re.S)[1]
    model, targets = DNDETR(DNDETRConfig(**TINY | dict(dn_groups=5))), random_targets(1, 3)
    embed = lambda labels: nn.functional.pad(model.label_embedding(labels), (0, 1), value=1.0)
    names = vars(dn_detr) | {"targets": targets, "num_classes": TINY["num_classes"], "num_queries": 7,
                             "label_embedding": embed, "width": TINY["hidden_dim"]}
    names |= {name: torch.cat([target[name] for target in targets]) for name in ("labels", "boxes")}
    torch.manual_seed(0)
    with torch.no_grad():
        exec(snippet, names)
    torch.manual_seed(0)
    slots, content, anchor_logits = model.denoising_queries(targets, "cpu")
    assert_close(names["content"], content.detach())
    assert_close(inverse_sigmoid(names["anchors"])[slots.is_real], anchor_logits[slots.is_real])
    assert torch.equal(names["blocked"], dn_attention_mask(5, 3, 7))
    for name in ("labels", "boxes"):                    # still the truth, for the loss
        assert torch.equal(names[name], torch.cat([target[name] for target in targets]))


def test_readme_commands_make_sense():
    readme = (FILE.parent / "README.md").read_text()
    commands = re.findall(r"train_toy\.py((?: [^\n`#&|\\]+|\\\n)*)", readme)
    assert len([command for command in commands if command.strip()]) >= 6
    for command in commands:
        flags = shlex.split(command.replace("\\\n", " "))
        parse = train_toy.build_parser().parse_args if "--resume" in flags else train_toy.parse_options
        parse(flags)


# --- experiments -------------------------------------------------------------------------------


def test_experiments_finish_once_and_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_toy, "COMPARED", {
        "random anchors, denoising": ["--anchors", "normal"],
        "random anchors, without": ["--anchors", "normal", "--dn-groups", "0"]})
    flags = ["--compare", "--seeds", "0", "--epochs", "2", "--train-size", "8", "--val-size", "4",
             "--output-dir", str(tmp_path), "--device", "cpu"]
    train_toy.main(flags)
    shown = capsys.readouterr().out
    assert "random anchors, with / without denoising: mean ± standard deviation of 1 seeds" in shown
    assert "| - / - |" in shown.split("| 1 |")[1].splitlines()[0]          # IS needs two epochs
    assert "- / -" not in shown.split("| 2 |")[1] and "with denoising the same" in shown
    data = json.loads((tmp_path / "results.json").read_text())
    assert len(data["runs"]["random anchors, denoising"][0]) == 2
    assert data["runs"]["random anchors, without"][0][0]["loss_denoising"] == 0
    assert (tmp_path / "compare.png").stat().st_size > 5000
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("ran again"))
    train_toy.main(flags)
    with pytest.raises(SystemExit, match="with other lr"):
        train_toy.main([*flags, "--lr", "0.5"])


def test_reaching_the_baseline_is_the_first_epoch_that_does():
    history = [{"AP": ap, "epoch": epoch, "step": 10 * epoch, "seconds": 2.0 * epoch}
               for epoch, ap in enumerate((5, 30, 40, 60), 1)]
    assert train_toy.reach([history, history], 30) == [2, 20, 4]
    assert train_toy.reach([history], 61) is None


def test_compare_measures_against_the_end_of_training_without_denoising(tmp_path, monkeypatch, capsys):
    def history(*precisions):
        return [{"epoch": epoch, "step": 10 * epoch, "seconds": 2.0 * epoch, "AP": ap, "AP50": ap,
                 "instability": None, "anchor_distance": 0.1, "loss_matching": 1.0, "loss_denoising": 0.0}
                for epoch, ap in enumerate(precisions, 1)]

    monkeypatch.setattr(train_toy, "run_all", lambda *_: {
        "random anchors, denoising": [history(10, 40, 50)], "random anchors, without": [history(5, 20, 30)]})
    train_toy.main(["--compare", "--seeds", "0", "--epochs", "3", "--output-dir", str(tmp_path),
                    "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "| 2 | 40.0 ± 0.0 / 20.0 ± 0.0 | 40.0" in shown
    assert "AP 30.0 after 3.0 epochs, 30 steps, 6 s; with denoising the same after 2.0 epochs, 20 st" in shown


def test_mean_and_spread_over_seeds_by_hand():
    histories = [[{"AP": 10.0, "IS": None}], [{"AP": 14.0, "IS": 1.0}]]
    assert train_toy.mean_and_spread(train_toy.column(histories, "AP")[:, 0]) == "12.0 ± 2.0"
    assert train_toy.mean_and_spread(train_toy.column(histories, "IS")[:, 0]) == "-"


def test_without_the_mask_only_empty_slots_are_hidden(tmp_path):
    slots = assign_slots([1, 3], num_groups=2)
    masked, leaking = (train_toy.build_model(tiny_options(tmp_path, *flags), 6).blocked_queries(slots, 2)
                       for flags in ([], ["--no-mask"]))
    assert (masked[1, 0] == dn_attention_mask(2, 3, 2)).all()
    is_empty = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [0] * 8]).bool()
    assert torch.equal(leaking.expand(2, 1, 8, 8)[:, 0], is_empty[:, None].expand(2, 8, 8))


# --- several processes -------------------------------------------------------------------------


def process_half_of_a_batch(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.set_num_threads(1)
    with train_toy.Process("cpu") as process:
        images, targets, config = torch.load(folder / "batch.pt", weights_only=False)
        torch.manual_seed(0)
        model = DNDETR(config)
        part = slice(2 * rank, 2 * rank + 2)
        parallel = process.parallel(model)
        losses = DNDETRCriterion(config)(parallel(images[part], None, targets[part]), targets[part])
        losses["loss"].backward()
        gathered = process.gather(losses["loss"].item())
        if rank == 0:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            torch.save({"loss": sum(gathered) / 2, "gradients": gradients}, folder / "result.pt")


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    # frozen norm, because live batch statistics are those of a process; zero noise, because
    # processes draw their own
    config = tiny_config(backbone="resnet18", label_noise=0.0, center_noise=0.0, size_noise=0.0)
    torch.manual_seed(1)
    images, targets = torch.randn(4, 3, 64, 64), random_targets(3, 1, 0, 2)
    torch.save((images, targets, config), tmp_path / "batch.pt")
    torch.multiprocessing.spawn(process_half_of_a_batch, (tmp_path,), nprocs=2)
    result = torch.load(tmp_path / "result.pt")
    torch.manual_seed(0)
    model = DNDETR(config)
    loss = DNDETRCriterion(config)(model(images, None, targets), targets)["loss"]
    loss.backward()
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (result["gradients"][name] - parameter.grad).norm()
            assert error <= 1e-4 * parameter.grad.norm() + 1e-7, f"{name} is off by {error}"


# --- the notebook ------------------------------------------------------------------------------


def test_notebook_outputs_are_stored_without_errors():
    cells = json.loads((FILE.parent / "walkthrough.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert (FILE.parent / "walkthrough.ipynb").stat().st_size < 2_000_000


def test_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("DN_DETR_FAST", "1")
    notebook = nbformat.read(FILE.parent / "walkthrough.ipynb", as_version=4)
    where = {"metadata": {"path": str(FILE.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
