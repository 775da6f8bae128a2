"""Tests: `pytest`, on a CPU and without network, in about a minute; `pytest -k "mask or noise"` in seconds.

Each test is named after the property it protects and was seen to fail on the bug it is there for. Results are
compared with a naive loop, a case worked by hand, another library, or the authors' own numbers.
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
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
from pathlib import Path

import matplotlib
import numpy as np
import pycocotools.coco
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import box_convert

import dn_detr
import train_toy
from dn_detr import DNDETR, DNDETRConfig, DNDETRCriterion, assign_slots, dn_attention_mask, noise_boxes, noise_labels

matplotlib.use("Agg")
torch.set_num_threads(1)             # more are no faster on such small tensors
FOLDER = Path(dn_detr.__file__).parent
SOURCE = (FOLDER / "dn_detr.py").read_text()
CPU = torch.device("cpu")
CLASSES = 5
TINY = dict(num_classes=CLASSES, num_queries=7, hidden_dim=32, num_heads=4, num_encoder_layers=1, dn_groups=2,
            num_decoder_layers=2, dim_feedforward=48, backbone="small", small_widths=(8, 16, 32))
NO_NOISE = dict(label_noise=0, center_noise=0, size_noise=0)


@pytest.fixture(autouse=True)
def same_seed_for_every_test(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(train_toy, "progress", lambda iterable, description: iterable)


# ---- Helpers ---------------------------------------------------------------------------------------


def tiny_model(**options):
    """A small model whose boxes depend on its contents (those of a fresh one start at the anchors)."""
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
             "boxes": torch.rand(count, 4, generator=generator) * 0.3 + torch.tensor([0.35, 0.35, 0.1, 0.1])}
            for count in counts]


def random_images(batch_size=2, height=32, width=32):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))


def run(model, images, targets=None, padding_mask=None):
    """One forward pass in the mode the model is in, with noise that is the same every time."""
    torch.manual_seed(0)
    return model(images, padding_mask, targets)


def losses_of(model, images, targets):
    return DNDETRCriterion(model.config)(run(model, images, targets), targets)


def edit_copies(monkeypatch, edit):
    """From now on the noised copies of every model are (content, anchor logits) = edit(content, anchor logits)."""
    original = dn_detr.denoising_queries

    def edited(*arguments):
        slots, content, anchor_logits = original(*arguments)
        return slots, *edit(content, anchor_logits)
    monkeypatch.setattr(dn_detr, "denoising_queries", edited)


def copies_as_leaves(monkeypatch):
    """-> a list that receives the copies' content and anchor logits as leaves of the graph."""
    leaves = []

    def as_leaves(content, anchor_logits):
        leaves.extend(x.detach().requires_grad_() for x in (content, anchor_logits))
        return leaves
    edit_copies(monkeypatch, as_leaves)
    return leaves


def random_predictions(layers=2, images=2, queries=4, seed=0):
    """-> logits [L, B, N, C], boxes [L, B, N, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(layers, images, queries, CLASSES, generator=generator),
            torch.rand(layers, images, queries, 4, generator=generator) * 0.3 + 0.2)


def as_outputs(logits, boxes, **more):
    return {"pred_logits": logits[-1], "pred_boxes": boxes[-1], "all_logits": logits, "all_boxes": boxes, **more}


def naive_iou(a, b):
    """IoU, union and hull of two cxcywh boxes, in plain numbers."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    return overlap / (union + 1e-6), union, (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))


def naive_giou(a, b):
    iou, union, hull = naive_iou(a, b)
    return iou - (hull - union) / (hull + 1e-6)       # the authors' epsilon


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
    focal = naive_focal(logits[label], True, alpha, gamma) - naive_focal(logits[label], False, alpha, gamma)
    return (config.cost_class * focal + config.cost_box * naive_l1(box, truth)
            - config.cost_giou * naive_giou(box, truth))


def cheapest_assignment(logits, boxes, target, config):
    """{query: object} of one image, by trying every way to pair each object (or each query) with another one."""
    logits, boxes = logits.tolist(), boxes.tolist()
    labels, truth = target["labels"].tolist(), target["boxes"].tolist()

    def total(pairs):
        return sum(naive_cost(logits[query], boxes[query], labels[k], truth[k], config) for query, k in pairs)
    if len(labels) <= len(boxes):
        ways = (list(zip(queries, range(len(labels)))) for queries in itertools.permutations(range(len(boxes)), len(labels)))
    else:
        ways = (list(enumerate(objects)) for objects in itertools.permutations(range(len(labels)), len(boxes)))
    return dict(min(ways, key=total))


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


# ---- Configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    *((dict([(name, 0)]), f"{name} is 0, it must be at least 1") for name in (
        "num_classes", "num_queries", "num_heads", "num_decoder_layers", "dim_feedforward")),
    *((dict([(name, -1)]), f"{name} is -1, it must be at least 0") for name in (
        "num_encoder_layers", "num_patterns", "dn_groups", "dn_max_queries")),
    *((dict([(name, value)]), rf"{name} is {value}, it must be in \[0, 1\]") for value in (-0.1, 1.01, math.nan)
      for name in ("label_noise", "center_noise", "size_noise")),
    *((dict([(name, 0)]), f"{name} is 0, it must be positive") for name in (
        "image_temperature", "anchor_temperature", "position_frequency")),
    (dict(hidden_dim=0), "hidden_dim is 0"), (dict(hidden_dim=32, num_heads=5), r"hidden_dim is 32.*num_heads \(5\)"),
    (dict(hidden_dim=6, num_heads=3), "hidden_dim is 6.*by 4"), (dict(dropout=1.0), "dropout is 1.0"),
    (dict(activation="swish"), "activation is 'swish', it must be one of prelu, relu, gelu"),
    (dict(backbone="vgg"), "backbone is 'vgg', it must be one of small, resnet18"),
    (dict(backbone="resnet34", dilation=True), "dilation is True"), (dict(small_widths=()), "small_widths is ()")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_impossible_configurations_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DNDETRConfig(**options)


def test_every_field_of_the_configuration_is_read():
    read = {node.attr for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("config", "self.config")}
    assert read == set(DNDETRConfig.__dataclass_fields__)


@pytest.mark.parametrize("options", [
    dict(hidden_dim=24, num_heads=3), dict(num_encoder_layers=0), dict(num_decoder_layers=1), dict(num_classes=1),
    dict(num_queries=1), dict(activation="gelu"), dict(activation="relu"), dict(dropout=0.1), dict(dn_groups=0),
    dict(dn_groups=1), dict(label_noise=1.0), dict(num_patterns=2), dict(small_widths=(8,)), NO_NOISE], ids=str)
def test_every_parameter_gets_a_gradient_whatever_the_choice(options):
    model = tiny_model(**options)
    targets = random_targets(1, 3)
    for target in targets:
        target["labels"] = target["labels"].clamp(max=model.config.num_classes - 1)
    losses_of(model, random_images(), targets)["loss"].backward()
    # With one query there is nothing to choose from; only a second layer scales positions.
    idle = ["self_query", "self_key"] * (options == dict(num_queries=1)) + ["position_scale"] * (options == dict(num_decoder_layers=1))
    for name, parameter in model.named_parameters():
        if not any(part in name for part in idle):
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_noised_labels_train_the_row_of_their_class_and_no_other():
    model, targets = tiny_model(label_noise=0), random_targets(1, 2)
    losses_of(model, random_images(), targets)["loss"].backward()
    used = {*torch.cat([target["labels"] for target in targets]).tolist(), CLASSES}
    trained = model.label_embedding.weight.grad.any(dim=1).nonzero().flatten().tolist()
    assert set(trained) == used and len(used) < CLASSES + 1


def test_dropout_acts_in_training_only():
    images, config = random_images(), DNDETRConfig(**TINY | dict(dropout=0.5))
    model = patch_model(dropout=0.5)
    assert not torch.equal(model(images)["pred_logits"], model(images)["pred_logits"])
    model.eval()
    assert torch.equal(model(images)["pred_logits"], model(images)["pred_logits"])
    attention, x = dn_detr.Attention(config), torch.randn(1, 6, 32)          # also on the attention weights
    assert not torch.equal(attention(x, x, x), attention(x, x, x))
    attention.eval()
    assert torch.equal(attention(x, x, x), attention(x, x, x))


# ---- Boxes, targets, images ------------------------------------------------------------------------


def test_inverse_sigmoid_undoes_the_sigmoid_and_is_clamped_at_one_thousandth():
    logits = torch.linspace(-6.8, 6.8, 50, dtype=torch.float64)
    assert_close(dn_detr.inverse_sigmoid(logits.sigmoid()), logits)
    values = dn_detr.inverse_sigmoid(torch.tensor([-3.0, 0.0, 0.0005, 0.25, 0.9995, 1.0, 2.0]))
    low, high = math.log(0.001), -math.log(0.001)
    expected = [low, low, math.log(0.001 / 0.9995), math.log(1 / 3), math.log(0.9995 / 0.001), high, high]
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
    assert_close(dn_detr.generalized_iou(square, others), expected, rtol=0, atol=1e-5)
    assert_close(dn_detr.generalized_iou(others, square), expected, rtol=0, atol=1e-5)
    assert dn_detr.generalized_iou(others[:, None], others[None]).shape == (6, 6)
    tiny = torch.tensor([0.5, 0.5, 0.001, 0.001])              # an area as large as the authors' epsilon
    assert_close(dn_detr.generalized_iou(tiny, tiny), torch.tensor(0.5), rtol=1e-3, atol=0)


GOOD = [0.5, 0.5, 0.2, 0.2]


@pytest.mark.parametrize("labels, boxes, message", [
    ([1], [[0.2, 0.2, 0.9, 0.9]], r"targets\[1\].*label 1 and box \[0\.2, 0\.2, 0\.9, 0\.9\].*\(x0, y0, x1, y1\)"),
    ([1], [[0.1, 0.7, 0.2, 0.9]], r"0\.1, 0\.7, 0\.2, 0\.9.*\(x0, y0, x1, y1\)"),
    ([1], [[120.0, 80.0, 30.0, 20.0]], r"120\.0, 80\.0, 30\.0, 20\.0.*pixels"),
    ([1, 2], [GOOD, [-0.3, 0.5, 0.2, 0.2]], r"-0\.3, 0\.5.*in \[0, 1\]"),
    ([1], [[0.5, math.nan, 0.2, 0.2]], "nan.*finite"), ([1], [[0.5, 0.5, math.inf, 0.2]], "inf.*finite"),
    ([1], [[0.5, 0.5, 0.0, 0.2]], r"0\.0, 0\.2.*area"), ([1], [[0.5, 0.5, 0.2, -0.0005]], r"-0\.0005.*area"),
    ([CLASSES], [GOOD], rf"targets\[1\] .*label {CLASSES} .*0 \.\. {CLASSES - 1}"), ([2, -1], [GOOD, GOOD], "label -1"),
    ([1, 2], [GOOD], r"targets\[1\].*int64 \[2\].*float32 \[1, 4\]"), ([1], [GOOD[:3]], r"\[1, 3\]"),
    ([1.0], [GOOD], "long.*float32"), ([[1]], [GOOD], r"\[1, 1\]"), ([1], [[0, 0, 1, 1]], "float.*int64")])
def test_impossible_targets_are_refused_by_value(labels, boxes, message):
    # A box in the corner, which can't be (x0, y0, x1, y1), would hide the mistake; these two don't.
    harmless = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.3, 0.3, 0.4, 0.4]])}
    targets = [harmless, {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}]
    outputs = as_outputs(*random_predictions())
    for check in (lambda: dn_detr.check_targets(targets, 2, CLASSES),
                  lambda: tiny_model()(random_images(), targets=targets),
                  lambda: DNDETRCriterion(DNDETRConfig(**TINY))(outputs, targets)):
        with pytest.raises(ValueError, match=message):
            check()


def test_a_wrong_number_of_targets_is_refused():
    with pytest.raises(ValueError, match="1 targets for a batch of 2"):
        tiny_model()(random_images(2), targets=random_targets(1))
    with pytest.raises(ValueError, match="3 targets for a batch of 2"):
        DNDETRCriterion(DNDETRConfig(**TINY))(as_outputs(*random_predictions()), random_targets(1, 1, 1))


def test_boxes_that_stick_out_and_empty_images_are_accepted():
    # Annotators round, and leave boxes that stick out. These can't be (x0, y0, x1, y1).
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0005], [0.9, 0.95, 0.4, 0.2]])
    dn_detr.check_targets([{"labels": torch.tensor([0, CLASSES - 1]), "boxes": boxes}, *random_targets(0)], 2, CLASSES)


@pytest.mark.parametrize("images, mask, message", [
    (torch.rand(3, 32, 32), None, r"\[B, 3, H, W\].*\[3, 32, 32\]"), (torch.rand(2, 1, 32, 32), None, r"\[2, 1, 32, 32\]"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, "uint8"), (torch.zeros(0, 3, 32, 32), None, r"\[0, 3, 32, 32\]"),
    (torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 16, dtype=torch.bool), r"\[2, 32, 16\]"),
    (torch.rand(2, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool), r"\[1, 32, 32\]"),
    (torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32), "float32"),
    (torch.rand(2, 3, 32, 32), torch.arange(2).bool()[:, None, None].expand(2, 32, 32), "covers a whole image.*inverted")],
    ids=range(8))
def test_impossible_images_and_padding_masks_are_refused_by_value(images, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(images, mask)


# ---- Noise -----------------------------------------------------------------------------------------

BOX = torch.tensor([0.5, 0.45, 0.4, 0.2])                      # wide, far from every border


@pytest.mark.parametrize("center_noise, size_noise", [(0.4, 0.2), (0.1, 0.9), (1.0, 1.0)])
def test_box_noise_is_uniform_and_independent_between_its_bounds(center_noise, size_noise):
    noised = noise_boxes(BOX.expand(20000, 4), center_noise, size_noise)
    for values, middle, reach in zip(noised.T, BOX.tolist(), (0.2 * center_noise, 0.1 * center_noise,
                                                              0.4 * size_noise, 0.2 * size_noise)):
        assert_uniform(values, middle - reach, middle + reach)
    assert_close(torch.corrcoef(noised.T), torch.eye(4), rtol=0, atol=0.03)


def test_noise_keeps_centers_in_their_boxes_and_numbers_in_zero_to_one():
    boxes = random_targets(2000)[0]["boxes"]
    assert ((noise_boxes(boxes, 0.99, 1.0) - boxes).abs()[:, :2] < boxes[:, 2:] / 2).all()
    at_border = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.049, 0.951, 0.1, 0.1]]).repeat(500, 1)
    noised = noise_boxes(at_border, 1.0, 1.0)
    assert noised.min() == 0 and noised.max() == 1


@pytest.mark.parametrize("center_noise, size_noise", [(0, 0), (0.4, 0), (0, 0.4)])
def test_each_box_noise_acts_on_its_own_part_and_zero_is_none(center_noise, size_noise):
    boxes = random_targets(50)[0]["boxes"]
    noised = noise_boxes(boxes, center_noise, size_noise)
    for part, noise in ((slice(0, 2), center_noise), (slice(2, 4), size_noise)):
        is_changed = noised[:, part] != boxes[:, part]
        assert is_changed.all() if noise else not is_changed.any()


def test_noise_leaves_its_inputs_alone_and_draws_from_its_generator_only():
    boxes, labels = BOX.repeat(20, 1), torch.arange(20) % CLASSES
    state = torch.get_rng_state()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return noise_boxes(boxes, 0.4, 0.4, generator), noise_labels(labels, 91, 0.5, generator)
    first, again, other = draw(1), draw(1), draw(2)
    for part in (0, 1):
        assert torch.equal(first[part], again[part]) and not torch.equal(first[part], other[part])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(boxes, BOX.repeat(20, 1)) and torch.equal(labels, torch.arange(20) % CLASSES)


@pytest.mark.parametrize("num_classes, label_noise", [(1, 0.2), (2, 0.2), (5, 0.2), (91, 0.2), (5, 0.0)])
def test_label_noise_changes_labels_at_the_rate_gamma_times_one_minus_one_over_c(num_classes, label_noise):
    labels = torch.randint(num_classes, (100000,))
    changed = (noise_labels(labels, num_classes, label_noise) != labels).float().mean()
    assert_close(changed.item(), label_noise * (1 - 1 / num_classes), rtol=0, atol=0.005 * (label_noise > 0))


def test_label_noise_is_uniform_over_the_classes_and_never_unknown():
    share = noise_labels(torch.full((50000,), 3), CLASSES, 1.0).bincount() / 50000    # longer if "unknown" was drawn
    assert_close(share, torch.full((CLASSES,), 1 / CLASSES), rtol=0, atol=0.01)


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_noise_out_of_range_is_refused_by_value(bad):
    for name, call in (("center_noise", lambda: noise_boxes(BOX[None], bad, 0.4)),
                       ("size_noise", lambda: noise_boxes(BOX[None], 0.4, bad)),
                       ("label_noise", lambda: noise_labels(torch.tensor([0]), CLASSES, bad))):
        with pytest.raises(ValueError, match=f"{name} is {bad}"):
            call()


# ---- Groups, slots, noised queries -----------------------------------------------------------------


def naive_slots(counts, num_groups, group_size):
    """-> [(image, slot, source)] sorted, is_real, one copy at a time."""
    copies, is_real = [], [[False] * (num_groups * group_size) for _ in counts]
    for group in range(num_groups):
        sources = itertools.count()
        for image, count in enumerate(counts):
            for index in range(count):
                copies.append((image, group * group_size + index, next(sources)))
                is_real[image][group * group_size + index] = True
    return sorted(copies), is_real


def copies_in(slots):
    return sorted(zip(*(x.tolist() for x in (slots.image, slots.slot, slots.source))))


def test_the_slots_in_the_docstring_are_the_slots():
    slots, text = assign_slots([1, 3], num_groups=2), dn_detr.DenoisingSlots.__doc__
    for name in ("image", "slot", "source"):
        row = re.search(rf"{name} +((\d +)+\d)$", text, re.MULTILINE).group(1)
        assert getattr(slots, name).tolist() == [int(number) for number in row.split()]
    pictures = re.findall(r"image [01]    ([-a-d ]+?)        ", text)
    assert [[letter != "-" for letter in picture.split()] for picture in pictures] == slots.is_real.tolist()
    for image, slot, source in copies_in(slots):
        assert pictures[image].split()[slot] == "abcd"[source]
    assert (slots.num_groups, slots.group_size) == (2, 3)


@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [4], [1, 3], [3, 0, 1], [0, 5, 0, 2, 2]], ids=str)
@pytest.mark.parametrize("num_groups", [0, 1, 2, 5])
def test_slots_are_those_of_a_naive_loop(counts, num_groups):
    slots = assign_slots(counts, num_groups)
    copies, is_real = naive_slots(counts, num_groups, max(counts))
    assert copies_in(slots) == copies and slots.is_real.tolist() == is_real
    assert slots.is_real.shape == (len(counts), num_groups * max(counts))
    assert (slots.num_groups, slots.group_size) == (num_groups, max(counts))


@pytest.mark.parametrize("max_queries, num_groups", [(0, 5), (100, 5), (20, 5), (19, 4), (8, 2), (7, 1), (4, 1), (1, 1)])
def test_a_budget_of_queries_lowers_the_groups_but_never_below_one(max_queries, num_groups):
    slots = assign_slots([2, 4], 5, max_queries=max_queries)
    assert slots.num_groups == num_groups and copies_in(slots) == naive_slots([2, 4], num_groups, 4)[0]
    assert assign_slots([0, 0], 5, max_queries=max_queries).is_real.shape == (2, 0)
    assert assign_slots([2, 4], 0, max_queries=max_queries).num_groups == 0


def test_a_budget_of_queries_changes_the_loss_like_fewer_groups():
    images, targets = random_images(), random_targets(1, 3)
    budget, fewer = (losses_of(tiny_model(**NO_NOISE, **options), images, targets)
                     for options in (dict(dn_groups=5, dn_max_queries=7), dict(dn_groups=2)))
    assert_close(budget, fewer)


@pytest.mark.parametrize("arguments, message", [
    (([1, -2], 3), r"counts \[1, -2\] must not be negative"), (([1], -3), "num_groups -3"),
    (([1], 3, -8), "max_queries -8"), (([], 3), "at least one image")])
def test_impossible_slots_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        assign_slots(*arguments)


def test_a_noised_copy_is_its_label_row_its_box_and_a_one():
    model, targets = tiny_model(**NO_NOISE), random_targets(1, 3)
    targets[1]["boxes"][0] = torch.tensor([0.0, 1.0, 0.9999, 0.0001])
    slots, content, anchor_logits = dn_detr.denoising_queries(targets, model.label_embedding, model.config)
    assert content.shape == (2, 6, 32) and anchor_logits.shape == (2, 6, 4)
    for image, target in enumerate(targets):
        for group, index in itertools.product(range(2), range(len(target["labels"]))):
            row = torch.cat([model.label_embedding.weight[target["labels"][index]], torch.ones(1)])
            box = target["boxes"][index].clamp(0, 1)
            assert torch.equal(content[image, group * 3 + index], row)
            assert_close(anchor_logits[image, group * 3 + index], (box.clamp(min=1e-3) / (1 - box).clamp(min=1e-3)).log())


def test_a_matching_query_is_the_unknown_row_its_anchor_and_a_zero():
    model = tiny_model(num_patterns=3)
    content, anchor_logits = model.matching_queries(2)
    unknown = torch.cat([model.label_embedding.weight[CLASSES], torch.zeros(1)])
    for image, pattern, query in itertools.product(range(2), range(3), range(7)):     # all anchors per pattern
        assert torch.equal(content[image, pattern * 7 + query], unknown + model.patterns.weight[pattern])
        assert torch.equal(anchor_logits[image, pattern * 7 + query], model.anchor_logits.weight[query])
    outputs = run(model, random_images(), random_targets(1, 2))
    assert outputs["pred_logits"].shape == (2, 21, CLASSES) and outputs["dn_logits"].shape == (2, 2, 4, CLASSES)
    assert torch.equal(tiny_model().matching_queries(2)[0], unknown.expand(2, 7, 32))


def test_noise_scales_reach_the_queries_and_every_copy_draws_its_own():
    targets, rows = random_targets(300), []
    for name in ("label_noise", "center_noise", "size_noise"):
        model = tiny_model(**NO_NOISE | {name: 0.5}, dn_groups=2)
        _, content, anchor_logits = dn_detr.denoising_queries(targets, model.label_embedding, model.config)
        first, second = (x[0].split(300) for x in (content, anchor_logits))
        assert not torch.equal(first[0], first[1]) or not torch.equal(second[0], second[1])
        is_other = (first[0][:, :-1] != model.label_embedding(targets[0]["labels"])).any(-1)
        change = (second[0].sigmoid() - targets[0]["boxes"]).abs()
        rows.append([is_other.float().mean(), change[:, :2].max(), change[:, 2:].max()])
    assert torch.equal(torch.tensor(rows) > 1e-4, torch.eye(3, dtype=torch.bool))
    assert 0.3 < rows[0][0] < 0.5                              # 0.5 * (1 - 1/5)


def test_targets_are_left_alone():
    targets = random_targets(2, 3)
    losses_of(tiny_model(label_noise=1.0), random_images(), targets)
    assert_close(targets, random_targets(2, 3), rtol=0, atol=0)


def test_denoising_runs_in_training_with_targets_only():
    model, images, targets = tiny_model(), random_images(), random_targets(1, 2)
    plain = {"pred_logits", "pred_boxes", "all_logits", "all_boxes"}
    assert model(images, targets=targets).keys() == plain | {"dn_logits", "dn_boxes", "dn_slots"}
    assert model(images).keys() == tiny_model(dn_groups=0)(images, targets=targets).keys() == plain
    model.eval()
    assert_close(model(images, targets=targets), model(images), rtol=0, atol=0)


def test_without_groups_the_matching_part_is_left():
    images, targets = random_images(), random_targets(1, 3)
    losses, plain = (losses_of(tiny_model(dn_groups=groups), images, targets) for groups in (5, 0))
    assert plain.keys() == {name for name in losses if not name.startswith("dn_")}
    for name in plain.keys() - {"loss"}:
        assert_close(plain[name], losses[name], rtol=1e-4, atol=1e-5)


# ---- Attention mask, and no leak -------------------------------------------------------------------


@pytest.mark.parametrize("groups, size, matching", [
    (0, 0, 3), (0, 4, 3), (3, 0, 2), (1, 1, 1), (1, 4, 2), (2, 2, 3), (5, 1, 4), (3, 4, 1), (5, 7, 6)])
def test_mask_is_equation_7(groups, size, matching):
    denoising, total = groups * size, groups * size + matching
    expected = torch.tensor([[j < denoising and (i >= denoising or i // size != j // size) for j in range(total)]
                             for i in range(total)])
    mask = dn_attention_mask(groups, size, matching)
    assert mask.dtype == torch.bool and torch.equal(mask, expected)
    assert not mask.all(1).any()                               # a row that sees nothing becomes NaN


def test_mask_in_the_docstring_is_the_mask():
    rows = re.findall(r"^ +[01m] ((?:[.x] ){6}[.x])", dn_attention_mask.__doc__, re.MULTILINE)
    assert torch.equal(dn_attention_mask(2, 2, 3), torch.tensor([[cell == "x" for cell in row.split()] for row in rows]))


def test_mask_of_negative_sizes_is_refused():
    with pytest.raises(ValueError, match="group_size -2"):
        dn_attention_mask(1, -2, 3)


@pytest.mark.parametrize("counts", [[1, 3], [0, 2, 1], [2, 2], [0, 0]], ids=str)
def test_mask_hides_empty_slots_from_every_query(counts):
    blocked, denoising, most = dn_detr.query_mask(assign_slots(counts, 3), num_queries=4), 3 * max(counts), max(counts)
    assert blocked.shape == (len(counts), 1, denoising + 4, denoising + 4)
    for image, i, j in itertools.product(range(len(counts)), *[range(denoising + 4)] * 2):
        other_group = j < denoising and (i >= denoising or i // most != j // most)
        assert blocked[image, 0, i, j] == (other_group or (j < denoising and j % most >= counts[image]))


@pytest.mark.parametrize("patterns", [0, 2])
def test_mask_keeps_matching_predictions_independent_of_ground_truth(patterns):
    model, images = tiny_model(num_patterns=patterns), random_images()
    first, second = (run(model, images, random_targets(1, 3, seed=seed)) for seed in (1, 2))
    others = run(model, images, random_targets(4, 0)), run(model, images, None)
    assert not torch.equal(first["dn_logits"], second["dn_logits"])
    for name in ("all_logits", "all_boxes"):
        assert torch.equal(first[name], second[name])
        for other in others:
            assert_close(first[name], other[name], rtol=1e-4, atol=1e-5)


def test_mask_stops_gradients_from_matching_predictions_into_copies(monkeypatch):
    leaves = copies_as_leaves(monkeypatch)
    outputs = run(tiny_model(), random_images(), random_targets(1, 3))
    matching = outputs["all_logits"].square().sum() + outputs["all_boxes"].square().sum()
    zeros = torch.autograd.grad(matching, leaves, retain_graph=True, materialize_grads=True)
    assert not any(gradient.any() for gradient in zeros)
    denoising = outputs["dn_logits"].square().sum() + outputs["dn_boxes"].square().sum()
    assert all(gradient.any() for gradient in torch.autograd.grad(denoising, leaves))


def test_mask_separates_groups_but_not_the_copies_within_one(monkeypatch):
    images, targets, model = random_images(), random_targets(3, 3), tiny_model(dn_groups=3)
    before = run(model, images, targets)

    def change_copy_0_of_group_1(content, anchor_logits):
        content[:, 3] = torch.randn(32)
        return content, anchor_logits
    edit_copies(monkeypatch, change_copy_0_of_group_1)
    after = run(model, images, targets)
    for name in ("dn_logits", "dn_boxes"):
        changed = (before[name] != after[name]).any(-1)        # [L, B, P*M]
        assert not changed[:, :, :3].any() and changed[:, :, 3:6].all() and not changed[:, :, 6:].any()
    assert torch.equal(before["all_logits"], after["all_logits"])


def test_mask_is_who_influences_whom_in_the_decoder():
    model, mask = tiny_model(num_decoder_layers=3), dn_attention_mask(2, 2, 3)
    content, anchor_logits = torch.randn(1, 7, 32, requires_grad=True), torch.randn(1, 7, 4, requires_grad=True)
    memory, positions = torch.randn(2, 1, 9, 32)
    hidden, anchors = model.decoder(content, anchor_logits, memory, positions, mask[None, None], None, model.box_head)
    result = torch.cat([hidden, anchors], dim=-1) * torch.randn(36)
    for i in range(7):
        for gradient in torch.autograd.grad(result[:, :, i].sum(), (content, anchor_logits), retain_graph=True):
            assert torch.equal(gradient[0].any(-1), ~mask[i])


# ---- Positions, backbone, encoder, initialisation --------------------------------------------------


def naive_sine(coordinate, width, temperature, frequency):
    angles = [2 * math.pi * frequency * coordinate / temperature ** (2 * i / width) for i in range(width // 2)]
    return [f(angle) for angle in angles for f in (math.sin, math.cos)]


@pytest.mark.parametrize("temperature, frequency", [(20, 1), (10000, 1), (20, 4)])
def test_sine_encoding_is_that_of_a_naive_loop(temperature, frequency):
    coordinates = torch.rand(3, 2)
    expected = [[number for x in row for number in naive_sine(x, 8, temperature, frequency)] for row in coordinates.tolist()]
    encoded = dn_detr.sine_encoding(coordinates, 8, temperature, frequency)
    assert_close(encoded, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_anchors_are_encoded_with_their_temperature_and_frequency_and_modulated_by_their_size():
    decoder = tiny_model(anchor_temperature=7.0, position_frequency=3.0).decoder
    anchors, content = torch.rand(1, 1, 4) * 0.5 + 0.2, torch.randn(1, 1, 32)
    cx, cy, w, h = anchors.flatten().tolist()
    sine = torch.tensor([naive_sine(x, 16, 7, 3) for x in (cy, cx, w, h)])
    w_ref, h_ref = decoder.reference_size(content).sigmoid().flatten()
    modulated = torch.cat([sine[0] * h_ref / h, sine[1] * w_ref / w])
    for is_first, scale in ((True, 1), (False, decoder.position_scale(content).flatten())):
        position, query_sine = decoder.encode_anchors(anchors, content, is_first)
        assert_close(position.flatten(), decoder.anchor_mlp(sine.flatten()), rtol=1e-4, atol=1e-5)
        unscaled = torch.cat([(sine[0] * torch.ones(16)), sine[1]]) * scale
        expected = unscaled * torch.cat([(h_ref / h).expand(16), (w_ref / w).expand(16)])
        assert_close(query_sine.flatten(), expected if not is_first else modulated, rtol=1e-4, atol=1e-5)


def test_pixel_coordinates_end_at_the_border_of_the_image_not_of_the_padding():
    padding = torch.tensor([[[False, False, True], [False, False, True], [True, True, True]]])
    for centers, (first, second) in ((False, (0.5, 1.0)), (True, (0.25, 0.75))):
        yx = dn_detr.pixel_coordinates(padding, centers)[0]
        assert_close(yx[:2, :2, 0], torch.tensor([[first, first], [second, second]]), rtol=0, atol=1e-5)
        assert_close(yx[:2, :2, 1], torch.tensor([[first, second], [first, second]]), rtol=0, atol=1e-5)


def test_a_cell_is_padding_if_its_first_pixel_is():
    mask = torch.ones(1, 40, 48, dtype=torch.bool)
    mask[:, :28, :33] = False                                  # 3.5 and 4.1 cells of 8 pixels
    _, _, token_padding = patch_model().encode_image(random_images(1, 40, 48), mask)
    expected = torch.ones(5, 6, dtype=torch.bool)
    expected[:4, :5] = False
    assert torch.equal(token_padding.view(5, 6), expected)


def test_padding_does_not_change_what_is_found():
    model = patch_model(num_encoder_layers=2).eval()
    image = random_images(1, 32, 24)
    padded, mask = torch.randn(1, 3, 48, 56), torch.ones(1, 48, 56, dtype=torch.bool)
    padded[:, :, :32, :24], mask[:, :32, :24] = image, False
    alone, within = model(image), model(padded, mask)
    for name in ("all_logits", "all_boxes"):
        assert_close(within[name], alone[name], rtol=1e-4, atol=1e-4)
    nothing = torch.zeros(1, 32, 24, dtype=torch.bool)
    assert_close(model(image, nothing), alone, rtol=1e-5, atol=1e-5)


def test_a_resnet_backbone_is_torchvisions():
    backbone, channels = dn_detr.build_backbone(DNDETRConfig(backbone="resnet18"))
    reference = resnet18(norm_layer=dn_detr.FrozenBatchNorm2d)
    reference.load_state_dict(backbone.state_dict(), strict=False)
    images = random_images(1, 64, 96)
    expected = create_feature_extractor(reference.eval(), {"layer4": "features"})(images)["features"]
    assert_close(backbone.eval()(images), expected)
    assert channels == 512 and expected.shape == (1, 512, 2, 3)
    frozen = {name.split(".")[0] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert all(p.requires_grad for p in dn_detr.build_backbone(
        DNDETRConfig(backbone="resnet18", frozen_norm=False))[0].parameters())


def test_dc5_dilates_the_last_stage():
    backbone, _ = dn_detr.build_backbone(DNDETRConfig(backbone="resnet50", dilation=True))
    assert [stage[1].conv2.dilation for stage in (backbone.layer2, backbone.layer3, backbone.layer4)] == [
        (1, 1), (1, 1), (2, 2)]
    assert backbone.eval()(random_images(1, 64, 64)).shape == (1, 2048, 4, 4)


def test_the_small_backbone_halves_the_resolution_once_per_width():
    backbone, channels = dn_detr.build_backbone(DNDETRConfig(backbone="small", small_widths=(8, 16, 24, 32)))
    assert channels == 32 and backbone(random_images(2, 64, 32)).shape == (2, 32, 4, 2)


def test_weights_start_as_the_authors_do():
    model = DNDETR(DNDETRConfig(**TINY))
    for part in (model.encoder, model.decoder):
        for name, weight in part.named_parameters():
            if weight.dim() > 1 and weight.numel() > 500:      # Xavier: uniform within +- sqrt(6 / (in + out))
                bound = math.sqrt(6 / sum(weight.shape))
                assert 0.97 * bound < weight.abs().max() <= bound, name
    assert_close(model.class_head.bias.sigmoid(), torch.full((CLASSES,), 0.01))
    boxes = model.eval()(random_images())["all_boxes"]
    assert_close(boxes, model.anchor_logits.weight.sigmoid().expand_as(boxes), rtol=0, atol=1e-5)


def test_predictions_stay_float32_under_autocast():
    model, targets = tiny_model(), random_targets(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model, random_images(), targets)
        losses = DNDETRCriterion(model.config)(outputs, targets)
    assert {outputs[name].dtype for name in outputs if name != "dn_slots"} == {torch.float32}
    losses["loss"].backward()
    assert losses["loss"].isfinite()


# ---- Batches: neighbours, empty images, crowds -----------------------------------------------------


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


def test_the_loss_of_a_batch_is_the_sum_over_its_images():
    model, images, targets = patch_model(**NO_NOISE), random_images(3), random_targets(1, 5, 2)
    together = losses_of(model, images, targets)
    alone = [losses_of(model, images[i:i + 1], targets[i:i + 1]) for i in range(3)]
    for name, value in together.items():
        expected = sum(losses[name] * count for losses, count in zip(alone, (1, 5, 2)))
        assert_close(value * 8, expected, rtol=1e-4, atol=1e-4)


def test_empty_slots_cost_nothing_and_get_no_gradient(monkeypatch):
    leaves, model, targets = copies_as_leaves(monkeypatch), tiny_model(), random_targets(1, 3)
    outputs = run(model, random_images(), targets)
    loss = DNDETRCriterion(model.config)(outputs, targets)["loss"]
    of_outputs = torch.autograd.grad(loss, (outputs["dn_logits"], outputs["dn_boxes"]), retain_graph=True)
    real = outputs["dn_slots"].is_real
    assert (~real).sum() == 4
    for gradient in (*torch.autograd.grad(loss, leaves), *of_outputs[0], *of_outputs[1]):    # [B, P*M, *]
        assert not gradient[~real].any() and gradient[real].any(-1).all()


@pytest.mark.parametrize("counts", [(0, 2), (0, 0), (12, 1)], ids=str)
def test_empty_images_and_crowds_train(counts):
    model, targets = tiny_model(), random_targets(*counts)
    outputs = run(model, random_images(), targets)
    losses = DNDETRCriterion(model.config)(outputs, targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values()) and losses["loss_ce"] > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert outputs["dn_logits"].shape[2] == 2 * max(counts)
    for name, value in losses.items():
        if name.startswith(("dn_", "loss_bbox", "loss_giou")):
            assert (value == 0) == (max(counts) == 0)


# ---- Matching and loss -----------------------------------------------------------------------------

UNUSUAL = DNDETRConfig(**TINY | dict(cost_class=1.5, cost_box=0.7, cost_giou=3.0, loss_class=0.3, loss_box=2.5,
                                     loss_giou=1.7, focal_alpha=0.4, focal_gamma=1.5))
CONFIGS = pytest.mark.parametrize("config", [DNDETRConfig(**TINY), UNUSUAL], ids=["default", "unusual"])


@CONFIGS
def test_matching_cost_is_that_of_a_naive_loop(config):
    logits, boxes = random_predictions()
    targets = random_targets(3, 3)
    labels, truth = (torch.stack([target[name] for target in targets]) for name in ("labels", "boxes"))
    cost = dn_detr.matching_cost(logits, boxes, labels, truth, config)
    assert cost.shape == (2, 2, 4, 3)
    for layer, image, query, k in itertools.product(range(2), range(2), range(4), range(3)):
        expected = naive_cost(logits[layer, image, query].tolist(), boxes[layer, image, query].tolist(),
                              int(labels[image, k]), truth[image, k].tolist(), config)
        assert cost[layer, image, query, k].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@CONFIGS
def test_matching_is_the_cheapest_of_all_assignments(config):
    targets = random_targets(3, 0, 1, 4, 6)                    # the last one has more objects than queries
    for seed in range(3):
        logits, boxes = random_predictions(layers=2, images=5, queries=5, seed=seed)
        pairs = dn_detr.match(logits, boxes, targets, config)
        assert pairs.image.shape == pairs.query.shape == pairs.source.shape == (2, 13)
        for layer, owners in ((layer, pairs_as_dicts(pairs, layer, targets)) for layer in range(2)):
            assert owners == [cheapest_assignment(logits[layer, image], boxes[layer, image], target, config)
                              for image, target in enumerate(targets)]


def test_predictions_that_are_not_finite_are_refused():
    for place, bad in ((0, math.nan), (1, math.nan), (1, math.inf)):
        predictions = random_predictions()
        predictions[place][1, 0, 2] = bad
        with pytest.raises(FloatingPointError, match="not finite"):
            DNDETRCriterion(DNDETRConfig(**TINY))(as_outputs(*predictions), random_targets(1, 2))


def naive_set_loss(logits, boxes, owners, targets, normalizer, config):
    """One layer. owners: {query: object or None} per image; a query that is missing is silent."""
    focal = l1 = giou = 0.0
    for image, target in enumerate(targets):
        for query, k in owners[image].items():
            label = None if k is None else int(target["labels"][k])
            focal += sum(naive_focal(logits[image, query, c].item(), c == label, config.focal_alpha, config.focal_gamma)
                         for c in range(CLASSES))
            if k is not None:
                box, truth = boxes[image, query].tolist(), target["boxes"][k].tolist()
                l1, giou = l1 + naive_l1(box, truth), giou + 1 - naive_giou(box, truth)
    return {"loss_ce": focal / normalizer, "loss_bbox": l1 / normalizer, "loss_giou": giou / normalizer}


def crafted_outputs(groups, layers=3):
    """Random predictions for 4 matching queries and `groups` groups of 3 slots, and two targets."""
    dn_logits, dn_boxes = random_predictions(layers=layers, queries=3 * groups, seed=1)
    return as_outputs(*random_predictions(layers=layers), dn_logits=dn_logits, dn_boxes=dn_boxes,
                      dn_slots=assign_slots([1, 3], groups)), random_targets(1, 3)


@CONFIGS
def test_every_loss_term_is_that_of_a_naive_loop(config):
    outputs, targets = crafted_outputs(groups=2)
    losses, expected = DNDETRCriterion(config)(outputs, targets), {}
    copies = [{0: 0, 3: 0}, {group * 3 + k: k for group in range(2) for k in range(3)}]
    for layer, suffix in enumerate(("_0", "_1", "")):
        logits, boxes = outputs["all_logits"][layer], outputs["all_boxes"][layer]
        owners = [dict.fromkeys(range(4)) | cheapest_assignment(logits[i], boxes[i], targets[i], config) for i in range(2)]
        for prefix, terms in (("", naive_set_loss(logits, boxes, owners, targets, 4, config)),
                              ("dn_", naive_set_loss(outputs["dn_logits"][layer], outputs["dn_boxes"][layer], copies,
                                                     targets, 4 * 2, config))):
            expected |= {prefix + name + suffix: value for name, value in terms.items()}
    weights = {"ce": config.loss_class, "bbox": config.loss_box, "giou": config.loss_giou}
    expected["loss"] = sum(weights[re.search("ce|bbox|giou", name).group()] * value for name, value in expected.items())
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_matching_loss_does_not_change_when_noised_copies_are_added():
    outputs, targets = crafted_outputs(groups=2)
    plain = {name: value for name, value in outputs.items() if not name.startswith("dn_")}
    criterion = DNDETRCriterion(DNDETRConfig(**TINY))
    losses, plain_losses = criterion(outputs, targets), criterion(plain, targets)
    for name in plain_losses.keys() - {"loss"}:
        assert torch.equal(losses[name], plain_losses[name])


def test_more_groups_do_not_mean_a_larger_loss():
    one, three = (losses_of(tiny_model(**NO_NOISE, dn_groups=groups), random_images(), random_targets(1, 3))
                  for groups in (1, 3))
    assert_close(one, three, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("here, elsewhere, normalizer", [(4, 6, 5), (0, 4, 2), (0, 1, 1), (1, 0, 1)])
def test_the_normaliser_is_averaged_over_processes_and_only_then_at_least_one(monkeypatch, here, elsewhere, normalizer):
    logits, boxes = random_predictions(layers=1, images=1, queries=6)
    targets, config = random_targets(here), DNDETRConfig(**TINY)
    alone = DNDETRCriterion(config)(as_outputs(logits, boxes), targets)["loss_ce"] * max(here, 1)
    for name, value in (("is_available", lambda: True), ("is_initialized", lambda: True), ("get_world_size", lambda: 2),
                        ("all_reduce", lambda tensor: tensor.add_(elsewhere))):
        monkeypatch.setattr(torch.distributed, name, value)
    shared = DNDETRCriterion(config)(as_outputs(logits, boxes), targets)["loss_ce"]
    assert_close(shared * normalizer, alone)


# ---- Predictions and instability -------------------------------------------------------------------


def test_postprocess_by_hand():
    logits = torch.tensor([[[2.0, -9.0, -1.0], [0.0, -9.0, 1.0]],               # [B, N = 2, C = 3]
                           [[-3.0, -9.0, -2.0], [4.0, -9.0, -4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]], [[0.1, 0.2, 0.2, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    first, second = dn_detr.postprocess({"pred_logits": logits, "pred_boxes": boxes}, [(100, 200), (10, 10)], num_select=3)
    a, b = [80.0, 30.0, 120.0, 70.0], [0.0, 50.0, 100.0, 100.0]
    c, d = [0.0, 0.0, 2.0, 4.0], [0.0, 0.0, 10.0, 10.0]
    for result, scores, labels, expected in ((first, [2.0, 1.0, 0.0], [0, 2, 0], [a, b, b]),
                                             (second, [4.0, -2.0, -3.0], [0, 2, 0], [d, c, c])):
        assert_close(result["scores"], torch.tensor(scores).sigmoid())
        assert result["labels"].tolist() == labels
        assert_close(result["boxes"], torch.tensor(expected))


@pytest.mark.parametrize("queries, selected", [(7, 7 * CLASSES), (70, 300)])
def test_postprocess_selects_three_hundred_or_what_there_is(queries, selected):
    outputs = {"pred_logits": torch.randn(1, queries, CLASSES), "pred_boxes": torch.rand(1, queries, 4)}
    assert len(dn_detr.postprocess(outputs, torch.tensor([[32, 32]]))[0]["scores"]) == selected


@pytest.mark.parametrize("image_sizes", [[(10, 10)], [(10, 10)] * 3, [10, 10]], ids=str)
def test_postprocess_refuses_sizes_of_other_images(image_sizes):
    outputs = {"pred_logits": torch.zeros(2, 3, CLASSES), "pred_boxes": torch.rand(2, 3, 4)}
    with pytest.raises(ValueError, match=r"each of the 2 images.*\["):
        dn_detr.postprocess(outputs, image_sizes)


def test_matched_objects_are_counted_within_their_image():
    boxes = torch.tensor([[[.2, .2, .1, .1], [.8, .8, .1, .1], [.5, .5, .1, .1]]]).repeat(2, 1, 1)
    targets = [{"labels": torch.tensor([0]), "boxes": boxes[0, [1]]},
               {"labels": torch.tensor([0, 0]), "boxes": boxes[0, [2, 0]]}]
    outputs = as_outputs(torch.zeros(1, 2, 3, CLASSES), boxes[None])
    assert dn_detr.matched_objects(outputs, targets, DNDETRConfig(**TINY)).tolist() == [[-1, 0, -1], [1, -1, 0]]


def test_matching_instability_by_hand():
    instability = dn_detr.matching_instability
    assert instability([0, -1, 1, -1], [0, -1, 1, -1]) == 0
    assert instability([0, -1, 1, -1], [-1, 0, 1, -1]) == 2       # object 0 moved
    assert instability([0, -1, 1, -1], [1, -1, 0, -1]) == 2       # a swap
    assert instability(torch.tensor([0, 1]), torch.tensor([-1, 1])) == 1
    with pytest.raises(ValueError, match="same queries, not 3 and 2"):
        instability([0, 1, -1], [0, 1])


# ---- The authors' weights and numbers --------------------------------------------------------------

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


def resnet_parts(blocks, bottleneck):
    """-> {name: (outputs, inputs, kernel, kernel)} of convolutions, [(name, width)] of their norms, channels."""
    body, channels, growth, parts = "backbone.0.body.", 64, 4 if bottleneck else 1, [("conv1", "bn1", 64, 3, 7)]
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512)), 1):
        for block in range(count):
            name, sizes = f"layer{stage}.{block}.", [(width, channels, 3), (width, width, 3)]
            if bottleneck:
                sizes = [(width, channels, 1), (width, width, 3), (4 * width, width, 1)]
            parts += [(f"{name}conv{i}", f"{name}bn{i}", *size) for i, size in enumerate(sizes, 1)]
            if block == 0 and channels != growth * width:
                parts.append((f"{name}downsample.0", f"{name}downsample.1", growth * width, channels, 1))
            channels = growth * width
    return ({body + conv: (out, into, k, k) for conv, _, out, into, k in parts},
            [(body + norm, out) for _, norm, out, _, _ in parts], channels)


def official_shapes(encoder=2, decoder=3, queries=12, feed_forward=64, blocks=(2, 2, 2, 2), bottleneck=False, patterns=0,
                    slopes=True, width=256, classes=91):
    """Names and shapes of the authors' weights, without the alias of bbox_embed."""
    convolutions, batch_norms, channels = resnet_parts(blocks, bottleneck)
    layers = {f"transformer.{kind}.layers.{i}.": kind for kind, count in (("encoder", encoder), ("decoder", decoder))
              for i in range(count)}
    linears, norms = {"class_embed": (classes, width)}, [("transformer.decoder.norm", width)]
    shapes = {"label_enc.weight": (classes + 1, width - 1), "refpoint_embed.weight": (queries, 4),
              "input_proj.weight": (width, channels, 1, 1), "input_proj.bias": (width,)}
    for name, *sizes in (("bbox_embed", width, width, width, 4), ("transformer.encoder.query_scale", width, width, width),
                         ("transformer.decoder.query_scale", width, width, width),
                         ("transformer.decoder.ref_point_head", 2 * width, width, width),
                         ("transformer.decoder.ref_anchor_head", width, width, 2)):
        linears |= {f"{name}.layers.{i}": ends[::-1] for i, ends in enumerate(itertools.pairwise(sizes))}
    for name, kind in layers.items():
        linears |= {name + "linear1": (feed_forward, width), name + "linear2": (width, feed_forward)}
        squares, count = ["self_attn.out_proj"], 2
        if kind == "encoder":
            shapes |= {name + "self_attn.in_proj_weight": (3 * width, width), name + "self_attn.in_proj_bias": (3 * width,)}
        else:
            projections = "sa_qcontent sa_qpos sa_kcontent sa_kpos sa_v ca_qcontent ca_kcontent ca_kpos ca_v ca_qpos_sine"
            squares += ["cross_attn.out_proj", *(f"{projection}_proj" for projection in projections.split())]
            squares, count = squares + ["ca_qpos_proj"] * ("layers.0." in name), 3
        linears |= {name + square: (width, width) for square in squares}
        norms += [(f"{name}norm{i + 1}", width) for i in range(count)]
        shapes |= {name + "activation.weight": (1,)} if slopes else {}
    shapes |= {f"{name}.weight": shape for name, shape in (convolutions | linears).items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {f"{name}.{part}": (size,) for name, size in norms + batch_norms for part in ("weight", "bias")}
    shapes |= {f"{name}.{part}": (size,) for name, size in batch_norms for part in ("running_mean", "running_var")}
    return shapes | ({"transformer.patterns.weight": (patterns, width)} if patterns else {})


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
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(GOLDEN["losses"], rel=1e-4, abs=0)
    gradients = [p.grad.norm() for p in golden_model.parameters() if p.requires_grad]
    assert torch.stack(gradients).norm().item() == pytest.approx(GOLDEN["gradient_norm"], rel=1e-4)
    matched = dn_detr.matched_objects(outputs, targets, golden_model.config)
    assert [{q: k for q, k in enumerate(row.tolist()) if k >= 0} for row in matched] == GOLDEN["owners"]


def test_the_released_r50_is_the_default_configuration():
    weights = blank_weights(encoder=6, decoder=6, queries=300, feed_forward=2048, blocks=(3, 4, 6, 3), bottleneck=True)
    assert len(weights) == 591
    args = argparse.Namespace(nheads=8, dropout=0.0, transformer_activation="prelu", dilation=False, scalar=5,
                              label_noise_scale=0.2, box_noise_scale=0.4, lr=1e-4)
    weights = {"module." + name: tensor for name, tensor in weights.items()}
    assert DNDETR.from_official({"model": weights, "args": args, "epoch": 49}).config == DNDETRConfig()


def test_a_released_file_is_read_with_its_arguments_and_overridden(tmp_path):
    args = argparse.Namespace(nheads=4, dropout=0.1, transformer_activation="gelu", scalar=3, label_noise_scale=0.5,
                              box_noise_scale=0.3)
    weights = blank_weights(encoder=1, decoder=2, queries=8, slopes=False)
    torch.save({"model": weights, "args": args}, tmp_path / "checkpoint.pth")
    expected = dict(num_queries=8, num_heads=4, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=64, dropout=0.1,
                    activation="gelu", backbone="resnet18", dn_groups=3, label_noise=0.5, center_noise=0.3, size_noise=0.3)
    assert DNDETR.from_official(tmp_path / "checkpoint.pth").config == DNDETRConfig(**expected)
    overrides = dict(num_heads=2, dn_groups=0)
    assert DNDETR.from_official(str(tmp_path / "checkpoint.pth"), **overrides).config == DNDETRConfig(**expected | overrides)
    assert DNDETR.from_official(weights).config.activation == "relu"          # neither slopes nor arguments


@pytest.mark.parametrize("blocks, bottleneck, backbone", [
    ((2, 2, 2, 2), False, "resnet18"), ((3, 4, 6, 3), False, "resnet34"), ((3, 4, 6, 3), True, "resnet50"),
    ((3, 4, 23, 3), True, "resnet101"), ((3, 8, 36, 3), True, "resnet152")])
def test_sizes_are_read_off_the_weights(blocks, bottleneck, backbone):
    weights = blank_weights(encoder=1, decoder=4, queries=9, feed_forward=40, blocks=blocks, bottleneck=bottleneck,
                            width=64, patterns=3, classes=7)
    args = argparse.Namespace(dilation=bottleneck)             # DC5 exists for bottlenecks only
    assert DNDETR.from_official({"model": weights, "args": args}).config == DNDETRConfig(
        num_classes=7, num_queries=9, hidden_dim=64, num_encoder_layers=1, num_decoder_layers=4, dim_feedforward=40,
        num_patterns=3, backbone=backbone, dilation=bottleneck)


def renamed(weights):
    weights["extra.weight"] = weights.pop("transformer.decoder.norm.weight")


def resized(weights):
    weights["input_proj.bias"] = torch.zeros(3)


def of_another_network(weights):
    weights["backbone.0.body.layer9.0.conv7.weight"] = torch.zeros(3)


def of_nothing(weights):
    weights.clear()


@pytest.mark.parametrize("damage, message", [
    (renamed, "(?s)decoder.norm.weight.*extra.weight"), (resized, r"(?s)input_projection.bias.*\[3\].*\[256\]"),
    (of_another_network, "a network of 21 convolutions"), (of_nothing, "not a DN-DETR checkpoint.*class_head.weight")])
def test_weights_that_do_not_fit_are_named(damage, message):
    weights = blank_weights(encoder=1, decoder=1, queries=4)
    damage(weights)
    with pytest.raises(ValueError, match=message):
        DNDETR.from_official(weights)


class Trap:
    """Its pickle makes a directory when it is opened without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("damage", ["absent", "truncated", "tensor", "code"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name_and_runs_no_code(tmp_path, damage):
    path = tmp_path / "some.pth"
    content = {"tensor": torch.zeros(3), "code": {"model": {}, "args": Trap(tmp_path / "sprung")}}
    torch.save(content.get(damage, {"model": {"input_proj.bias": torch.zeros(1000)}}), path)
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="some.pth can't be read as a checkpoint"):
        DNDETR.from_official(path)
    assert not (tmp_path / "sprung").exists()


# ---- The file as a whole ---------------------------------------------------------------------------


def test_the_tour_shows_noise_mask_shapes_and_losses(capsys):
    dn_detr.tour()
    shown = capsys.readouterr().out
    assert re.findall(r"^(\d)\. ", shown, re.MULTILINE) == ["1", "2", "3", "4"]
    assert "    x x x x . . . . . ." in shown and re.search(r"dn_logits +\[2, 2, 4, 3\]", shown)
    assert re.search(r"loss_giou +\d\.\d\d +\d\.\d\d$", shown, re.MULTILINE)


def test_without_sections_2_to_4_and_tagged_lines_the_file_is_dab_detr(monkeypatch):
    before, whole, tour = (SOURCE.index(f"# ---- {section}. ") for section in (2, 5, 15))   # where sections begin
    lines = (SOURCE[:before] + SOURCE[whole:tour]).splitlines()
    kept = [line for line in lines if not line.rstrip().endswith("[DN]")]
    assert 20 <= len(lines) - len(kept) <= 60                  # "dozens of lines of code", abstract
    source, tree, whole = "\n".join(kept), ast.parse("\n".join(kept)), ast.parse(SOURCE[:tour])

    def names(tree, kind):
        return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imported = {alias.asname or alias.name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names}
    orphans = (defined | imported) & names(whole, ast.Load) - names(tree, ast.Load)
    assert not orphans, f"used for denoising only, but not tagged: {orphans}"

    module = types.ModuleType("dab_detr")
    monkeypatch.setitem(sys.modules, "dab_detr", module)
    exec(compile(source, "dab_detr", "exec"), module.__dict__)
    assert not [field for field in module.DNDETRConfig.__dataclass_fields__ if "dn_" in field or "noise" in field]
    full = tiny_model(dn_groups=0)
    dab = module.DNDETR(module.DNDETRConfig(**{name: value for name, value in TINY.items() if name != "dn_groups"}))
    nn.init.zeros_(full.label_embedding.weight)                # DAB-DETR's contents start from zero
    weights = full.state_dict()
    del weights["label_embedding.weight"]
    dab.load_state_dict(weights)
    images, targets = random_images(), random_targets(1, 3)
    expected, outputs = run(full, images, targets), run(dab, images, targets)
    assert_close(outputs, expected, rtol=0, atol=0)
    assert_close(module.DNDETRCriterion(dab.config)(outputs, targets), DNDETRCriterion(full.config)(expected, targets))


def test_everything_public_is_documented():
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name
            assert not set(ast.get_docstring(node)) & set(map(chr, range(32))) - {"\n"}, node.name


# ---- train_toy.py: data ----------------------------------------------------------------------------

SHAPES_RUN = ["--train-size", "16", "--val-size", "6", "--epochs", "2", "--device", "cpu"]


def train_tiny(folder, *flags):
    return train_toy.train(train_toy.parse_options([*SHAPES_RUN, "--output-dir", str(folder), *flags]), CPU)


def refused(capsys, *flags):
    """What the program says when it ends because of these flags."""
    with pytest.raises(SystemExit) as ended:
        train_toy.main([str(flag) for flag in flags])
    assert ended.value.code not in (0, None)
    return f"{ended.value.code} {capsys.readouterr().err}"


def write_coco(folder, sizes, annotations, categories=((3, "cat"), (7, "dog")), extra=""):
    """A COCO folder: images {id: (width, height)} of noise; returns its two paths."""
    pictures = folder / "images"
    pictures.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for image_id, (width, height) in sizes.items():
        Image.fromarray(rng.randint(0, 255, (height, width, 3)).astype(np.uint8)).save(pictures / f"{image_id}.png")
    (folder / "annotations.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in sizes.items()],
        "annotations": [{"id": k, **annotation} for k, annotation in enumerate(annotations)],    # from 0, as many do
        "categories": [{"id": i, "name": name} for i, name in categories]}))
    return str(pictures), str(folder / "annotations.json")


def box_of(image_id, category_id, *bbox, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


def tiny_coco(folder):
    """Ids with gaps, a crowd, a degenerate box, one that reaches out, an empty image, mixed sizes."""
    return write_coco(folder, {5: (80, 64), 8: (64, 80), 9: (64, 64)}, [
        box_of(5, 7, 6, 4, 30, 20), box_of(5, 3, 60, 10, 40, 20), box_of(5, 3, 10, 10, 0, 5),
        box_of(8, 3, 4, 6, 20, 30), box_of(8, 3, 0, 0, 64, 80, iscrowd=1, area=2400)])


def test_shapes_touch_all_four_sides_of_their_boxes_at_every_size():
    for (name, inside), size in itertools.product(train_toy.SHAPES.items(), (9, 12, 20, 80)):
        v, u = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
        mask = inside(u, v)
        assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any(), (name, size)


def test_shapes_depend_on_seed_split_and_index_only_and_are_the_same_scene_at_256_pixels():
    first, again, longer = (train_toy.ShapesDataset(size, 1, "val") for size in (4, 4, 6))
    for index in range(4):
        (image, target), (same, _), (also, _) = first[index], again[index], longer[index]
        assert torch.equal(image, same) and torch.equal(image, also)
        large = first.picture(index).float().unflatten(1, (64, 4)).unflatten(3, (64, 4)).mean((2, 4))
        assert (large - image.float()).abs().mean() < 12 and first.picture(index).shape == (3, 256, 256)
    for other in (train_toy.ShapesDataset(4, 2, "val"), train_toy.ShapesDataset(4, 1, "train")):
        assert not torch.equal(first[0][0], other[0][0])


def test_shapes_hold_empty_and_crowded_images_inside_and_little_overlap():
    dataset = train_toy.ShapesDataset(200, 0, "train")
    counts = [len(labels) for labels in dataset.labels]
    assert min(counts) == 0 and max(counts) > 8 and set(torch.cat(dataset.labels).tolist()) == set(range(6))
    assert not dataset.clipped and not dataset.dropped
    for boxes in dataset.boxes:
        for a, b in itertools.combinations(boxes, 2):
            overlap = (torch.minimum(a, b)[2:] - torch.maximum(a, b)[:2]).clamp(min=0).prod()
            assert overlap <= 0.301 * min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())


def test_augmentation_depends_on_seed_epoch_and_index_only_and_moves_boxes_with_the_image():
    dataset = train_toy.ShapesDataset(40, 0, "train", augment=True)
    plain = train_toy.ShapesDataset(40, 0, "train")
    state, first = torch.get_rng_state(), [dataset[index] for index in range(40)]
    assert torch.equal(state, torch.get_rng_state()), "augmentation disturbs the noise"
    torch.rand(3)
    assert all(torch.equal(dataset[index][0], first[index][0]) for index in reversed(range(40)))
    dataset.epoch = 1
    assert sum(torch.equal(dataset[index][0], first[index][0]) for index in range(40)) < 10
    mirrored = 0
    for index, (image, target) in ((index, item) for index, item in enumerate(first) if len(item[1]["labels"])):
        boxes = plain[index][1]["boxes"]
        spread = plain[index][0].float().std(0)                # recoloring keeps channels' spread, mirrored or not
        is_mirrored = not torch.equal(image.float().std(0), spread)
        mirrored += is_mirrored
        assert_close(target["boxes"], boxes * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0]) if is_mirrored else boxes)
        assert_close(image.float().std(0), spread.flip(-1) if is_mirrored else spread)
    assert 8 < mirrored < 32


def test_coco_loader_handles_gaps_crowds_degenerate_boxes_and_empty_images(tmp_path):
    dataset = train_toy.CocoDataset(*tiny_coco(tmp_path), image_size=64)
    assert (dataset.dropped, dataset.clipped, dataset.names) == (1, 1, {3: "cat", 7: "dog"})
    (wide, wide_target), (tall, tall_target), (_, empty) = (dataset[index] for index in range(3))
    assert wide_target["labels"].tolist() == [1, 0] and tall_target["labels"].tolist() == [0]      # not the crowd
    expected = torch.tensor([[21 / 80, 14 / 64, 30 / 80, 20 / 64], [70 / 80, 20 / 64, 20 / 80, 20 / 64]])
    assert_close(wide_target["boxes"], expected)
    assert wide.shape == (3, 64, 80) and tall.shape == (3, 80, 64) and wide_target["size"] == (64, 80)
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)
    dataset = train_toy.CocoDataset(*tiny_coco(tmp_path / "again"), image_size=48, augment=True)
    for epoch in range(8):
        dataset.epoch = epoch
        dn_detr.check_targets([dataset[index][1] for index in range(3)], 3, 2)


def test_the_longer_side_is_limited_to_five_thirds():
    sizes = [tuple(train_toy.coco_transform(60, False)(torch.zeros(3, *size, dtype=torch.uint8)).shape[1:])
             for size in ((120, 150), (150, 120), (60, 300), (300, 60))]
    assert sizes == [(60, 75), (75, 60), (20, 100), (100, 20)]


def test_batches_are_padded_masked_and_normalised_with_imagenets_numbers():
    items = [(torch.full((3, h, w), 200, dtype=torch.uint8), {}) for h, w in ((4, 6), (6, 5))]
    images, mask, _ = train_toy.collate(items)
    assert images.shape == (2, 3, 6, 6)
    for index, (height, width) in enumerate(((4, 6), (6, 5))):
        assert mask[index].tolist() == [[y >= height or x >= width for x in range(6)] for y in range(6)]
    normalized, _ = train_toy.normalize(images, mask, CPU)
    for channel, (average, deviation) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):   # R, G, B
        expected = torch.where(mask, 0.0, (200 / 255 - average) / deviation)
        assert_close(normalized[:, channel], expected, rtol=1e-3, atol=1e-3)
    assert train_toy.collate(items[:1] * 2)[1] is None


@pytest.mark.parametrize("change, message", [
    (lambda data: data["annotations"][1].update(image_id=77), "needs the image_id of an image.*'image_id': 77"),
    (lambda data: data["annotations"][1].update(category_id=4), "the category_id of a category.*'category_id': 4"),
    (lambda data: data["annotations"][1].update(bbox=[1, 2, 3]), r"bbox \[x, y, width, height\].*\[1, 2, 3\]"),
    (lambda data: data["annotations"][1].update(bbox=None), "not in COCO format"),
    (lambda data: data["images"][2].update(id=5), "two images or two categories have the same id"),
    (lambda data: data["images"][1].pop("height"), "not in COCO format.*height"),
    (lambda data: data.pop("categories"), "not in COCO format.*categories"),
    (lambda data: data["images"].clear() or data["annotations"].clear(), "has no images"),
    (lambda data: [a.update(bbox=[a["bbox"][0], a["bbox"][1], 79, 60]) for a in data["annotations"]],
     "boxes reach out of their image.*x0, y0, x1, y1"),
    (lambda data: data["images"][0].update(file_name="gone.png"), "1 of 3 images are not in .*gone.png"),
    ("not json", "can't be read as JSON"), (None, "can't be read as JSON.*No such file")])
def test_broken_annotations_are_named_before_training(tmp_path, change, message):
    folder, path = tiny_coco(tmp_path)
    data = json.loads(Path(path).read_text())
    if change is None:
        os.remove(path)
    elif isinstance(change, str):
        Path(path).write_text(change)
    else:
        change(data)
        Path(path).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        train_toy.CocoDataset(folder, path, 64)


def test_broken_resized_and_turned_images_are_named(tmp_path):
    folder, path = tiny_coco(tmp_path)
    dataset = train_toy.CocoDataset(folder, path, 64)
    Image.new("RGB", (64, 80)).save(f"{folder}/5.png")
    with pytest.raises(ValueError, match=r"5\.png has \(80, 64\) pixels.*\(64, 80\).*EXIF"):
        dataset[0]
    Path(f"{folder}/8.png").write_bytes(b"this is no picture")
    with pytest.raises(ValueError, match=r"8\.png can't be read"):
        dataset[1]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "turned"])
def test_images_of_every_kind_are_read_as_rgb(tmp_path, mode):
    gray, exif = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6), Image.Exif()
    image = Image.fromarray(gray.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(gray)
    if mode == "turned":
        exif[0x0112] = 6                                       # to be turned by 90 degrees clockwise
    elif mode != "I;16":
        image = image.convert(mode)
    image.save(tmp_path / "image.png", exif=exif)
    expected = np.rot90(gray, -1) if mode == "turned" else gray
    for channel in train_toy.read_image(tmp_path / "image.png", upright=True):
        assert channel.tolist() == expected.tolist()
    assert train_toy.read_image(tmp_path / "image.png").shape == (3, 4, 6)


def test_held_out_data_of_other_categories_or_without_objects_are_refused(tmp_path):
    train = write_coco(tmp_path / "train", {1: (64, 64)}, [box_of(1, 3, 8, 4, 20, 20)])
    others = write_coco(tmp_path / "names", {1: (64, 64)}, [box_of(1, 3, 8, 4, 20, 20)], ((3, "cow"), (7, "dog")))
    empty = write_coco(tmp_path / "empty", {1: (64, 64)}, [])
    for val, message in ((others, "categories differ: --coco-train has .*'cat'.*'cow'"), (empty, "hold no object")):
        with pytest.raises(ValueError, match=message):
            train_toy.build_datasets(train_toy.parse_options(["--coco-train", *train, "--coco-val", *val]))


def test_the_data_are_described_and_what_can_not_be_learned_is_warned_of(tmp_path):
    config = DNDETRConfig(**TINY | dict(num_queries=1, num_classes=2))       # stride 8
    folder, path = write_coco(tmp_path, {1: (128, 128), 2: (128, 256)}, [
        box_of(1, 3, 8, 4, 20, 20), box_of(1, 3, 40, 40, 15, 15), box_of(2, 3, 8, 4, 64, 50), box_of(2, 3, 9, 9, 0, 9)])
    text = train_toy.describe(train_toy.CocoDataset(folder, path, 64), config, 64, is_random=True)
    assert "2 training images, 3 objects, 1.5 per image and at most 2, 33% of them smaller" in text    # 15 / 2 < 8
    assert "cat 3, dog 0" in text
    for warning in ("more than the model has queries (1)", "no training object is a dog", "one class", "1 boxes without area",
                    "smaller than a feature cell", "random weights and 2 photographs"):
        assert f"{warning}" in text.split("warning", 1)[1], warning
    shapes = train_toy.describe(train_toy.ShapesDataset(50, 0, "train"), DNDETRConfig(**TINY | dict(num_queries=20)), 64, False)
    assert "warning" not in shapes


# ---- train_toy.py: the recipe ----------------------------------------------------------------------


def tiny_run(lr=0.01, num_steps=10, **options):
    return train_toy.Run(tiny_model(**options), lr, num_steps, CPU)


def tiny_batches(count):
    return [(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), None,
             [target | {"image_id": 7} for target in random_targets(1, 2, seed=index)]) for index in range(count)]


def test_training_steps_are_adamw_steps_done_by_hand():
    run, batches, reference = tiny_run(), tiny_batches(3), tiny_model()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in reference.named_parameters()}
    torch.manual_seed(5)
    train_toy.train_one_epoch(run, batches)
    torch.manual_seed(5)
    for step, (images, _, targets) in enumerate(batches):
        inputs, _ = train_toy.normalize(images, None, CPU)
        reference.train().zero_grad()
        DNDETRCriterion(reference.config)(reference(inputs, None, targets), targets)["loss"].backward()
        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
        assert norm > 0.1
        rate = 0.01 * min((step + 1) / 2, 1 - step / 10)              # 2 steps of warm-up, then decay
        with torch.no_grad():
            for name, p in reference.named_parameters():
                gradient, (first, second) = p.grad * 0.1 / norm, moments[name]
                first.mul_(0.8).add_(0.2 * gradient)
                second.mul_(0.95).add_(0.05 * gradient ** 2)
                p.mul_(1 - rate * 0.05)
                p.sub_(rate * first / (1 - 0.8 ** (step + 1)) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    for name, parameter in reference.named_parameters():
        assert_close(run.model.get_parameter(name), parameter, rtol=1e-3, atol=2e-4, msg=lambda text: f"{name}: {text}")


def test_a_pretrained_backbone_has_a_tenth_of_the_rate_and_its_frozen_stages_none():
    for frozen_norm, factor in ((True, 0.1), (False, 1)):
        model = tiny_model(backbone="resnet18", frozen_norm=frozen_norm)
        optimizer, _ = train_toy.build_optimizer(model, 0.01, 1000)
        rate_of = {p: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}
        for name, parameter in model.named_parameters():
            expected = 0.01 * factor if name.startswith("backbone.") else 0.01
            assert rate_of.get(parameter) == (pytest.approx(expected) if parameter.requires_grad else None), name


def test_the_rate_warms_up_in_a_hundred_steps_and_decays_to_zero():
    optimizer, schedule = train_toy.build_optimizer(tiny_model(), 0.01, 2000)
    rates = []
    for _ in range(2000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in ((0, 1e-4), (49, 5e-3), (500, 7.5e-3), (1500, 2.5e-3), (1999, 5e-6)):
        assert rates[step] == pytest.approx(rate)


def test_an_easier_start_looks_at_the_anchor_from_a_grid_and_everything_can_learn():
    model = tiny_model(num_queries=7, anchor_temperature=20, position_frequency=4, num_encoder_layers=1)
    train_toy.ease_start(model)
    x, y = torch.tensor([1, 3, 5, 1, 3, 5, 1]) / 6, torch.tensor([1, 1, 1, 3, 3, 3, 5]) / 6
    assert_close(model.anchor_logits.weight.sigmoid(), torch.stack([x, y, *torch.full((2, 7), 0.3)], 1), rtol=0, atol=1e-5)
    places = torch.cartesian_prod(*[(torch.arange(6) + 0.5) / 6] * 2)           # (y, x) of 36 cells
    encoded = dn_detr.sine_encoding(places, 16, 20.0, 4.0)
    content = torch.randn(1, 36, 32)
    for layer in model.decoder.layers:
        scores = layer.cross_query_sine(encoded) @ layer.cross_key_position(encoded).T
        assert torch.equal(scores.argmax(-1), torch.arange(36))
        assert_close(scores / scores[0, 0], encoded @ encoded.T / (encoded @ encoded.T)[0, 0], rtol=1e-3, atol=1e-4)
    for part in (model.encoder, model.decoder):
        assert torch.equal(part.position_scale(content), torch.ones(1, 36, 32))
    assert all(parameter.requires_grad for parameter in model.parameters())
    at_random = tiny_model()
    before = at_random.anchor_logits.weight.clone()
    train_toy.ease_start(at_random, on_grid=False)
    assert torch.equal(at_random.anchor_logits.weight, before)


@pytest.fixture
def watched(monkeypatch):
    """Records what happens during training."""
    seen = types.SimpleNamespace(modes=[], rates=[], orders=[], seeds=[], touched=[], matchings=[])
    evaluate, train_one_epoch = train_toy.evaluate, train_toy.train_one_epoch

    def watched_evaluate(model, *arguments, **options):
        hook = model.register_forward_pre_hook(lambda module, _: seen.modes.append(module.training))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        result = evaluate(model, *arguments, **options)
        seen.touched.append([name for name, value in model.state_dict().items() if not torch.equal(value, before[name])])
        hook.remove()
        seen.matchings.append(result[1])
        return result

    def watched_epoch(run, batches, description):
        seen.seeds.append(torch.initial_seed())
        batches = list(batches)
        seen.orders.append([target["image_id"] for _, _, targets in batches for target in targets])
        losses = train_one_epoch(run, batches, description)
        seen.rates.append(run.optimizer.param_groups[0]["lr"])
        return losses

    monkeypatch.setattr(train_toy, "evaluate", watched_evaluate)
    monkeypatch.setattr(train_toy, "train_one_epoch", watched_epoch)
    return seen


def test_a_run_does_what_it_should_epoch_by_epoch(tmp_path, monkeypatch, watched):
    precisions = iter([30.0, 50.0, 40.0, 45.0])
    metrics = train_toy.coco_metrics
    monkeypatch.setattr(train_toy, "coco_metrics", lambda *arguments: metrics(*arguments) | {"AP": next(precisions)})
    history = train_tiny(tmp_path / "run", "--epochs", "4")
    assert set(watched.modes) == {False} and not any(watched.touched), "evaluation must not train"
    assert watched.rates == pytest.approx([3e-3 * (1 - 2 * epoch / 8) for epoch in (1, 2, 3, 4)])
    assert len(set(map(tuple, watched.orders))) == 4 and len(set(watched.seeds)) == 4
    assert all(sorted(order) == list(range(16)) for order in watched.orders)
    for epoch in (1, 2, 3):                                    # IS compares with the epoch before, not with the first
        before, after = watched.matchings[epoch - 1:epoch + 1]
        expected = np.mean([(before[i][0] != after[i][0]).sum().item() for i in after])
        assert history[epoch]["instability"] == pytest.approx(expected)
    assert history[0]["instability"] is None
    assert torch.load(tmp_path / "run/best.pt")["epoch"] == 2, "best.pt is the best of all epochs"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == history and [row["step"] for row in rows] == [2, 4, 6, 8]
    weights = {"ce": 2, "bbox": 5, "giou": 2}
    for row in rows:
        parts = {prefix: sum(weight * value for kind, weight in weights.items() for name, value in row.items()
                             if name.startswith(f"{prefix}loss_{kind}")) for prefix in ("", "dn_")}
        assert (row["loss_matching"], row["loss_denoising"]) == pytest.approx((parts[""], parts["dn_"]), rel=1e-4)
        assert row["loss"] == pytest.approx(sum(parts.values()), rel=1e-4)
    for name in ("config.json", "curves.png", "detections.png"):
        assert (tmp_path / "run" / name).stat().st_size > 500


def test_the_mean_of_an_epochs_losses_is_that_of_its_steps():
    run, batches, seen = tiny_run(), tiny_batches(3), []
    run.criterion.register_forward_hook(lambda module, inputs, losses: seen.append(losses["loss"].item()))
    assert train_toy.train_one_epoch(run, batches)["loss"] == pytest.approx(np.mean(seen), rel=1e-5)


@pytest.mark.parametrize("call, what", [(1, "loss"), (3, "loss"), (1, "gradient"), (2, "prediction"), (3, "gradient")])
def test_a_step_that_is_not_finite_stops_the_epoch_and_is_named(call, what):
    run, calls = tiny_run(num_steps=3), []

    def poison(module, inputs, losses):
        calls.append(1)
        if len(calls) == call and what == "loss":
            losses["loss"] = losses["loss"] * math.nan
        elif len(calls) == call and what == "gradient":
            losses["loss"].register_hook(lambda gradient: gradient * math.inf)

    def blind(module, inputs, outputs):
        if what == "prediction" and len(calls) == call - 1:
            outputs["all_boxes"] = outputs["all_boxes"] * math.nan
    run.criterion.register_forward_hook(poison)
    run.model.register_forward_hook(blind)
    with pytest.raises(FloatingPointError, match=rf"step {call - 1}, images \[7, 7\].* not finite"):
        train_toy.train_one_epoch(run, tiny_batches(3))


def test_mixed_precision_stays_close_to_float32(tmp_path):
    plain, mixed = (train_tiny(tmp_path / name, "--epochs", "1", *flags)[0]["loss"]
                    for name, flags in (("plain", []), ("mixed", ["--amp"])))
    assert mixed == pytest.approx(plain, rel=0.03) and mixed != plain


def test_bfloat16_is_used_only_where_it_is_not_emulated(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation))
    assert train_toy.amp_dtype(torch.device("cuda")) == torch.float16 and asked == [False]       # a T4
    assert train_toy.amp_dtype(CPU) == torch.bfloat16
    assert not dn_detr.to_device(torch.zeros(3), "cpu").is_cuda


# ---- train_toy.py: evaluation ----------------------------------------------------------------------


class Fixed(nn.Module):
    """A detector that says, image after image, what it is given: logits [N, C] and boxes [N, 4]."""

    def __init__(self, *predictions, anchors=((0.0, 0.0, 0.0, 0.0),)):
        super().__init__()
        self.config = DNDETRConfig(**TINY | dict(num_queries=len(anchors), num_classes=2))
        self.anchor_logits = nn.Embedding.from_pretrained(torch.tensor(anchors))
        self.predictions = iter(predictions)

    def forward(self, images, padding_mask):
        logits, boxes = map(torch.tensor, next(self.predictions))
        return {"pred_logits": logits[None], "pred_boxes": boxes[None]}


def test_a_perfect_prediction_has_an_ap_of_100_in_original_pixels_also_for_annotation_id_0(tmp_path):
    paths = write_coco(tmp_path, {1: (160, 80), 2: (80, 160)}, [box_of(1, 3, 16, 8, 80, 40), box_of(2, 7, 8, 16, 40, 80)])
    dataset = train_toy.CocoDataset(*paths, image_size=64)
    model = Fixed(([[5.0, -5.0]], [[56 / 160, 28 / 80, 0.5, 0.5]]), ([[-5.0, 5.0]], [[28 / 80, 56 / 160, 0.5, 0.5]]))
    metrics, matching = train_toy.evaluate(model, dataset, CPU, batch_size=1)
    assert (metrics["AP"], metrics["AP75"]) == pytest.approx((100, 100))
    assert metrics["AP_per_class"] == pytest.approx({"cat": 100, "dog": 100})
    assert {key: (row.tolist(), found.tolist()) for key, (row, found) in matching.items()} == {1: ([0], [True]), 2: ([0], [True])}
    distance = (math.dist((0.5, 0.5), (0.35, 0.35)))            # anchors are logits: 0 is the middle of the image
    assert metrics["anchor_distance"] == metrics["anchor_distance_found"] == pytest.approx(distance, abs=1e-5)
    assert "cat" in train_toy.class_table(dataset, metrics["AP_per_class"]) and "100.0" in train_toy.class_table(
        dataset, metrics["AP_per_class"])


def test_ap_of_each_class_and_found_distances_leave_out_what_is_not_found(tmp_path):
    paths = write_coco(tmp_path, {1: (64, 64)}, [box_of(1, 3, 0, 0, 32, 32), box_of(1, 7, 32, 32, 32, 32)])
    dataset = train_toy.CocoDataset(*paths, image_size=64)
    boxes = [[0.25, 0.25, 0.5, 0.5], [0.9, 0.1, 0.1, 0.1]]      # the cat, and nothing
    model = Fixed(([[5.0, -5.0], [-5.0, 2.0]], boxes), anchors=((0.0,) * 4, (9.0,) * 4))
    metrics, matching = train_toy.evaluate(model, dataset, CPU)
    assert metrics["AP_per_class"] == pytest.approx({"cat": 100, "dog": 0}) and metrics["AP"] == pytest.approx(50)
    assert matching[1][0].tolist() == [0, 1] and matching[1][1].tolist() == [True, False]
    assert metrics["anchor_distance_found"] == pytest.approx(math.dist((0.5, 0.5), (0.25, 0.25)), abs=1e-4)
    assert metrics["anchor_distance"] > metrics["anchor_distance_found"] - 1e-4


def test_matchings_of_two_epochs_are_compared_by_hand():
    def epoch(*rows):
        return {index: (torch.tensor(matched), torch.tensor(found, dtype=torch.bool)) for index, (matched, found) in enumerate(rows)}
    before = epoch(([0, 1, -1], [1, 1, 0]), ([-1, 0, -1], [0, 1, 0]))
    after = epoch(([0, -1, 1], [1, 0, 1]), ([0, -1, -1], [0, 0, 0]))
    # Image 0: object 1 moved; both found both times. Image 1: object 0 moved, but is not found any more.
    assert train_toy.compare_matching(before, after) == (2.0, pytest.approx(50))
    assert train_toy.compare_matching({}, after) == (None, None)
    nothing = epoch(([0, 1, -1], [0, 0, 0]), ([-1, 0, -1], [0, 0, 0]))
    assert train_toy.compare_matching(nothing, nothing) == (0.0, None)


def test_pictures_mark_what_is_right_missed_wrong_and_found_twice():
    true_boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    result = {"scores": torch.tensor([0.9, 0.8, 0.7, 0.2]), "labels": torch.tensor([0, 0, 1, 1]),
              "boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30]])}
    boxes, texts, colors = train_toy.judge(result, torch.tensor([0, 1]), true_boxes, ["cat", "dog"], threshold=0.5)
    assert texts == ["cat 0.90", "cat 0.80 again", "dog 0.70 wrong", "dog missed"]
    assert colors == [train_toy.COLORS[0], "red", "red", "red"] and torch.equal(boxes[3], true_boxes[1])
    picture = np.asarray(train_toy.draw_boxes(torch.zeros(3, 40, 60, dtype=torch.uint8), boxes, texts, colors))
    assert picture.shape == (40, 60, 3) and (picture[30, 25] == [255, 0, 0]).all()


# ---- train_toy.py: interruptions -------------------------------------------------------------------


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two epochs that nothing interrupts: folder and history."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, train_tiny(folder)


def assert_same_run(folder, straight):
    straight_folder, history = straight
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert without_seconds(rows) == without_seconds(history)
    names = [sorted(path.name for path in x.iterdir() if path.suffix != ".tmp" and path.name != "log") for x in (folder, straight_folder)]
    assert names[0] == names[1]
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(x / name) for x in (folder, straight_folder))
        assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
        assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0)
        assert ours["epoch"] == theirs["epoch"]


@pytest.mark.parametrize("what, moment", [*(("write", moment) for moment in range(12)), ("step", 1), ("step", 3)])
def test_a_run_stopped_at_any_moment_ends_as_if_never_stopped(tmp_path, monkeypatch, straight, what, moment):
    replace, backward, done = os.replace, torch.Tensor.backward, []

    def count_down(function):
        def counted(*arguments, **options):
            if len(done) == moment:
                raise KeyboardInterrupt
            done.append(1)
            return function(*arguments, **options)
        return counted
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        target, name, function = (os, "replace", replace) if what == "write" else (torch.Tensor, "backward", backward)
        patched.setattr(target, name, count_down(function))
        train_tiny(tmp_path / "run")
    torch.manual_seed(99)
    if (tmp_path / "run/last.pt").exists():
        train_toy.main(["--resume", str(tmp_path / "run"), "--device", "cpu", "--workers", "1"])
    else:
        train_tiny(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_a_killed_process_resumes_as_if_never_killed(tmp_path, straight):
    script = (f"import sys, time; sys.path.insert(0, {str(FOLDER)!r}); import torch, train_toy; torch.set_num_threads(1); record = train_toy.record\n"
              "train_toy.record = lambda *x: (record(*x), time.sleep(60 * (x[0].epoch == 2)))\n"
              f"train_toy.main({[*SHAPES_RUN, '--output-dir', str(tmp_path / 'run')]!r})")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)                        # in the second epoch
    assert process.wait() == -signal.SIGKILL
    assert torch.load(tmp_path / "run/last.pt")["epoch"] == 1
    train_toy.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    history = torch.load(tmp_path / "run/last.pt")["history"]
    assert [row["AP"] for row in history] == [row["AP"] for row in straight[1]]
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in straight[1]], rel=1e-6)


def test_a_half_written_file_never_replaces_a_good_one(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("good")
    with pytest.raises(ZeroDivisionError):
        train_toy.write(path, lambda temporary: temporary.write_text("half") / 0 if temporary.write_text("half") * 0 else 1 / 0)
    assert path.read_text() == "good"


def test_other_runs_are_neither_overwritten_nor_continued(tmp_path, capsys, straight):
    folder, _ = straight
    assert "holds another run: --resume" in refused(capsys, *SHAPES_RUN, "--output-dir", folder)
    assert "no run to continue" in refused(capsys, "--resume", tmp_path / "nowhere")
    state = torch.load(folder / "last.pt")
    (tmp_path / "run").mkdir()
    for broken, message in ((state | {"names": {0: "cow"}}, "categories differ: the checkpoint has .*'cow'"),
                            (state["model"], "no run to continue: 'options'"), (None, "no run to continue.*can't be read")):
        torch.save(broken, tmp_path / "run/last.pt")
        if broken is None:
            (tmp_path / "run/last.pt").write_bytes((folder / "last.pt").read_bytes()[:5000])
        assert re.search(message, refused(capsys, "--resume", tmp_path / "run"))
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, *SHAPES_RUN, "--output-dir", tmp_path / "file")


# ---- train_toy.py: checkpoints and predictions -----------------------------------------------------


@pytest.fixture(scope="module")
def coco_run(tmp_path_factory):
    """A run on photographs: its folder and its data."""
    folder = tmp_path_factory.mktemp("coco")
    paths = tiny_coco(folder / "data")
    flags = ["--coco-train", *paths, "--coco-val", *paths, "--image-size", "64", "--epochs", "1", "--num-queries", "6"]
    train_toy.main([*flags, "--workers", "2", "--batch-size", "2", "--device", "cpu", "--output-dir", str(folder / "run")])
    return folder / "run", paths


def test_a_coco_run_ends_with_its_classes_advice_and_needs_no_flags_to_be_evaluated(coco_run, capsys):
    folder, _ = coco_run
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert row["AP_per_class"].keys() == {"cat", "dog"} and row["AP"] < 1
    train_toy.main(["--evaluate", str(folder / "last.pt"), "--device", "cpu", "--workers", "0"])
    shown = capsys.readouterr().out
    assert shown.count("Average Precision") == 6 and shown.count("Average Recall") == 6
    assert re.search(r"cat +AP +\d+\.\d, 2 objects\ndog +AP +\d+\.\d, 1 objects", shown)


def test_a_run_that_finds_nothing_says_what_to_try(tmp_path, capsys):
    train_tiny(tmp_path / "run", "--epochs", "1")
    assert "AP is below 1. First see with --overfit 8" in capsys.readouterr().out


def test_predict_writes_a_picture_per_image_and_a_result_file_of_coco(coco_run, tmp_path, capsys):
    folder, (pictures, annotations) = coco_run
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((50, 70), dtype=np.uint8)).save(tmp_path / "in/gray.jpg")
    (tmp_path / "in/notes.txt").write_text("not an image")
    flags = ["--predict", folder / "last.pt", tmp_path / "in", f"{pictures}/5.png", "--output-dir", tmp_path / "out",
             "--threshold", "0", "--device", "cpu"]
    with pytest.raises(SystemExit, match="^0$"):
        train_toy.main([str(flag) for flag in flags])
    assert Image.open(tmp_path / "out/gray.png").size == (70, 50) and Image.open(tmp_path / "out/5.png").size == (80, 64)
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {Path(row["file_name"]).name for row in results} == {"gray.jpg", "5.png"}
    assert len(results) == 2 * 6 * 2 and {row["category_id"] for row in results} == {3, 7}
    coco = pycocotools.coco.COCO()
    coco.dataset = {"images": [{"id": 1}, {"id": 2}], "annotations": [], "categories": [{"id": 3}, {"id": 7}]}
    coco.createIndex()
    assert len(coco.loadRes(str(tmp_path / "out/predictions.json")).getAnnIds()) == len(results)
    (tmp_path / "in/broken.png").write_bytes(b"this is no picture")
    assert refused(capsys, *flags, "--predict", folder / "last.pt", tmp_path / "in", tmp_path / "absent.png").startswith("1")
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())) == 6 * 2       # the readable one


def perfect_official_weights(box, category, classes=91):
    """The authors' file, whose every query finds `category` at `box`."""
    weights = blank_weights(encoder=1, decoder=2, queries=10, feed_forward=32, classes=classes)
    weights["class_embed.bias"] = torch.full((classes,), -9.0)
    weights["class_embed.bias"][category] = 5.0
    weights["refpoint_embed.weight"] = dn_detr.inverse_sigmoid(torch.tensor(box)).repeat(10, 1)
    return {"model": weights}


def test_the_authors_file_evaluates_and_predicts_with_raw_category_ids(tmp_path, capsys):
    torch.save(perfect_official_weights([28 / 64, 14 / 64, 40 / 64, 20 / 64], 18), tmp_path / "official.pth")
    folder, path = write_coco(tmp_path / "data", {1: (64, 64)}, [box_of(1, 18, 8, 4, 40, 20)], ((18, "hound"), (90, "brush")))
    evaluation = ["--evaluate", str(tmp_path / "official.pth"), "--image-size", "64", "--device", "cpu", "--workers", "0"]
    train_toy.main([*evaluation, "--coco-val", folder, path])
    assert capsys.readouterr().out.splitlines()[0].endswith("1.000")
    with pytest.raises(SystemExit, match="^0$"):
        train_toy.main(["--predict", str(tmp_path / "official.pth"), folder, "--image-size", "64", "--device", "cpu",
                        "--output-dir", str(tmp_path / "out")])
    best = json.loads((tmp_path / "out/predictions.json").read_text())[0]
    assert best["category_id"] == 18 and best["bbox"] == pytest.approx([8, 4, 40, 20], abs=0.1)
    paths = write_coco(tmp_path / "more", {1: (64, 64)}, [box_of(1, 120, 8, 4, 40, 20)], ((120, "unknown"),))
    assert "120" in refused(capsys, *evaluation, "--coco-val", *paths)


def test_a_checkpoint_of_other_classes_starts_only_those_anew(coco_run, straight, capsys):
    path = straight[0] / "last.pt"
    old, _ = train_toy.load_detector(path)
    model = train_toy.start_from(path, 3, {"dn_groups": 2})
    assert model.config.num_classes == 3 and model.config.dn_groups == 2
    anew = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, old.state_dict()[name])
            } if False else {name for name, tensor in model.state_dict().items() if tensor.shape != old.state_dict()[name].shape}
    assert anew == {"class_head.weight", "class_head.bias", "label_embedding.weight"}
    assert all(name in capsys.readouterr().out for name in ()) and torch.equal(
        model.label_embedding.weight[-1], old.label_embedding.weight[-1])
    for name in model.state_dict().keys() - anew:
        assert torch.equal(model.state_dict()[name], old.state_dict()[name]), name
    same = train_toy.start_from(path, 6, {})
    assert_close(same.state_dict(), old.state_dict(), rtol=0, atol=0)


def test_a_run_that_began_from_a_file_resumes_without_it(tmp_path, straight):
    start = tmp_path / "start.pt"
    start.write_bytes((straight[0] / "last.pt").read_bytes())
    train_tiny(tmp_path / "run", "--init", str(start), "--epochs", "1")
    start.unlink()
    assert len(train_toy.train(train_toy.parse_options(["--resume", str(tmp_path / "run")]), CPU)) == 1


def test_pretrained_weights_offline_give_a_clear_error(monkeypatch, tmp_path):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="can't be downloaded.*drop --pretrained-backbone.*no route"):
        train_toy.load_imagenet(tiny_model(backbone="resnet18"))
    with pytest.raises(ValueError, match="needs a torchvision backbone"):
        train_toy.load_imagenet(tiny_model())


def test_overfit_trains_and_evaluates_on_the_same_images_without_augmentation(tmp_path):
    options = train_toy.parse_options(["--coco-train", *tiny_coco(tmp_path), "--overfit", "2", "--image-size", "64"])
    train_set, val_set = train_toy.build_datasets(options)
    assert len(val_set) == 2 and len(train_set) == 200 and isinstance(val_set.transform, train_toy.v2.Resize)
    assert torch.equal(train_set[3][0], val_set[1][0])
    shapes, _ = train_toy.build_datasets(train_toy.parse_options(["--overfit", "2"]))
    assert torch.equal(shapes[1][0], train_toy.ShapesDataset(2, 0, "train")[1][0])


# ---- train_toy.py: options, experiments, processes -------------------------------------------------

COCO = ["--coco-train", "a", "b", "--coco-val", "a", "b"]


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "0"], "--epochs is 0, it must be at least 1"), (["--lr", "-1"], "--lr is -1.0"), (["--lr", "nan"], "--lr is nan"),
    (["--workers", "-1"], "--workers is -1"), (["--seed", "-1"], "--seed is -1"), (["--train-size", "0"], "--train-size is 0"),
    (["--model", "huge"], "invalid choice: 'huge'"), (["--epochs", "many"], "invalid int value: 'many'"),
    ([*COCO, "--image-size", "32"], "--image-size is 32"), (["--compare", "--dn-groups", "5"], "--dn-groups has no effect"),
    (["--ablate", "--dn-groups", "5"], "--dn-groups has no effect"), (["--ablate", *COCO], "has no effect"),
    (["--seeds", "0", "1", "2"], "--seeds has no effect"), (["--evaluate", "x.pt", "--epochs", "3"], "--epochs has no effect"),
    (["--init", "x.pt", "--model", "toy"], "--model has no effect"), ([*COCO, "--train-size", "9"], "--train-size has no effect"),
    (["--subset", "9"], "--subset has no effect"), (["--threshold", "0.3"], "--threshold has no effect"),
    (COCO[:3], "needs --coco-train and --coco-val"), (COCO[3:], "needs --coco-train and --coco-val"),
    (["--resume", "nowhere", "--seed", "0"], "--seed has no effect"), (["--overfit", "8", "--val-size", "3"], "--val-size has no"),
    (["--device", "gpu9"], "--device gpu9 can't be used"), (["--dn-groups", "-1"], "dn_groups is -1"),
    (["--batch-size", "3", "--predict", "x"], "--batch-size has no effect")])
def test_impossible_options_and_those_without_effect_are_refused(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *flags)


@pytest.mark.parametrize("flags, lr", [
    ([], 3e-3), (["--dn-groups", "0"], 3e-3), (COCO, 1e-3), (["--model", "paper"], 1e-4), (["--init", "x.pt"], 1e-4),
    (["--lr", "1"], 1), (["--overfit", "8"], 1e-3)])
def test_the_rate_suits_what_is_trained(flags, lr):
    assert train_toy.parse_options(flags).lr == lr


def test_options_reach_the_model():
    options = train_toy.parse_options(["--dn-groups", "3", "--num-queries", "9", "--label-noise", "0.1", "--anchors", "normal"])
    config = train_toy.build_model(options, 6).config
    assert (config.dn_groups, config.num_queries, config.label_noise, config.hidden_dim) == (3, 9, 0.1, 64)
    model = train_toy.build_model(train_toy.parse_options(["--model", "paper", "--backbone", "resnet18"]), 6)
    assert model.config == DNDETRConfig(num_classes=6, backbone="resnet18", frozen_norm=False)


def test_without_the_mask_only_empty_slots_are_hidden(tmp_path):
    run, *_ = train_toy.start_run(train_toy.parse_options([*SHAPES_RUN, "--no-mask", "--output-dir", str(tmp_path / "run")]), CPU)
    blocked = run.model.query_mask(assign_slots([1, 3], 2), 2).expand(2, 1, 8, 8)[:, 0]
    is_empty = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [0] * 8]).bool()
    assert torch.equal(blocked, is_empty[:, None].expand(2, 8, 8))


def test_an_experiment_runs_its_arms_once_and_compares_them_seed_by_seed(tmp_path, monkeypatch, capsys):
    flags = ["--compare", "--seeds", "0", "1", "--epochs", "1", "--train-size", "8", "--val-size", "4", "--jobs", "2",
             "--output-dir", str(tmp_path), "--device", "cpu"]
    train_toy.main(flags)
    data = json.loads((tmp_path / "compare-normal.json").read_text())
    assert list(data["runs"]) == ["without denoising", "5 groups"] and [len(x) for x in data["runs"].values()] == [2, 2]
    assert data["runs"]["without denoising"][0][0]["loss_denoising"] == 0 < data["runs"]["5 groups"][0][0]["loss_denoising"]
    assert (tmp_path / "compare-normal.png").stat().st_size > 5000
    saved = torch.load(tmp_path / "normal-anchors-5-groups-seed-1/last.pt")
    assert (saved["options"]["seed"], saved["options"]["lr"]) == (1, train_toy.RATES["normal"][1])
    monkeypatch.setattr(train_toy, "train", lambda *_: pytest.fail("ran again"))
    assert train_toy.run_quietly(saved["options"], CPU) == data["runs"]["5 groups"][1]
    with pytest.raises(ValueError, match="other options"):
        train_toy.run_quietly(saved["options"] | {"lr": 0.5}, CPU)


def test_arms_are_compared_with_the_baseline_of_the_same_seed(capsys):
    def history(*precisions):
        return [{"epoch": e, "step": 10 * e, "seconds": 2.0 * e, "AP": ap, "AP50": ap + 1} for e, ap in enumerate(precisions, 1)]
    train_toy.print_table({"without denoising": [history(5, 20, 30), history(5, 20, 40), history(1, 2, 3)],
                           "5 groups": [history(10, 40, 50), history(10, 30, 50), history(10, 20, 40)]}, [4, 5, 6])
    everything, without_failed = capsys.readouterr().out.split("seeds [4, 5]")
    assert "| 5 groups | 50.0 (40.0 to 50.0) | 51.0 (41.0 to 51.0) | 22.3 ± 33.9 | 2.0 ± 2.5 | 20.0 ± 24.8 | 4.0 ± 5.0 |" in everything
    assert "| 5 groups | 50.0 (50.0 to 50.0) | 51.0 (51.0 to 51.0) | 15.0 ± 63.5 | 2.5 ± 6.4 |" in without_failed


def process_half_of_a_batch(rank, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    device = train_toy.pick_device("cpu")
    images, targets, config = torch.load(folder / "batch.pt", weights_only=False)
    torch.manual_seed(0)
    model, part = DNDETR(config), slice(2 * rank, 2 * rank + 2)
    parallel = train_toy.parallel(model, device)               # gradients are not shared once it is gone
    losses = DNDETRCriterion(config)(parallel(images[part], None, targets[part]), targets[part])
    losses["loss"].backward()
    order = [target["image_id"] for _, _, batch in train_toy.train_batches(
        train_toy.ShapesDataset(8, 0, "train"), 4, seed=0, epoch=1) for target in batch]
    options = train_toy.parse_options([*SHAPES_RUN, "--output-dir", str(folder / "run")])
    seeds, epoch = [], train_toy.train_one_epoch
    train_toy.train_one_epoch = lambda *arguments: seeds.append(torch.initial_seed()) or epoch(*arguments)
    train_toy.train(options, device)
    gathered = train_toy.gather((losses["loss"].item(), order, seeds))
    if rank == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        torch.save({"gathered": gathered, "gradients": gradients}, folder / "result.pt")


def test_two_processes_share_a_batch_its_loss_and_its_images_but_not_their_noise(tmp_path):
    # Frozen norm, because live batch statistics are those of one process; zero noise, because processes draw their own.
    config = DNDETRConfig(**TINY | dict(backbone="resnet18"), **NO_NOISE)
    torch.manual_seed(1)
    images, targets = torch.randn(4, 3, 64, 64), random_targets(3, 1, 0, 2)
    torch.save((images, targets, config), tmp_path / "batch.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process_half_of_a_batch, (tmp_path, port), nprocs=2)
    result = torch.load(tmp_path / "result.pt")
    (loss_0, order_0, seeds_0), (loss_1, order_1, seeds_1) = result["gathered"]
    torch.manual_seed(0)
    model = DNDETR(config)
    loss = DNDETRCriterion(config)(model(images, None, targets), targets)["loss"]
    loss.backward()
    assert (loss_0 + loss_1) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (result["gradients"][name] - parameter.grad).norm()
            assert error <= 1e-4 * parameter.grad.norm() + 1e-7, f"{name} is off by {error}"
    assert sorted(order_0 + order_1) == list(range(8)), "each image goes to one process"
    assert len(set(seeds_0 + seeds_1)) == 4, "each epoch of each process draws noise of its own"
    assert len(json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["AP_per_class"]) > 0


# ---- README and notebook ---------------------------------------------------------------------------


def test_a_small_model_learns_to_find_every_object_of_four_images():
    dataset = train_toy.ShapesDataset(12, 3, "train")
    filled = [index for index in range(12) if 1 <= len(dataset.labels[index]) <= 3][:4]
    images, _, targets = train_toy.collate([dataset[index] for index in filled])
    images, _ = train_toy.normalize(images, None, CPU)
    config = DNDETRConfig(**train_toy.TOY | dict(num_classes=6, num_queries=9, num_decoder_layers=2, small_widths=(16, 32, 32)))
    model, criterion = DNDETR(config), DNDETRCriterion(config)
    train_toy.ease_start(model)
    optimizer, schedule = train_toy.build_optimizer(model, 5e-3, 200)
    for _ in range(200):
        optimizer.zero_grad()
        criterion(model(images, targets=targets), targets)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        results = dn_detr.postprocess(model.eval()(images), [(64, 64)] * len(filled))
    for index, result in zip(filled, results):
        _, texts, _ = train_toy.judge(result, dataset.labels[index], dataset.boxes[index], list(train_toy.SHAPES), 0.4)
        assert len(texts) == len(dataset.labels[index]) and not any(re.search("missed|wrong|again", text) for text in texts), texts


def test_the_readme_snippet_makes_the_queries_of_the_model():
    snippet = re.search(r"```python\n([^`]*assign_slots.*?)```", (FOLDER / "README.md").read_text(), re.S)[1]
    model, targets = tiny_model(dn_groups=5), random_targets(1, 3)
    embed = lambda labels: nn.functional.pad(model.label_embedding(labels), (0, 1), value=1.0)
    names = vars(dn_detr) | {"targets": targets, "num_classes": CLASSES, "num_queries": 7, "label_embedding": embed, "width": 32}
    names |= {name: torch.cat([target[name] for target in targets]) for name in ("labels", "boxes")}
    torch.manual_seed(0)
    with torch.no_grad():
        exec(snippet, names)
    torch.manual_seed(0)
    slots, content, anchor_logits = dn_detr.denoising_queries(targets, model.label_embedding, model.config)
    assert_close(names["content"], content.detach())
    assert_close(dn_detr.inverse_sigmoid(names["anchors"])[slots.is_real], anchor_logits[slots.is_real])
    assert torch.equal(names["blocked"], dn_attention_mask(5, 3, 7))


def test_readme_commands_are_accepted():
    commands = re.findall(r"train_toy\.py((?: [^\n`#&|\\]+|\\\n)*)", (FOLDER / "README.md").read_text() + train_toy.__doc__)
    assert sum(bool(command.strip()) for command in commands) >= 10
    for command in commands:
        flags = shlex.split(command.replace("\\\n", " ").replace("...", ""))
        if "--resume" not in flags:
            train_toy.parse_options(flags)


def test_notebook_is_stored_as_executed_from_top_to_bottom_without_errors():
    cells = json.loads((FOLDER / "walkthrough.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert not "".join(output.get("data", {}).get("text/plain", "")).startswith("<Figure size"), "a stray figure"
    assert (FOLDER / "walkthrough.ipynb").stat().st_size < 1_000_000


def test_notebook_runs_from_top_to_bottom(monkeypatch, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("DN_DETR_FAST", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")      # as in Jupyter
    notebook = nbformat.read(FOLDER / "walkthrough.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    texts = [output.get("data", {}).get("text/plain", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [text for text in texts if text.startswith("<Figure size")]
