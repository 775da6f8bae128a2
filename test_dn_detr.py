"""Tests, on a CPU, without network and without data.

    pytest                        everything, in 1 to 3 minutes on two cores
    pytest -k "mask or noise"     the paper's contribution, a few seconds

In this order: the parts of dn_detr.py, the authors' numbers and files, dn_detr.py as a whole; of train_toy.py
datasets, image files, training, evaluation, interruptions, checkpoints, predictions, options, processes and
experiments; README and notebook.

Each test is named after the property it protects. Results are compared, number by number, with a naive loop,
a case worked by hand, another library, or what the authors' code computes.
"""
import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models import get_model
from torchvision.ops import box_convert, generalized_box_iou

import dn_detr
import train_toy
from dn_detr import DNDETR, DNDETRConfig, DNDETRCriterion, assign_slots, noise_boxes, noise_labels

matplotlib.use("Agg")
torch.set_num_threads(1)                # several are slower on tensors as small as these
FOLDER = Path(dn_detr.__file__).parent
CPU = torch.device("cpu")
CLASSES = 5
TINY = dict(num_classes=CLASSES, num_queries=7, hidden_dim=32, num_heads=4, num_encoder_layers=1, dn_groups=2,
            num_decoder_layers=2, dim_feedforward=48, backbone="small", small_widths=(8, 16, 32))
NO_NOISE = dict(label_noise=0, center_noise=0, size_noise=0)


def test_mask_shape():
    mask = dn_detr.dn_attention_mask(num_groups=2, group_size=3, num_queries=4)
    assert mask.shape == (10, 10) and mask.dtype == torch.bool
    assert not mask[:3, :3].any() and not mask[3:6, 3:6].any()      # a group sees itself,
    assert mask[:3, 3:6].all() and mask[3:6, :3].all()              # and no other group;
    assert mask[6:, :6].all()                                       # matching queries see no group,
    assert not mask[:, 6:].any()                                    # and everybody sees them


def test_noise_bounds():
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.2]).repeat(10000, 1)
    change = (noise_boxes(boxes, center_noise=0.4, size_noise=0.3) - boxes).abs().amax(0)
    bounds = torch.tensor([0.4 * 0.4 / 2, 0.4 * 0.2 / 2, 0.3 * 0.4, 0.3 * 0.2])      # of cx, cy, w, h
    assert (change <= bounds + 1e-6).all() and (change > 0.98 * bounds).all()
    labels = noise_labels(torch.full((10000,), 3), num_classes=5, label_noise=0.5)
    assert set(labels.tolist()) == {0, 1, 2, 3, 4} and 0.37 < (labels != 3).float().mean() < 0.43


# ---- Helpers -------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def same_seed_and_no_progress_bars(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(train_toy, "progress", lambda iterable, description: iterable)


def tiny_config(**options):
    return DNDETRConfig(**(TINY | options))


def tiny_model(**options):
    """A small model whose boxes depend on its contents (those of a fresh one start at the anchors)."""
    torch.manual_seed(0)
    model = DNDETR(tiny_config(**options))
    nn.init.normal_(model.box_head.layers[-1].weight, std=0.2)
    return model


def patch_model(**options):
    """A tiny model that sees 8 x 8 patches: neither batch norm nor borders couple anything."""
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


def run(model, images, targets=None):
    """One forward pass in the mode the model is in, with noise that is the same every time."""
    torch.manual_seed(0)
    return model(images, targets=targets)


def losses_of(model, images, targets):
    return DNDETRCriterion(model.config)(run(model, images, targets), targets)


def random_predictions(layers=2, images=2, queries=4, seed=0):
    """-> logits [L, B, N, C], boxes [L, B, N, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(layers, images, queries, CLASSES, generator=generator),
            torch.rand(layers, images, queries, 4, generator=generator) * 0.3 + 0.2)


def as_outputs(logits, boxes, **more):
    return more | dict(pred_logits=logits[-1], all_logits=logits, pred_boxes=boxes[-1], all_boxes=boxes)


def assert_near(actual, expected, atol=1e-5, rtol=1e-4):
    assert_close(actual, torch.as_tensor(expected), atol=atol, rtol=rtol)


# ---- Configuration -------------------------------------------------------------------------------

def test_impossible_configurations_are_refused_by_name():
    for rule, options in {
            "at least 1": dict(num_classes=0, num_queries=0, num_heads=0, num_decoder_layers=0,
                               dim_feedforward=0),
            "at least 0": dict(num_encoder_layers=-1, num_patterns=-1, dn_groups=-1, dn_max_queries=-1),
            "in [0, 1]": dict(label_noise=-0.1, center_noise=-0.1, size_noise=-0.1),
            "in [0, 1]:": dict(label_noise=1.01, center_noise=1.01, size_noise=1.01),
            "positive": dict(hidden_dim=0, image_temperature=0, anchor_temperature=0, position_frequency=0),
            "in [0, 1)": dict(dropout=1.0), "divisible by num_heads (2)": dict(hidden_dim=6),
            "one of ": dict(activation="swish", backbone="vgg"), "False below resnet50": dict(dilation=True),
            "a width for each stage": dict(small_widths=())}.items():
        for name, value in options.items():
            message = f"{name} is {value!r}, it must be {rule.rstrip(':')}"
            with pytest.raises(ValueError, match=re.escape(message)):
                DNDETRConfig(**dict(backbone="resnet34", num_heads=2) | {name: value})
    with pytest.raises(ValueError, match="hidden_dim is 36"):
        DNDETRConfig(hidden_dim=36, num_heads=8)


CHANGES = dict(
    dn_groups=1, label_noise=1.0, center_noise=0.9, size_noise=0.9, dn_max_queries=3, dn_mask=False,
    num_classes=6, num_queries=5, hidden_dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=1,
    dim_feedforward=24, dropout=0.5, activation="gelu", num_patterns=2, backbone="resnet18", dilation=True,
    frozen_norm=False, small_widths=(8, 32), image_temperature=9.0, anchor_temperature=9.0, cell_centers=True,
    position_frequency=2.0, cost_class=-20.0, cost_box=-50.0, cost_giou=-20.0,      # the dearest assignment
    loss_class=2.0, loss_box=1.0, loss_giou=1.0, focal_alpha=0.5, focal_gamma=1.0)


def test_every_field_of_the_configuration_has_an_effect():
    def observe(**options):
        model = tiny_model(**options)
        loss = losses_of(model, random_images(), random_targets(1, 3))["loss"].item()
        return loss, {name: tensor.shape for name, tensor in model.state_dict().items()}

    assert CHANGES.keys() == DNDETRConfig.__dataclass_fields__.keys()
    needed = {"dilation": dict(backbone="resnet50"), "frozen_norm": dict(backbone="resnet18")}
    for name, value in CHANGES.items():
        base = needed.get(name, {})
        assert observe(**base) == observe(**base) != observe(**base | {name: value}), name


@pytest.mark.parametrize("options", [
    dict(hidden_dim=24, num_heads=3, dn_groups=0), dict(num_encoder_layers=0, num_decoder_layers=3),
    dict(activation="gelu", dropout=0.1), dict(activation="relu", small_widths=(8,), num_decoder_layers=1),
    dict(label_noise=1.0, num_classes=1), dict(num_patterns=2, dn_groups=1)], ids=str)
def test_every_parameter_gets_a_gradient_whatever_the_choice(options):
    model, targets = tiny_model(**options), random_targets(1, 3)
    targets = [{"labels": target["labels"].clamp(max=model.config.num_classes - 1),
                "boxes": target["boxes"].double()} for target in targets]              # float64, too
    losses_of(model, random_images(), targets)["loss"].backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # The first decoder layer has no use for position_scale, which is in the authors' weights even so.
    is_used = model.config.num_decoder_layers > 1
    assert unused == {name for name in model.state_dict() if "decoder.position_scale" in name and not is_used}


# ---- Targets and images --------------------------------------------------------------------------

GOOD = [0.5, 0.5, 0.2, 0.2]


@pytest.mark.parametrize("labels, boxes, message", [
    ([1], [[0.2, 0.2, 0.9, 0.9]], r"targets\[1\].*label 1 and box \[0.2, 0.2, 0.9, 0.9\].*\(x0, y0"),
    ([1], [[120.0, 80.0, 30.0, 20.0]], "120.0, 80.0, 30.0, 20.0.*pixels"),
    ([1, 2], [GOOD, [-0.3, 0.5, 0.2, 0.2]], r"-0.3, 0.5.*in \[0, 1\]"),
    ([1], [[0.5, math.nan, 0.2, 0.2]], "nan.*finite"),
    ([1], [[0.5, 0.5, 0.2, -0.0005]], "-0.0005.*area"),
    ([CLASSES], [GOOD], rf"targets\[1\] .*label {CLASSES} .*0 \.\. {CLASSES - 1}"),
    ([2, -1], [GOOD, GOOD], r"targets\[1\] .*label -1"),
    ([1, 2], [GOOD], r"targets\[1\].*int64 \[2\].*float32 \[1, 4\]"),
    ([1.0], [GOOD], "long.*float32"),
    ([1], [[0, 0, 1, 1]], "float.*int64"),
    (None, None, "1 targets for a batch of 2")])
def test_impossible_targets_are_refused_by_value(labels, boxes, message):
    # A box in the corner, which can't be (x0, y0, x1, y1), would hide the mistake; these two don't.
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.3, 0.3, 0.4, 0.4]])}]
    if labels:
        targets.append({"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)})
    for check in (lambda: tiny_model()(random_images(), targets=targets),
                  lambda: DNDETRCriterion(tiny_config())(as_outputs(*random_predictions()), targets)):
        with pytest.raises(ValueError, match=message):
            check()


def test_boxes_that_stick_out_a_little_are_accepted():         # annotators round, and draw beyond the image
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0005], [0.9, 0.95, 0.4, 0.2]])     # and can't be (x0, y0, x1, y1)
    dn_detr.check_targets([{"labels": torch.tensor([0, CLASSES - 1]), "boxes": boxes}], 1, CLASSES)


IMAGES, PADDING = torch.rand(2, 3, 9, 9), torch.zeros(2, 9, 9, dtype=torch.bool)
OUTSIDE = math.nan, 1.01, -0.1


@pytest.mark.parametrize("function, arguments, message", [
    (tiny_model(), (IMAGES[0],), r"\[B, 3, H, W\].*\[3, 9, 9\]"), (tiny_model(), (IMAGES.byte(),), "uint8"),
    (tiny_model(), (IMAGES[:, :1],), r"\[2, 1, 9, 9\]"), (tiny_model(), (IMAGES[:0],), r"\[0, 3, 9, 9\]"),
    (tiny_model(), (IMAGES, PADDING[:1]), r"\[1, 9, 9\]"),
    (tiny_model(), (IMAGES, PADDING.float()), "float32"),
    (tiny_model(), (IMAGES, PADDING | torch.tensor([[[0]], [[1]]]).bool()), "covers a whole image"),
    (noise_labels, (torch.tensor([1, CLASSES]), CLASSES, 0.2), r"labels must be 0 \.\. 4, num_classes - 1"),
    (noise_labels, (torch.tensor([-1, 0]), CLASSES, 0.2), "labels must be"),
    (noise_boxes, (torch.tensor([[30, 20, 10, 10]]), 0.4, 0.4), "boxes must be float.*int64"),
    *((noise_labels, (torch.tensor([0]), CLASSES, bad), f"label_noise is {bad}") for bad in OUTSIDE),
    *((noise_boxes, (torch.rand(1, 4), bad, 0.4), f"center_noise is {bad}") for bad in OUTSIDE),
    *((noise_boxes, (torch.rand(1, 4), 0.4, bad), f"size_noise is {bad}") for bad in OUTSIDE),
    (assign_slots, ([1, -2], 3), r"counts \[1, -2\] must not"), (assign_slots, ([], 3), "at least one image"),
    (assign_slots, ([1], -3), "num_groups -3"), (assign_slots, ([1], 3, -8), "max_queries -8"),
    (dn_detr.dn_attention_mask, (1, -2, 3), "group_size -2"),
    *((dn_detr.postprocess, (as_outputs(*random_predictions()), sizes), r"each of the 2 images.*\[")
      for sizes in ([(10, 10)], [(10, 10)] * 3, [10, 10])),
    (dn_detr.match, (torch.full((1, 1, 2, CLASSES), math.nan), torch.rand(1, 1, 2, 4), random_targets(1),
                     tiny_config()), "cost is not finite"),
    (dn_detr.matching_instability, ([0, 1, -1], [0, 1]), "same queries, not 3 and 2")], ids=lambda _: "")
def test_masks_noise_and_what_else_is_impossible_is_refused(function, arguments, message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        function(*arguments)


# ---- Noise ---------------------------------------------------------------------------------------

BOX = torch.tensor([0.5, 0.45, 0.4, 0.2])                      # wide, far from every border


@pytest.mark.parametrize("center_noise, size_noise", [(0.4, 0.2), (0.1, 0.9), (1.0, 1.0)])
def test_box_noise_is_uniform_independent_and_in_zero_to_one(center_noise, size_noise):
    noised = noise_boxes(BOX.expand(20000, 4), center_noise, size_noise)
    reaches = 0.2 * center_noise, 0.1 * center_noise, 0.4 * size_noise, 0.2 * size_noise
    for values, middle, reach in zip(noised.T, BOX, reaches):  # spread evenly, from end to end
        expected = torch.linspace(-reach, reach, 20000)
        assert_near(values.sort().values - middle, expected, atol=4 / math.sqrt(20000) * reach, rtol=0)
        assert (values - middle).abs().max() <= reach + 1e-6
    assert_near(torch.corrcoef(noised.T), torch.eye(4), atol=0.03)
    at_border = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.049, 0.951, 0.1, 0.1]]).repeat(500, 1)
    noised = noise_boxes(at_border, 1.0, 1.0)
    assert noised.min() == 0 and noised.max() == 1


def test_label_noise_redraws_at_its_rate_from_all_classes():
    for num_classes, rate in ((1, 0.2), (2, 0.2), (5, 1.0), (91, 0.2), (5, 0.0)):
        noised = noise_labels(torch.zeros(100000, dtype=torch.long), num_classes, rate)
        shares = torch.full((num_classes,), rate / num_classes)            # longer with "unknown"
        shares[0] += 1 - rate
        assert_near(noised.bincount(minlength=num_classes) / 100000, shares, atol=0.007 * (rate > 0))


def test_noise_draws_from_its_generator_and_leaves_inputs_alone():
    boxes, labels, state = BOX.repeat(20, 1), torch.arange(20) % CLASSES, torch.get_rng_state()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return noise_boxes(boxes, 0.4, 0.4, generator), noise_labels(labels, 91, 0.5, generator)
    for first, again, other in zip(draw(1), draw(1), draw(2)):
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(boxes, BOX.repeat(20, 1)) and torch.equal(labels, torch.arange(20) % CLASSES)


# ---- Groups, slots, noised queries ---------------------------------------------------------------

def naive_slots(counts, num_groups):
    """-> [(image, slot, source)] sorted, is_real."""
    size, first = max(counts), [0, *itertools.accumulate(counts)]
    copies = [(image, group * size + index, first[image] + index) for image, count in enumerate(counts)
              for group in range(num_groups) for index in range(count)]
    return sorted(copies), [[slot % size < count for slot in range(num_groups * size)] for count in counts]


@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [2, 4], [3, 0, 1, 4], [0, 4, 0, 2, 2]], ids=str)
def test_slots_are_those_of_a_naive_loop_within_the_budget(counts):
    for groups, budget, expected in ((0, 0, 0), (0, 7, 0), (2, 0, 2), (5, 0, 5), (5, 100, 5), (5, 20, 5),
                                     (5, 19, 4), (5, 8, 2), (5, 7, 1), (5, 1, 1)):
        slots, expected = assign_slots(counts, groups, budget), expected if max(counts) else groups
        copies = sorted(zip(slots.image.tolist(), slots.slot.tolist(), slots.source.tolist()))
        assert (copies, slots.is_real.tolist()) == naive_slots(counts, expected)
        assert (slots.num_groups, slots.group_size) == (expected, max(counts))


def test_the_number_of_groups_changes_no_loss():
    images, targets = random_images(), random_targets(1, 3)
    none, one, two, budget = (
        losses_of(tiny_model(**NO_NOISE, dn_groups=groups, dn_max_queries=limit), images, targets)
        for groups, limit in ((0, 0), (1, 0), (2, 0), (5, 7)))
    assert_close(budget, two)
    assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert none["loss_denoising"] == 0 and none["loss"] == none["loss_matching"]
    assert_near(none["loss_matching"], two["loss_matching"])   # as no matching query sees a copy


def test_a_copy_is_its_label_row_a_one_and_its_box_as_logits():
    model, targets = tiny_model(**NO_NOISE), random_targets(1, 3)
    targets[1]["boxes"][0] = torch.tensor([0.0, 1.0, 0.9999, 0.0001])
    slots, content, anchor_logits = dn_detr.denoising_queries(targets, model.label_embedding, model.config)
    for image, slot in slots.is_real.nonzero().tolist():
        label, box = (targets[image][name][slot % 3] for name in ("labels", "boxes"))
        row = model.label_embedding.weight[label]
        assert torch.equal(content[image, slot], torch.cat([row, torch.ones(1)]))
        assert_near(anchor_logits[image, slot], (box.clamp(min=1e-3) / (1 - box).clamp(min=1e-3)).log())
    content.sum().backward()                                   # every copy trains the row of its label
    copies = 2 * torch.cat([target["labels"] for target in targets]).bincount(minlength=CLASSES + 1)
    assert_near(model.label_embedding.weight.grad, copies[:, None].expand(-1, 31).float())


def test_a_matching_query_is_unknown_and_a_zero_and_its_anchor():
    model = tiny_model(num_patterns=3)
    content, anchor_logits = model.matching_queries(2)
    unknown = torch.cat([model.label_embedding.weight[CLASSES], torch.zeros(1)])
    for image, pattern, query in itertools.product(range(2), range(3), range(7)):    # all anchors per pattern
        assert torch.equal(content[image, pattern * 7 + query], unknown + model.patterns.weight[pattern])
        assert torch.equal(anchor_logits[image, pattern * 7 + query], model.anchor_logits.weight[query])


def test_each_noise_acts_on_its_own_part_and_anew_on_every_copy():
    targets, rows = random_targets(300), []
    for name in ("label_noise", "center_noise", "size_noise"):
        model = tiny_model(**NO_NOISE | {name: 0.5})
        _, content, anchor_logits = dn_detr.denoising_queries(targets, model.label_embedding, model.config)
        assert not all(torch.equal(*x[0].split(300)) for x in (content, anchor_logits))
        is_other = (content[0, :300, :-1] != model.label_embedding(targets[0]["labels"])).any(-1)
        change = (anchor_logits[0, :300].sigmoid() - targets[0]["boxes"]).abs()
        rows.append([is_other.float().mean(), change[:, :2].max(), change[:, 2:].max()])
    assert torch.equal(torch.tensor(rows) > 1e-4, torch.eye(3, dtype=torch.bool))
    assert_close(targets, random_targets(300), rtol=0, atol=0)


def test_denoising_runs_in_training_with_targets_only():
    model, images, targets = tiny_model(), random_images(), random_targets(1, 2)
    plain = {"pred_logits", "pred_boxes", "all_logits", "all_boxes"}
    assert model(images, targets=targets).keys() == plain | {"dn_logits", "dn_boxes", "dn_slots"}
    assert model(images).keys() == tiny_model(dn_groups=0)(images, targets=targets).keys() == plain
    model.eval()
    assert_close(model(images, targets=targets), model(images), rtol=0, atol=0)


# ---- Attention mask, and no leak -----------------------------------------------------------------

def test_mask_is_equation_7_and_that_of_the_docstring():
    for groups, size, matching in itertools.product((0, 1, 2, 5), (0, 1, 4), (1, 3)):
        denoising, total = groups * size, groups * size + matching
        expected = [[j < denoising and (i >= denoising or i // size != j // size) for j in range(total)]
                    for i in range(total)]
        mask = dn_detr.dn_attention_mask(groups, size, matching)
        assert mask.tolist() == expected and mask.dtype == torch.bool
    rows = re.findall(r"^ +[01m] ((?:[.x] ){6}[.x])", dn_detr.dn_attention_mask.__doc__, re.MULTILINE)
    expected = [[cell == "x" for cell in row.split()] for row in rows]
    assert dn_detr.dn_attention_mask(2, 2, 3).tolist() == expected


@pytest.mark.parametrize("dn_mask", [True, False])
def test_mask_decides_who_influences_whom_in_the_whole_model(monkeypatch, dn_mask):
    leaves, original = [], dn_detr.denoising_queries           # content and anchors of the copies

    def as_leaves(*arguments):
        slots, *copies = original(*arguments)
        leaves.extend(x.detach().requires_grad_() for x in copies)
        return slots, *leaves
    monkeypatch.setattr(dn_detr, "denoising_queries", as_leaves)
    targets, model = random_targets(1, 3), tiny_model(dn_mask=dn_mask)
    outputs = run(model, random_images(), targets)
    results = torch.cat([torch.cat([outputs[f"{kind}_{name}"][-1] for name in ("logits", "boxes")], dim=-1)
                         for kind in ("dn", "all")], dim=1) * torch.randn(CLASSES + 4)  # [B, Q, C + 4]
    for i in range(6 + 7):
        # Copies see the real ones of their own group of 3, an empty slot sees itself too, and that is all.
        # Without the mask, everybody sees all real copies.
        expected = [[i == j or (j % 3 < count and (not dn_mask or (i < 6 and i // 3 == j // 3)))
                     for j in range(6)] for count in (1, 3)]
        total = results[:, i].sum()
        gradients = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
        assert [gradient.any(-1).tolist() for gradient in gradients] == [expected] * 2
    loss = DNDETRCriterion(model.config)(outputs, targets)["loss"]
    for gradient in torch.autograd.grad(loss, leaves):
        assert torch.equal(gradient.any(-1), outputs["dn_slots"].is_real)
    mask = dn_detr.query_mask(outputs["dn_slots"], 7, dn_mask)
    is_empty = torch.tensor([[j < 6 and j % 3 >= count for j in range(13)] for count in (1, 3)])
    equation_7 = dn_detr.dn_attention_mask(2, 3, 7) if dn_mask else torch.zeros(13, 13, dtype=torch.bool)
    assert torch.equal(mask, (equation_7 | is_empty[:, None])[:, None])


# ---- Positions, backbone, layers, first weights --------------------------------------------------

def naive_sine(coordinate, width, temperature, frequency):
    factors = [2 * math.pi * frequency / temperature ** (2 * i / width) for i in range(width // 2)]
    return [f(factor * coordinate) for factor in factors for f in (math.sin, math.cos)]


def test_positions_are_sines_of_their_temperature_and_frequency():
    model = patch_model(image_temperature=9.0, anchor_temperature=7.0, position_frequency=3.0)
    _, positions, _ = model.encode_image(random_images(1, 16, 16), None)
    assert_near(positions[0], [naive_sine(y, 16, 9, 3) + naive_sine(x, 16, 9, 3)
                               for y in (0.5, 1.0) for x in (0.5, 1.0)], atol=1e-4)
    decoder, anchors, content = model.decoder, torch.rand(1, 1, 4) * 0.5 + 0.2, torch.randn(1, 1, 32)
    cx, cy, w, h = anchors.flatten().tolist()
    sine = torch.tensor([naive_sine(x, 16, 7, 3) for x in (cy, cx, w, h)])
    w_ref, h_ref = decoder.reference_size(content).sigmoid().flatten()
    modulated = torch.cat([sine[0] * h_ref / h, sine[1] * w_ref / w])
    for is_first, scale in ((True, 1), (False, decoder.position_scale(content).flatten())):
        position, query_sine = decoder.encode_anchors(anchors, content, is_first)
        assert_near(position.flatten(), decoder.anchor_mlp(sine.flatten()))
        assert_near(query_sine.flatten(), modulated * scale)


def test_pixel_coordinates_end_at_the_image_not_at_the_padding():
    padding = torch.tensor([[[False, False, True], [False, False, True], [True, True, True]]])
    for centers, (first, second) in ((False, (0.5, 1.0)), (True, (0.25, 0.75))):
        yx = dn_detr.pixel_coordinates(padding, centers)[0]
        assert_near(yx[:2, :2, 0], [[first, first], [second, second]])
        assert_near(yx[:2, :2, 1], [[first, second], [first, second]])


def test_mask_of_padding_hides_the_cells_that_start_in_padding():
    mask = torch.ones(1, 40, 48, dtype=torch.bool)
    mask[:, :28, :33] = False                                  # 3.5 and 4.1 cells of 8 pixels
    _, _, token_padding = patch_model().encode_image(random_images(1, 40, 48), mask)
    assert token_padding.view(5, 6).tolist() == [[y > 3 or x > 4 for x in range(6)] for y in range(5)]


def test_mask_of_padding_leaves_predictions_as_without_padding():
    model = patch_model(num_encoder_layers=2).eval()
    image = random_images(1, 32, 24)
    padded, mask = torch.randn(1, 3, 48, 56), torch.ones(1, 48, 56, dtype=torch.bool)
    padded[:, :, :32, :24], mask[:, :32, :24] = image, False
    assert_close(model(padded, mask), model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options, channels, stride, dilated", [
    (dict(backbone="small", small_widths=(8, 32, 24, 16)), 16, 16, 0),
    (dict(backbone="resnet18"), 512, 32, 0),
    (dict(backbone="resnet50", dilation=True), 2048, 16, 3)])
def test_backbones_have_channels_stride_and_dilation(options, channels, stride, dilated):
    backbone, width = dn_detr.build_backbone(DNDETRConfig(**options))
    features = backbone.eval()(random_images(1, 64, 128))
    assert features.shape == (1, width, 64 // stride, 128 // stride) and width == channels
    dilations = [module.dilation for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert dilations.count((2, 2)) == dilated - (dilated > 0)  # all 3 x 3 of the last stage but the first


def test_dropout_has_its_places_in_both_layers_and_in_training(monkeypatch):
    calls, attention = [], F.scaled_dot_product_attention

    def drop_everything(x, p, training, inplace):
        calls.append((x.shape[-1], p * training))
        return x * (not training)

    def attend(query, key, value, allowed, p, *more):
        calls.append(("attention", p))
        return attention(query, key, value, allowed)
    monkeypatch.setattr(F, "dropout", drop_everything)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    config, x = tiny_config(dropout=0.5), torch.randn(1, 6, 32)
    encoder, decoder = dn_detr.EncoderLayer(config), dn_detr.DecoderLayer(config, is_first=True)
    for layer, count, inputs in ((encoder, 1, (x, x, None)), (decoder, 2, (x, x, x, x, x, None, None))):
        for p in (0.5, 0.0):
            calls.clear()
            output = layer.train(p > 0)(*inputs)
            assert calls == count * [("attention", p), (32, p)] + [(48, p), (32, p)]
            norms = layer.norm2(layer.norm1(x))                # what is left if everything is dropped
            assert torch.equal(output, layer.norm3(norms) if count == 2 else norms) == (p > 0)


def test_weights_start_as_the_authors_do():
    model = DNDETR(tiny_config())
    for name, weight in [*model.encoder.named_parameters(), *model.decoder.named_parameters()]:
        if weight.dim() > 1 and weight.numel() > 500:         # Xavier: uniform within +- sqrt(6 / (in + out))
            assert 0.97 < weight.abs().max() / math.sqrt(6 / sum(weight.shape)) <= 1, name
    assert_near(model.class_head.bias.sigmoid(), [0.01] * CLASSES)
    boxes = model.eval()(random_images())["all_boxes"]
    assert_near(boxes, model.anchor_logits.weight.sigmoid().expand_as(boxes))


# ---- Matching and loss ---------------------------------------------------------------------------

def naive_focal(logit, is_object, config):
    p, alpha, gamma = 1 / (1 + math.exp(-logit)), config.focal_alpha, config.focal_gamma
    if is_object:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p ** gamma * math.log(1 - p)


def naive_l1_and_giou(box, truth):
    corners = box_convert(torch.stack([box, truth]), "cxcywh", "xyxy")
    return (box - truth).abs().sum().item(), generalized_box_iou(corners[:1], corners[1:]).item()


def cheapest_assignment(logits, boxes, target, config):
    """{query: object} of one image, logits [N, C] and boxes [N, 4], and what each pair costs."""
    def cost(logit, box, truth):
        l1, giou = naive_l1_and_giou(box, truth)
        focal = naive_focal(logit, True, config) - naive_focal(logit, False, config)
        return config.cost_class * focal + config.cost_box * l1 - config.cost_giou * giou
    costs = [[cost(row[label], box, truth) for label, truth in zip(target["labels"], target["boxes"])]
             for row, box in zip(logits, boxes)]
    return dict(zip(*(x.tolist() for x in linear_sum_assignment(costs)))), costs


UNUSUAL = tiny_config(cost_class=1.5, cost_box=0.7, cost_giou=3.0, loss_class=0.3, loss_box=2.5,
                      loss_giou=1.7, focal_alpha=0.4, focal_gamma=1.5)


def test_matching_is_the_cheapest_of_all_assignments():
    config = UNUSUAL
    targets, first = random_targets(3, 0, 1, 4, 6), [0, 3, 3, 4, 8]    # the last: more objects than queries
    logits, boxes = random_predictions(layers=2, images=5, queries=5)
    boxes[:, 0] += torch.tensor([0.5, 0.0, 0.0, -0.1])                 # apart from the objects, too
    pairs = dn_detr.match(logits, boxes, targets, config)              # image, query, source
    assert [index.shape for index in pairs] == [(2, 13)] * 3
    for layer in range(2):
        owners = [{} for _ in targets]
        for image, query, source in zip(*(index[layer].tolist() for index in pairs)):
            owners[image][query] = source - first[image]
        for image, target in enumerate(targets):
            expected, costs = cheapest_assignment(logits[layer, image], boxes[layer, image], target, config)
            cost = dn_detr.matching_cost(logits[:, image:image + 1], boxes[:, image:image + 1],
                                         target["labels"][None], target["boxes"][None], config)
            assert_near(cost[layer, 0], costs)
            assert owners[image] == expected
    matched = dn_detr.matched_objects(as_outputs(logits, boxes), targets, config)
    assert matched.tolist() == [[owner.get(query, -1) for query in range(5)] for owner in owners]


def naive_set_loss(logits, boxes, owners, targets, normalizer, config):
    """Focal, l1 and GIoU loss of one layer. owners: {query: object or None} per image, the rest is silent."""
    sums = np.zeros(3)
    for image, target in enumerate(targets):
        for query, k in owners[image].items():
            label = None if k is None else target["labels"][k]
            sums[0] += sum(naive_focal(x, c == label, config) for c, x in enumerate(logits[image, query]))
            if k is not None:
                l1, giou = naive_l1_and_giou(boxes[image, query], target["boxes"][k])
                sums[1:] += l1, 1 - giou
    return sums / normalizer


def test_every_loss_term_is_that_of_a_naive_loop():
    config = UNUSUAL
    targets, slots = random_targets(1, 3), assign_slots([1, 3], 2)
    logits, boxes = random_predictions(layers=3, queries=2)    # fewer than objects in the second image
    copies = [x.requires_grad_() for x in random_predictions(layers=3, queries=6, seed=1)]
    outputs = as_outputs(logits, boxes, dn_logits=copies[0], dn_boxes=copies[1], dn_slots=slots)
    losses = DNDETRCriterion(config)(outputs, targets)
    for gradient in torch.autograd.grad(losses["loss"], copies):           # empty slots learn nothing
        assert torch.equal(gradient.any(-1), slots.is_real.expand(3, -1, -1))
    dn_owners = [{0: 0, 3: 0}, {group * 3 + k: k for group in range(2) for k in range(3)}]
    expected = dict(loss=0, loss_matching=0, loss_denoising=0)
    for layer, suffix in enumerate(("_0", "_1", "")):
        owners = [dict.fromkeys(range(2)) | cheapest_assignment(*image, config)[0]
                  for image in zip(logits[layer], boxes[layer], targets)]
        matching = naive_set_loss(logits[layer], boxes[layer], owners, targets, 4, config)
        denoising = naive_set_loss(*(x[layer].detach() for x in copies), dn_owners, targets, 4 * 2, config)
        for part, prefix, terms in (("matching", "", matching), ("denoising", "dn_", denoising)):
            total = terms @ [config.loss_class, config.loss_box, config.loss_giou]
            expected["loss"] += total
            expected[f"loss_{part}"] += total
            for name, term in zip(("ce", "bbox", "giou"), terms):
                expected[f"{prefix}loss_{name}{suffix}"] = term
    losses = {name: loss.item() for name, loss in losses.items()}
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_giou_of_tiny_boxes_has_the_authors_epsilon():
    side = torch.tensor([0.5, 0.5, 0.001, 0.001])              # its area is as large as epsilon
    assert_near(dn_detr.generalized_iou(side, side), 0.5)
    assert_near(dn_detr.generalized_iou(side, side + torch.tensor([0.002, 0, 0, 0])), 0 - 1e-6 / 4e-6)


def test_the_loss_of_a_batch_is_the_sum_over_its_images():
    model, images, targets = patch_model(**NO_NOISE), random_images(3), random_targets(1, 5, 2)
    together = losses_of(model, images, targets)
    alone = [losses_of(model, images[i:i + 1], targets[i:i + 1]) for i in range(3)]
    for name, value in together.items():
        expected = sum(losses[name] * count for losses, count in zip(alone, (1, 5, 2)))
        assert_near(value * 8, expected, atol=1e-4)


@pytest.mark.parametrize("counts", [(0, 2), (0, 0), (12, 1)], ids=str)
def test_empty_images_and_crowded_ones_train(counts):
    model, targets = tiny_model(), random_targets(*counts)
    losses = losses_of(model, random_images(), targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values()) and losses["loss_ce"] > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for name, value in losses.items():
        if name.startswith(("dn_", "loss_denoising", "loss_bbox", "loss_giou")):
            assert (value == 0) == (max(counts) == 0)


@pytest.mark.parametrize("here, elsewhere, normalizer", [(4, 6, 5), (0, 4, 2), (0, 1, 1), (1, 0, 1)])
def test_the_normalizer_is_averaged_over_processes(monkeypatch, here, elsewhere, normalizer):
    targets, criterion, slots = random_targets(here), DNDETRCriterion(tiny_config()), assign_slots([here], 1)
    (logits, boxes), (dn_logits, dn_boxes) = (random_predictions(1, 1, queries) for queries in (6, here))
    outputs = as_outputs(logits, boxes, dn_logits=dn_logits, dn_boxes=dn_boxes, dn_slots=slots)
    alone = criterion(outputs, targets)
    for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: 2),
                        ("all_reduce", lambda tensor: tensor.add_(elsewhere))):
        monkeypatch.setattr(torch.distributed, name, value)
    shared = criterion(outputs, targets)
    for name in ("loss_ce", "dn_loss_ce"):                     # at least 1, after averaging
        assert_close(shared[name] * normalizer, alone[name] * max(here, 1))


# ---- Predictions and instability -----------------------------------------------------------------

def test_postprocess_by_hand():
    logits = torch.tensor([[[2.0, -9.0, -1.0], [0.0, -9.0, 1.0]],               # [B, N = 2, C = 3]
                           [[-3.0, -9.0, -2.0], [4.0, -9.0, -4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]],
                          [[0.1, 0.2, 0.2, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    outputs = as_outputs(logits[None], boxes[None])
    a, b = [80.0, 30.0, 120.0, 70.0], [0.0, 50.0, 100.0, 100.0]
    c, d = [0.0, 0.0, 2.0, 4.0], [0.0, 0.0, 10.0, 10.0]
    expected = ([2.0, 1.0, 0.0], [a, b, b]), ([4.0, -2.0, -3.0], [d, c, c])
    results = dn_detr.postprocess(outputs, [(100, 200), (10, 10)], num_select=3)
    for result, (scores, boxes) in zip(results, expected, strict=True):
        assert_near(result["scores"], torch.tensor(scores).sigmoid())
        assert_near(result["boxes"], boxes)
        assert result["labels"].tolist() == [0, 2, 0]


@pytest.mark.parametrize("queries, selected", [(7, 7 * CLASSES), (70, 300)])
def test_postprocess_selects_300_or_what_there_is(queries, selected):
    outputs = {"pred_logits": torch.randn(2, queries, CLASSES), "pred_boxes": torch.rand(2, queries, 4)}
    assert len(dn_detr.postprocess(outputs, [(32, 32)] * 2)[1]["scores"]) == selected


def test_matching_instability_by_hand():
    for current in ([-1, 0, 1, -1], [1, -1, 0, -1]):           # object 0 moved; a swap
        assert dn_detr.matching_instability([0, -1, 1, -1], current) == 2


# ---- Devices -------------------------------------------------------------------------------------

def test_copies_to_a_device_are_asynchronous_only_on_cuda():
    tensor = types.SimpleNamespace(to=lambda device, non_blocking: non_blocking)
    assert all(dn_detr.to_device(tensor, device) for device in ("cuda", "cuda:1", torch.device("cuda")))
    assert not any(dn_detr.to_device(tensor, device) for device in ("mps", "cpu", CPU, None))


@pytest.mark.parametrize("targets_on", ["cpu", "cuda"])
@pytest.mark.parametrize("padded", [False, True])
def test_no_tensor_is_on_the_wrong_device(monkeypatch, padded, targets_on):
    """On fake tensors, which have a shape, a type and a device, but no values: no GPU is needed."""
    counts, matching_cost = [1, 3], dn_detr.matching_cost

    def any_slots(counts, num_groups, max_queries, device):
        tensors = (torch.empty(8, dtype=torch.long, device=device) for _ in range(3))
        return dn_detr.DenoisingSlots(2, 3, *tensors, torch.empty(2, 6, dtype=torch.bool, device=device))

    def any_cost(*arguments):
        values = np.zeros(matching_cost(*arguments).shape)
        return types.SimpleNamespace(cpu=lambda: types.SimpleNamespace(numpy=lambda: values))
    # What reads values is replaced: on the CPU, which is where the targets are checked, too.
    replaced = dict(assign_slots=any_slots, matching_cost=any_cost)
    if targets_on == "cpu":
        replaced["check_targets"] = lambda *arguments: None
    for name, value in replaced.items():
        monkeypatch.setattr(dn_detr, name, value)
    summed = []
    for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: 2),
                        ("all_reduce", summed.append)):
        monkeypatch.setattr(torch.distributed, name, value)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = DNDETR(tiny_config(num_patterns=2))
        mask = torch.zeros(2, 32, 32, dtype=torch.bool) if padded else None
        images, mask = train_toy.normalize(torch.zeros(2, 3, 32, 32), mask, torch.device("cuda"))
        targets = [{"labels": torch.zeros(count, dtype=torch.long, device=targets_on),
                    "boxes": torch.zeros(count, 4, device=targets_on)} for count in counts]
        outputs = model(images, mask, targets)
        losses = DNDETRCriterion(model.config)(outputs, targets)
        results = dn_detr.postprocess(outputs, [(32, 24), (16, 32)])
        pairs = dn_detr.match(outputs["all_logits"], outputs["all_boxes"], targets, model.config)
        assert dn_detr.matched_objects(outputs, targets, model.config).device.type == "cpu"
    found = *pairs, *summed, *losses.values(), *(x for result in results for x in result.values())
    assert len(summed) == 2 and {x.device.type for x in found} == {"cuda"}
    assert {x.device.type for x in assign_slots(counts, 2, device="meta")[2:]} == {"meta"}


def test_boxes_and_losses_are_float32_under_autocast():
    model, images, targets = patch_model(**NO_NOISE), random_images(), random_targets(1, 3)
    expected = losses_of(model, images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model, images, targets)
    assert {outputs[name].dtype for name in outputs if name != "dn_slots"} == {torch.float32}
    assert_close(DNDETRCriterion(model.config)(outputs, targets), expected, rtol=0.05, atol=0.02)


# ---- The authors' weights and numbers ------------------------------------------------------------

# Of the authors' code: ResNet-18, 2 + 3 layers, 12 queries, 2 groups. Logits are [:, 0, :4], boxes [:, 0].
GOLDEN = dict(
    pred_logits=[[0.427449, -0.923196, 0.242535, -0.10369], [0.631754, -1.087975, 0.188411, 0.029284]],
    pred_boxes=[[0.090606, 0.777184, 0.610356, 0.311936], [0.089103, 0.769441, 0.581301, 0.303353]],
    losses=dict(
        loss_ce=98.12271881103516, loss_bbox=0.7844612002372742, loss_giou=0.9499912261962891,
        dn_loss_ce=24.565433502197266, dn_loss_bbox=0.8603963851928711, dn_loss_giou=1.074752926826477,
        loss=367.4200744628906),    # of all the layers
    gradient_norm=2192.13525390625,
    owners=[{3: 1, 4: 2, 7: 0}, {3: 1, 4: 2, 7: 0}])


DECODER_ATTENTION = [
    "self_attn.out_proj", "sa_qcontent_proj", "sa_qpos_proj", "sa_kcontent_proj", "sa_kpos_proj", "sa_v_proj",
    "cross_attn.out_proj", "ca_qcontent_proj", "ca_qpos_sine_proj", "ca_kcontent_proj", "ca_kpos_proj",
    "ca_v_proj"]


def official_shapes(encoder=2, decoder=3, queries=12, feed_forward=64, backbone="resnet18", patterns=0,
                    slopes=True, width=256, classes=91):
    """Names and shapes of the authors' weights."""
    with torch.device("meta"):
        network = get_model(backbone)
    shapes = {f"backbone.0.body.{name}": tuple(tensor.shape) for name, tensor in network.state_dict().items()
              if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
    shapes |= {"label_enc.weight": (classes + 1, width - 1), "refpoint_embed.weight": (queries, 4),
               "input_proj.weight": (width, network.fc.in_features, 1, 1), "input_proj.bias": (width,)}
    square, norms = (width, width), ["transformer.decoder.norm"]
    linears = {"class_embed": (classes, width), "transformer.decoder.layers.0.ca_qpos_proj": square}
    for name, *sizes in (("bbox_embed", width, width, width, 4),
                         ("transformer.encoder.query_scale", width, width, width),
                         ("transformer.decoder.query_scale", width, width, width),
                         ("transformer.decoder.ref_point_head", 2 * width, width, width),
                         ("transformer.decoder.ref_anchor_head", width, width, 2)):
        linears |= {f"{name}.layers.{i}": ends[::-1] for i, ends in enumerate(itertools.pairwise(sizes))}
    for kind, count, attention, num_norms in (("encoder", encoder, ["self_attn.out_proj"], 2),
                                              ("decoder", decoder, DECODER_ATTENTION, 3)):
        for name in (f"transformer.{kind}.layers.{i}." for i in range(count)):
            linears |= {name + "linear1": (feed_forward, width), name + "linear2": (width, feed_forward)}
            linears |= {name + part: square for part in attention}
            norms += [f"{name}norm{i + 1}" for i in range(num_norms)]
            shapes |= {name + "activation.weight": (1,)} if slopes else {}
            if kind == "encoder":
                shapes |= {name + "self_attn.in_proj_weight": (3 * width, width),
                           name + "self_attn.in_proj_bias": (3 * width,)}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    return shapes | ({"transformer.patterns.weight": (patterns, width)} if patterns else {})


def blank_weights(**sizes):
    """The authors' state dict, of zeros that take no memory; one box head goes by two names."""
    shapes = official_shapes(**sizes)
    shapes |= {f"transformer.decoder.{name}": shapes[name] for name in shapes if "bbox_embed" in name}
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def golden_weights():
    """The weights that GOLDEN was computed with: every number from a frozen random stream."""
    random, weights = np.random.RandomState(7), {}
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


def golden_batch():
    """-> images, padding mask, targets of GOLDEN."""
    random, sizes = np.random.RandomState(8), ((96, 128), (128, 96))
    pictures = [random.uniform(-2, 2, (3, *size)) for size in sizes]
    images, padding, targets = torch.zeros(2, 3, 128, 128), torch.ones(2, 128, 128, dtype=torch.bool), []
    for index, (picture, (height, width)) in enumerate(zip(pictures, sizes)):
        images[index, :, :height, :width] = torch.tensor(picture)
        padding[index, :height, :width] = False
    for _ in range(2):
        boxes = np.concatenate([random.uniform(0.3, 0.7, (3, 2)), random.uniform(0.1, 0.4, (3, 2))], axis=1)
        labels = random.randint(0, 91, 3)
        targets.append({"labels": torch.tensor(labels), "boxes": torch.tensor(boxes).float()})
    return images, padding, targets


def test_outputs_losses_gradient_and_matching_are_the_authors():
    model = DNDETR.from_official(golden_weights(), dn_groups=2, **NO_NOISE)
    images, padding, targets = golden_batch()
    with torch.no_grad():
        outputs = model.eval()(images, padding)
    assert_near(outputs["pred_logits"][:, 0, :4], GOLDEN["pred_logits"])
    assert_near(outputs["pred_boxes"][:, 0], GOLDEN["pred_boxes"])
    outputs = model.train()(images, padding, targets)
    losses = DNDETRCriterion(model.config)(outputs, targets)
    losses["loss"].backward()
    for name, value in GOLDEN["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    gradients = [p.grad.norm() for p in model.parameters() if p.requires_grad]
    assert torch.stack(gradients).norm().item() == pytest.approx(GOLDEN["gradient_norm"], rel=1e-4)
    matched = dn_detr.matched_objects(outputs, targets, model.config)
    assert [{q: k for q, k in enumerate(row.tolist()) if k >= 0} for row in matched] == GOLDEN["owners"]


SMALL = dict(encoder=1, decoder=2, queries=8, slopes=False)
SMALL_CONFIG = dict(num_encoder_layers=1, num_decoder_layers=2, num_queries=8, dim_feedforward=64,
                    backbone="resnet18", activation="relu")


@pytest.mark.parametrize("sizes, args, expected", [
    (dict(encoder=6, decoder=6, queries=300, feed_forward=2048, backbone="resnet50"),         # the R50 file
     dict(nheads=8, dropout=0.0, transformer_activation="prelu", dilation=False, scalar=5, lr=1e-4,
          label_noise_scale=0.2, box_noise_scale=0.4), {}),
    (SMALL | dict(backbone="resnet50"),
     dict(nheads=4, dropout=0.1, transformer_activation="gelu", scalar=3, label_noise_scale=0.5,
          box_noise_scale=0.3, dilation=True),
     SMALL_CONFIG | dict(num_heads=4, dropout=0.1, activation="gelu", dn_groups=3, label_noise=0.5,
                         center_noise=0.3, size_noise=0.3, backbone="resnet50", dilation=True)),
    (SMALL | dict(width=64, patterns=3, classes=7), None,      # neither slopes nor options
     SMALL_CONFIG | dict(hidden_dim=64, num_patterns=3, num_classes=7))], ids=range(3))
def test_authors_files_give_sizes_options_and_overrides(tmp_path, sizes, args, expected):
    weights = {f"module.{name}": tensor for name, tensor in blank_weights(**sizes).items()}
    assert expected or len(weights) == 591                     # as many as in the R50 file
    content = weights if args is None else {"model": weights, "args": argparse.Namespace(**args), "epoch": 49}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert DNDETR.from_official(tmp_path / "checkpoint.pth").config == DNDETRConfig(**expected)
    overrides = dict(num_heads=2, dn_groups=0, dropout=0.2)
    content |= {} if args is None else {"args": args}          # options as a dict, too
    assert DNDETR.from_official(content, **overrides).config == DNDETRConfig(**expected | overrides)


def test_resnets_are_known_by_their_channels_and_blocks():
    assert sorted(dn_detr.RESNETS.values()) == sorted(dn_detr.BACKBONES[1:])
    for sizes, name in dn_detr.RESNETS.items():
        with torch.device("meta"):
            network = get_model(name)
        assert sizes == (network.fc.in_features, len(network.layer3))


@pytest.mark.parametrize("lost, added, message", [
    ("transformer.decoder.norm.weight", {"extra.weight": torch.zeros(256)}, "(?s)decoder.norm.weight.*extra"),
    ("input_proj.bias", {"input_proj.bias": torch.zeros(3)}, r"(?s)input_projection.bias.*\[3\].*\[256\]"),
    (None, {"backbone.0.body.layer3.9.bn1.bias": torch.zeros(3)}, "a network of 512 channels, 3 blocks"),
    ("class_embed.weight", {}, "not a DN-DETR checkpoint.*class_head.weight"),
    (None, {"model": None}, "this dict is not .*its model is not a state dict"),
    (None, {"model": {"input_proj.bias": 3}}, "its model is not a state dict"),
    (None, {"model": {}}, "this dict is not a DN-DETR checkpoint of the authors: it lacks"),
    (None, {"model": {}, "args": 3}, "this dict is not a DN-DETR checkpoint")])
def test_weights_that_are_not_the_authors_are_named(lost, added, message):
    weights = blank_weights(encoder=1, decoder=1, queries=4)
    weights.pop(lost, None)
    with pytest.raises(ValueError, match=message):
        DNDETR.from_official(weights | added)


class Trap:
    """Its pickle makes a directory when it is opened without care."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("kind", ["absent", "truncated", "page", "tensor", "code"])
def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some.pth"
    if kind != "absent":
        torch.save({"args": Trap()} if kind == "code" else torch.zeros(3), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "page":
        path.write_text("<!DOCTYPE html><html><title>Quota exceeded</title></html>")
    reason = "there is no such file" if kind == "absent" else "it is damaged, or not a dict"
    with pytest.raises(ValueError, match=f"some.pth can't be read as a checkpoint: {reason}") as refusal:
        DNDETR.from_official(path)
    assert "weights_only" not in str(refusal.value) and not (tmp_path / "sprung").exists()


# ---- dn_detr.py as a whole -----------------------------------------------------------------------

def test_the_tour_prints_noise_mask_shapes_and_losses(capsys):
    dn_detr.tour()
    _, noise, mask, shapes, loss = re.split(r"(?m)^[1-4]\. ", capsys.readouterr().out)
    box, *noised = torch.tensor([float(x) for x in re.findall(r"\d\.\d+", noise)]).view(4, 4)
    assert all(((x - box).abs() <= torch.tensor([0.06, 0.04, 0.12, 0.08]) + 1e-4).all() for x in noised)
    expected = dn_detr.dn_attention_mask(2, 2, 3).int().flatten().tolist()
    assert [int(x) for x in re.findall(r"\b[01]\b", mask.partition("\n")[2])] == expected
    assert re.findall(r"(\w+) \[.+?\] = (\[.+\])", shapes) == [
        ("dn_logits", "[2, 2, 4, 3]"), ("dn_boxes", "[2, 2, 4, 4]"), ("all_logits", "[2, 2, 6, 3]"),
        ("all_boxes", "[2, 2, 6, 4]")]
    total, *parts = (float(number) for number in re.findall(r"\d+\.\d\d", loss))
    assert total == pytest.approx(sum(parts), abs=0.02) and min(parts) > 0 and len(parts) == 2


# ---- train_toy.py: helpers -----------------------------------------------------------------------

SMALL_MODEL = ("--batch-size 4 --hidden-dim 16 --num-heads 2 --num-queries 6 --dim-feedforward 16 "
               "--num-decoder-layers 2 --num-encoder-layers 0 --small-widths 4 8 16").split()
# 10 images in batches of 4: the last batch of an epoch is smaller.
SHAPES_RUN = [*"--train-size 10 --val-size 4 --epochs 2".split(), *SMALL_MODEL]


def options_of(*flags):
    return train_toy.parse_options([str(flag) for flag in flags])


def train(*flags):
    """Train without plots, which take longer than these trainings."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("save_figure", "draw_curves", "draw_detections"):
            patched.setattr(train_toy, name, lambda *arguments: None)
        return train_toy.train(options_of(*flags), CPU)


def main(*flags):
    train_toy.main([str(flag) for flag in (*flags, "--device", "cpu")])


def refused(capsys, *flags):
    """What the program says when it ends because of these flags."""
    with pytest.raises(SystemExit) as ended:
        train_toy.main([str(flag) for flag in flags])
    assert ended.value.code not in (0, None)
    return f"{ended.value.code} {capsys.readouterr().err}"


def spy(monkeypatch, owner, name, watch):
    """Call `watch` with the arguments of a function, whenever it is called."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **how: (watch(*args, **how), original(*args, **how))[1])


def coco(sizes, annotations, categories=((3, "cat"), (7, "dog"))):
    """A dict in COCO format of images {id: (width, height)} and of (image id, category id, bbox, more).
    Annotation ids start at 0, as in many files; there is no "info"."""
    return {"images": [{"id": id, "file_name": f"{id}.png", "width": width, "height": height}
                       for id, (width, height) in sizes.items()],
            "annotations": [{"id": number, "image_id": image_id, "category_id": id, "bbox": bbox} | more
                            for number, (image_id, id, bbox, more) in enumerate(annotations)],
            "categories": [{"id": id, "name": name} for id, name in categories]}


def tiny_coco():
    """Ids with gaps, a crowd, a degenerate box, one that reaches out, an empty image, mixed sizes."""
    return coco({5: (80, 64), 8: (64, 80), 9: (64, 64)}, [
        (5, 7, [6, 4, 30, 20], {}), (5, 3, [60, 10, 40, 20], {}), (5, 3, [10, 10, 0, 5], {}),
        (8, 3, [4, 6, 20, 30], {}), (8, 3, [0, 0, 64, 80], dict(iscrowd=1, area=2400))])


def save_coco(folder, data):
    """Write images of noise and an annotation file; returns the two arguments of --coco-train."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in data["images"]:
        pixels = np.random.RandomState(image["id"]).randint(0, 255, (image["height"], image["width"], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / image["file_name"])
    (folder / "annotations.json").write_text(json.dumps(data))
    return str(folder / "images"), str(folder / "annotations.json")


def dataset_of(data, **how):
    return train_toy.DetectionDataset(data, None, **how)


def perfect_detections(data):
    """One for each object of a dict in COCO format that can be found, numbered as in DetectionDataset."""
    images, categories = ([each["id"] for each in data[kind]] for kind in ("images", "categories"))
    return [{"image_id": images.index(each["image_id"]), "score": 0.9, "bbox": each["bbox"],
             "category_id": sorted(categories).index(each["category_id"])}
            for each in data["annotations"] if min(each["bbox"][2:]) >= 1 and not each.get("iscrowd")]


# ---- train_toy.py: shapes and augmentation -------------------------------------------------------


def test_shapes_touch_all_four_sides_of_their_boxes():
    for (name, inside), size in itertools.product(train_toy.SHAPE_MASKS.items(), (9, 12, 18, 40)):
        v, u = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
        shape = inside(u, v)
        assert shape[0].any() and shape[-1].any() and shape[:, 0].any() and shape[:, -1].any(), (name, size)


def test_a_scene_is_a_gradient_but_for_the_boxes_of_its_shapes():
    v, u = np.mgrid[:64, :64].reshape(2, -1)
    for seed in range(40):
        image, objects = train_toy.draw_scene(seed)
        outside, pixels = np.ones((64, 64), dtype=bool), image.reshape(3, -1).T.numpy().astype(float)
        for _, (x, y, w, h) in objects:
            outside[y:y + h, x:x + w] = False
        plane = np.stack([np.ones(4096), u, v], 1)
        fit = np.linalg.lstsq(plane[outside.ravel()], pixels[outside.ravel()], rcond=None)[0]
        rest = np.linalg.norm(pixels - plane @ fit, axis=1).reshape(64, 64)
        assert rest[outside].max() < 95 and rest[outside].mean() < 25
        for _, (x, y, w, h) in objects[-1:]:                   # on top of the others
            assert (rest[y:y + h, x:x + w] > 40).mean() > 0.2


def test_scenes_depend_on_seed_split_index_and_vary_in_crowding():
    few, many = (train_toy.open_shapes(size, 1, "val") for size in (3, 200))
    assert all(torch.equal(few[1](index), many[1](index)) for index in range(3))
    for seed, split in ((2, "val"), (1, "train")):
        options = options_of("--seed", seed, "--train-size", 2, "--val-size", 2)
        dataset = train_toy.build_dataset(options, split)
        other = train_toy.open_shapes(2, seed, split)[1]
        assert torch.equal(dataset[0][0], other(0)) and not torch.equal(few[1](0), other(0))
    dataset = dataset_of(many[0])
    counts = np.array([len(labels) for labels in dataset.labels])
    assert 2 <= (counts == 0).sum() <= 22 and 2 <= (counts > 8).sum() <= 22 and counts.max() <= 12
    assert {*range(1, 9)} <= {*counts} and min(dataset.class_counts()) > 60
    for a, b in (pair for boxes in dataset.boxes for pair in itertools.combinations(boxes, 2)):
        shared = (torch.minimum(a, b)[2:] - torch.maximum(a, b)[:2]).clamp(min=0).prod()
        assert shared <= 0.301 * min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())


def test_augmentation_follows_seed_epoch_index_and_moves_boxes():
    options = options_of("--train-size", 40)
    dataset, plain = (train_toy.build_dataset(options, "train", augment=augment) for augment in (True, False))
    state, first = torch.get_rng_state(), [dataset[index] for index in range(40)]
    assert torch.equal(state, torch.get_rng_state()), "augmentation disturbs the noise"
    assert all(torch.equal(dataset[index][0], first[index][0]) for index in reversed(range(40)))
    ways = [*itertools.product((False, True), (False, True), itertools.permutations(range(3)))]
    counts = []
    for (image, target), (original, truth) in zip(first, plain):
        counts += [(flip, invert, order) for flip, invert, order in ways if torch.equal(
            image, (255 - original if invert else original)[list(order)].flip(-1 if flip else ()))]
        x, *others = truth["boxes"].T
        assert_near(target["boxes"], torch.stack([1 - x if counts[-1][0] else x, *others], 1))
    flips, inverts, orders = zip(*counts)
    assert len(counts) == 40 and 8 < sum(flips) < 32 and 8 < sum(inverts) < 32 and len(set(orders)) == 6
    for changed in (dict(epoch=1), dict(seed=1)):
        vars(dataset).update(dict(epoch=0, seed=0) | changed)
        assert sum(torch.equal(dataset[index][0], first[index][0]) for index in range(40)) < 12, changed


# ---- train_toy.py: datasets in COCO format -------------------------------------------------------


def test_gaps_crowds_bad_boxes_and_empty_images_are_read_right(tmp_path):
    paths = save_coco(tmp_path, tiny_coco())
    options = [options_of("--coco-train", *paths, "--overfit", n, "--image-size", 64) for n in (3, 1)]
    dataset, first = (train_toy.build_dataset(each, "val", augment=True) for each in options)
    assert (dataset.dropped, dataset.clipped, dataset.names) == (1, 1, {3: "cat", 7: "dog"})
    (wide, target), (tall, tall_target), (_, empty) = dataset
    assert target["labels"].tolist() == [1, 0] and tall_target["labels"].tolist() == [0]   # not the crowd
    assert_near(target["boxes"], [[21 / 80, 14 / 64, 30 / 80, 20 / 64], [70 / 80, 20 / 64, 20 / 80, 20 / 64]])
    assert_near(tall_target["boxes"], [[14 / 64, 21 / 80, 20 / 64, 30 / 80]])
    assert wide.shape == (3, 64, 80) and tall.shape == (3, 80, 64) and target["size"] == (64, 80)
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)
    assert dataset.class_counts() == [2, 1] and dataset.image_ids == [5, 8, 9] and first.image_ids == [5]


def test_only_the_papers_model_trains_on_crops_of_many_sizes(tmp_path):
    paths = save_coco(tmp_path, tiny_coco())
    for flags in (["--model", "paper"], []):
        options = options_of(*flags, "--coco-train", *paths, "--coco-val", *paths, "--image-size", 64)
        dataset, shapes, images = train_toy.build_dataset(options, "train", augment=True), set(), set()
        for dataset.epoch in range(20):
            items = [dataset[index] for index in range(3)]
            dn_detr.check_targets([target for _, target in items], 3, 2)
            shapes |= {tuple(image.shape[1:]) for image, _ in items}
            images |= {image.numpy().tobytes() for image, _ in items}
        assert len(images) > 30                                # flipped, and in other colors
        whole = {(64, 80), (80, 64), (64, 64)}
        shorter = {min(shape) for shape in shapes if max(shape) < 106}
        assert shorter <= {*range(40, 65, 4)} and {40, 64} <= shorter if flags else shapes == whole
        assert {tuple(image.shape[1:]) for image, _ in train_toy.build_dataset(options, "val")} == whole


def changed(kind, number, **values):
    """-> a function that changes a record of a dict in COCO format. `...` removes a value."""
    def change(data):
        record = data[kind][number] | values
        data[kind][number] = {name: value for name, value in record.items() if value is not ...}
    return change


@pytest.mark.parametrize("damage, message", [
    *((changed("annotations", 1, **{name: value}), f"annotations need.*Number 1 is .*'{name}': {value!r}")
      for name, value in [("image_id", 77), ("image_id", "5"), ("image_id", None), ("category_id", 4),
                          ("area", "9"), ("iscrowd", 2)]),
    *((changed("annotations", 1, bbox=value), f"annotations need.*Number 1 is .*{re.escape(str(value))}")
      for value in ([1, 2, 3], [], None, [1, 2, "3", 4], [1, 2, None, 4], [1, 2, math.nan, 4])),
    *((changed("images", 1, **{name: value}), f"images need.*'{name}': {value!r}") for name, value in [
        ("height", 0), ("width", "80"), ("height", None), ("width", -3), ("file_name", None), ("id", 5)]),
    *((changed("categories", 1, **{name: value}), f"categories need.*'{name}': {value!r}")
      for name, value in (("id", 3), ("name", None))),
    (changed("annotations", 1, bbox=...), "annotations need.*Number 1.*KeyError"),
    (changed("images", 1, height=...), "images need.*Number 1.*KeyError"),
    (lambda data: data.pop("categories"), "not in COCO format.*no list of categories"),
    (lambda data: data.update(annotations=None), "no list of annotations"),
    (lambda data: "[1]", "no list of images"), (lambda data: "not json", "x.json can't be read as JSON")])
def test_broken_annotations_are_shown_before_training(tmp_path, damage, message):
    data = tiny_coco()
    text = damage(data)
    (tmp_path / "x.json").write_text(text if text in ("[1]", "not json") else json.dumps(data))
    with pytest.raises(ValueError, match=message):
        train_toy.read_coco(tmp_path / "x.json")


def test_what_annotation_tools_write_is_accepted(tmp_path):
    data, path = tiny_coco(), tmp_path / "x.json"
    changed("annotations", 0, area=None, iscrowd="0", id=...)(data)
    changed("annotations", 3, area=-6.0, iscrowd=None)(data)
    changed("categories", 0, name="Łoś 猫")(data)
    for encoding, is_ascii in (("utf-8", False), ("utf-8-sig", False), ("utf-16", False), ("utf-8", True)):
        path.write_bytes(json.dumps(data, ensure_ascii=is_ascii).encode(encoding))
        dataset = dataset_of(train_toy.read_coco(path))
        assert dataset.names[3] == "Łoś 猫" and dataset.class_counts() == [2, 1]


ONE, OTHER = [8, 8, 20, 20], [8, 30, 20, 20]


@pytest.mark.parametrize("annotations, ids", [
    ([(1, 3, ONE, {}), (1, 7, OTHER, dict(area=-400)), (1, 3, [30, 8, 0, 20], dict(area=0))], (3, 7)),
    ([(1, 3, ONE, dict(area=None)), (1, 7, OTHER, {}), (4, 7, [90, 8, 5, 5], {})], (3, 7)),
    ([(1, 3, ONE, {}), (1, 7, OTHER, {}), (4, 3, [0, 0, 32, 32], dict(iscrowd="1"))], (3, 7)),
    ([(1, 30, ONE, {}), (4, 4, ONE, {})], (30, 4)), ([(1, "b", ONE, {}), (1, "a", OTHER, {})], ("b", "a"))])
def test_perfect_detections_reach_100_whatever_the_annotations(annotations, ids):
    data = coco({1: (64, 64), 4: (32, 32)}, annotations, [(id, "one name for all") for id in ids])
    dataset = dataset_of(data)
    metrics = train_toy.coco_metrics(dataset, perfect_detections(data))
    assert metrics["AP"] == pytest.approx(100) and dataset.class_counts() == [1, 1]
    assert metrics["AP_per_class"] == pytest.approx(dict.fromkeys(ids, 100))


def test_boxes_are_clipped_alike_for_training_and_for_ap():
    dataset = dataset_of(coco({1: (64, 48)}, [(1, 3, [-10, 8, 30, 60], {}), (1, 3, [20, 20, 20, 20], {}),
                                              (1, 7, [0, 0, 64, 48.5], {})]))
    assert (dataset.clipped, dataset.dropped) == (1, 0), "half a pixel is rounding"
    assert dataset.boxes[0].tolist() == [[0, 8, 20, 48], [20, 20, 40, 40], [0, 0, 64, 48]]
    boxes = (0, [0, 8, 20, 40]), (0, [20, 20, 20, 20]), (1, [0, 0, 64, 48])
    detections = [{"image_id": 0, "category_id": label, "bbox": box, "score": 0.9} for label, box in boxes]
    assert train_toy.coco_metrics(dataset, detections)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("boxes, more, words", [
    ([[0.1, 0.1, 0.8, 0.8], [0, 0, 1, 1]], {}, ("in pixels", "relative")),
    ([[10, 10, 60, 60], [30, 40, 60, 50]], {}, (r"not \[x0, y0, x1, y1\]",)),
    ([[30, 9, -20, 20], [99, 9, 20, 20]], {}, ("first 1 images", "2 were dropped", "0 are iscrowd")),
    ([ONE], dict(iscrowd=1), ("no object", "0 were dropped", "1 are iscrowd"))])
def test_boxes_of_another_format_and_no_object_are_explained(boxes, more, words):
    for word in ("data.json", *words):
        with pytest.raises(ValueError, match=word):
            dataset_of(coco({1: (64, 64)}, [(1, 3, box, more) for box in boxes]), source="data.json")


def test_held_out_data_have_the_training_labels_or_are_refused(tmp_path):
    training = save_coco(tmp_path / "train", tiny_coco())
    for name, message in (("dog", None), ("cow", "category 7 is 'cow', but .*'cat'")):
        categories = [(7, name), (9, "never seen")]
        held_out = save_coco(tmp_path / "val", coco({1: (64, 64)}, [(1, 7, ONE, {})], categories))
        options = options_of("--coco-train", *training, "--coco-val", *held_out, "--output-dir", tmp_path)
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            val_set = train_toy.start(options)[2]
            assert val_set.labels[0].tolist() == [1]
            assert len({bytes(val_set[0][0].numpy()) for val_set.epoch in range(8)}) == 1, "not augmented"


def test_the_data_are_described_with_what_will_not_work():
    many = [(1, 3, ONE, {})] * 101 + [(2, 3, [9, 9, 0, 9], {}), (2, 3, [50, 9, 20, 9], {})]
    dataset = dataset_of(coco({1: (64, 64), 2: (64, 64)}, many), source="x.json")
    text, *warnings = dataset.describe(num_queries=100).split("\n")
    assert re.match("x.json: 2 images,.*at most 101 .*102 objects of 1 classes", text)
    for warning, message in itertools.zip_longest(warnings, (
            "100 queries: raise --num-queries", "100 .*AP counts", "1 of 2 classes have no object",
            "1 boxes .*dropped", "1 boxes clipped")):
        assert re.search(message, warning)
    enough = coco({1: (64, 64)}, [(1, 3, ONE, {})] * 50 + [(1, 7, ONE, {})] * 50)
    assert "\n" not in dataset_of(enough).describe(100)


def test_missing_damaged_and_turned_training_images_are_named(tmp_path):
    folder, path = save_coco(tmp_path, tiny_coco())
    _, load = train_toy.open_coco(folder, path, 64)
    exif = Image.Exif()
    exif[0x0112] = 6                                           # to be turned by 90 degrees when shown
    Image.new("RGB", (64, 80)).save(f"{folder}/5.png", exif=exif)
    Path(f"{folder}/8.png").write_bytes(b"this is no picture")
    for index, message in ((0, r"5.png has \(80, 64\) pixels.*EXIF"), (1, "8.png can't be read")):
        with pytest.raises(ValueError, match=message):
            load(index)
    data = tiny_coco()
    for image in data["images"][1:]:
        image["file_name"] = f"images/{image['file_name']}"
    Path(path).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(f"2 of 3 images are missing, e.g. {folder}/images/8.png")):
        train_toy.open_coco(folder, path, 64)
    assert len(train_toy.open_coco(folder, path, 64, count=1)[0]["images"]) == 1


# ---- train_toy.py: image files, and batches ------------------------------------------------------

GRAY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


@pytest.mark.parametrize("stored, expected", [
    *((Image.fromarray(GRAY).convert(mode), GRAY) for mode in ("L", "P", "RGB", "RGBA", "LA")),
    *((Image.fromarray(values), GRAY) for values in (
        GRAY.astype(np.uint16) * 257, GRAY.astype(np.uint16), GRAY.astype(np.int32), GRAY.astype(np.float32),
        GRAY.astype(np.float32) / 255, (GRAY * (4095 / 255)).astype(np.uint16))),
    (Image.fromarray(GRAY.astype(np.int32) * 1000), GRAY / 230 * 255)])
def test_images_of_every_kind_are_read_in_their_range(tmp_path, stored, expected):
    stored.save(tmp_path / "image.tif")
    for channel in train_toy.read_image(tmp_path / "image.tif", 4)[0]:
        assert np.abs(channel.numpy() - np.asarray(expected, dtype=float)).max() <= 1


def test_gray_values_without_a_meaning_are_refused(tmp_path):
    for values in (GRAY - np.float32(9), GRAY - np.int32(9), GRAY + np.float32("inf")):
        Image.fromarray(values).save(tmp_path / "image.tif")
        with pytest.raises(ValueError, match="image.tif can't be read.*convert it to 8 bits"):
            train_toy.read_image(tmp_path / "image.tif", 4)


def test_photographs_are_upright_in_predict_not_in_training(tmp_path):
    for orientation, quarters in ((1, 0), (3, 2), (6, -1), (8, 1)):
        upright, exif = np.rot90(GRAY, quarters), Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(GRAY).save(tmp_path / "image.png", exif=exif)
        for expected, how in ((upright, dict(upright=True)), (GRAY, {})):
            image, size = train_toy.read_image(tmp_path / "image.png", 4, **how)
            assert image[0].tolist() == expected.tolist() and size == expected.shape


def test_the_shorter_side_is_set_and_the_longer_is_limited(tmp_path):
    for size, expected in (((150, 120), (75, 60)), ((120, 150), (60, 75)), ((300, 60), (100, 20)),
                           ((2000, 1), (100, 1)), ((1, 1), (60, 60)), ((16, 16), (60, 60))):
        Image.new("RGB", size, "red").save(tmp_path / "x.png")
        image, size_in_file = train_toy.read_image(tmp_path / "x.png", 60)
        assert image.shape[:0:-1] == expected and size_in_file == size[::-1] and image[0].min() == 255


def test_large_photographs_are_decoded_small_in_the_right_colors(tmp_path, monkeypatch):
    quarters = np.zeros((1200, 1600, 3), dtype=np.uint8)
    quarters[:600, :800], quarters[600:, 800:] = (250, 10, 10), (10, 10, 250)
    Image.fromarray(quarters).save(tmp_path / "large.jpg", quality=95)
    decoded = []
    spy(monkeypatch, Image.Image, "resize", lambda image, *args, **how: decoded.append(image.size))
    image, size = train_toy.read_image(tmp_path / "large.jpg", 96)
    assert size == (1200, 1600) and image.shape == (3, 96, 128) and decoded == [(200, 150)]     # an eighth
    for (y, x), color in (((24, 32), (250, 10, 10)), ((72, 96), (10, 10, 250)), ((24, 96), (0, 0, 0))):
        assert image[:, y, x].tolist() == pytest.approx(color, abs=12)


def test_batches_are_padded_masked_and_normalized_as_imagenet():
    items = [(torch.full((3, h, w), 200, dtype=torch.uint8), {}) for h, w in ((4, 6), (6, 5))]
    images, mask, _ = train_toy.collate(items)
    for index, (height, width) in enumerate(((4, 6), (6, 5))):
        assert mask[index].tolist() == [[y >= height or x >= width for x in range(6)] for y in range(6)]
    normalized, moved = train_toy.normalize(images, mask, CPU)
    for channel, average, deviation in ((0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)):    # R, G, B
        expected = torch.where(mask, 0.0, (200 / 255 - average) / deviation)
        assert_near(normalized[:, channel], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(moved, mask) and train_toy.collate(items[:1] * 2)[1] is None


# ---- train_toy.py: model, optimizer, one training ------------------------------------------------


def change_losses(monkeypatch, change):
    """Let `change` (step, outputs, losses) act on what the criterion of train() gets and returns."""
    steps = itertools.count()

    class Changed(DNDETRCriterion):
        def forward(self, outputs, targets):
            step = next(steps)
            change(step, outputs, {})
            losses = super().forward(outputs, targets)
            change(step, {}, losses)
            return losses
    monkeypatch.setattr(train_toy, "DNDETRCriterion", Changed)


def test_training_is_adamw_with_clipping_and_decay_done_by_hand(tmp_path, monkeypatch):
    def shrink(step, outputs, losses):                         # to a gradient that is not clipped
        losses |= {"loss": losses["loss"] * 1e-6} if losses and step == 4 else {}
    change_losses(monkeypatch, shrink)
    flags = *SHAPES_RUN, "--lr", 0.01, "--label-noise", 0, "--center-noise", 0, "--size-noise", 0
    history = train(*flags, "--epochs", 4, "--output-dir", tmp_path)
    torch.manual_seed(0)
    model, step, totals, norms = train_toy.build_model(options_of(*flags), 6), 0, [], []
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    dataset = train_toy.build_dataset(options_of(*SHAPES_RUN), "train", augment=True)
    for epoch in range(4):
        for images, _, targets in train_toy.train_batches(dataset, 4, seed=0, epoch=epoch):
            inputs, _ = train_toy.normalize(images, None, CPU)
            model.train().zero_grad()
            loss = DNDETRCriterion(model.config)(model(inputs, None, targets), targets)["loss"]
            loss = loss * (1e-6 if step == 4 else 1)
            loss.backward()
            totals.append(loss.item())
            norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
            rate = 0.01 * min((step + 1) / 2, 1 - step / 12)   # 2 of 12 steps are warm-up, then decay
            step += 1
            with torch.no_grad():
                for name, p in model.named_parameters():
                    gradient, (first, second) = p.grad * min(1, 0.1 / norms[-1]), moments[name]
                    first.mul_(0.8).add_(0.2 * gradient)
                    second.mul_(0.95).add_(0.05 * gradient ** 2)
                    p.mul_(1 - rate * 0.05)
                    p.sub_(rate * first / (1 - 0.8 ** step) / ((second / (1 - 0.95 ** step)).sqrt() + 1e-8))
    assert min(norms) < 0.1 < 1 < sorted(norms)[1]
    for name, weights in torch.load(tmp_path / "last.pt")["model"].items():
        assert_close(weights, model.state_dict()[name], rtol=1e-4, atol=1e-4)
    assert [row["loss"] for row in history] == pytest.approx(np.reshape(totals, (4, 3)).mean(1), rel=1e-3)
    # 10 images are 3 steps of 4 and fewer; the rate ends at 0 and is never negative.
    assert [row["step"] for row in history] == [3, 6, 9, 12]
    assert [row["lr"] for row in history] == pytest.approx([0.0075, 0.005, 0.0025, 0], abs=1e-9)


def test_pretrained_weights_are_loaded_frozen_and_learn_slowly(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    flags = [*SHAPES_RUN, "--pretrained-backbone", "--backbone"]
    for backbone, message in (("resnet18", "resnet18.*no route"), ("small", "a torchvision backbone")):
        with pytest.raises(ValueError, match=message):
            train_toy.build_model(options_of(*flags, backbone), 6)
    state = {name: torch.rand(tensor.shape) for name, tensor in get_model("resnet18").state_dict().items()}
    name = train_toy.get_model_weights("resnet18")["IMAGENET1K_V1"].url.rsplit("/", 1)[-1]
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(state, tmp_path / "checkpoints" / name)
    pretrained = train_toy.build_model(options_of(*flags, "resnet18"), 6)
    assert pretrained.config.frozen_norm
    for name, tensor in pretrained.backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    from_scratch = tiny_model(backbone="resnet18", frozen_norm=False)
    for model, factor in ((pretrained, 0.1), (from_scratch, 1)):
        optimizer, _ = train_toy.build_optimizer(model, 0.01, 2000)
        rate_of = {p: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            expected = 0.01 * factor if name.startswith("backbone.") else 0.01
            is_frozen = factor == 0.1 and name.startswith(("backbone.conv1", "backbone.layer1"))
            assert rate_of.get(parameter) == (None if is_frozen else pytest.approx(expected)), name


@pytest.mark.parametrize("num_steps, scales", [
    (2000, {0: 0.01, 49: 0.5, 99: 0.9505, 500: 0.75, 1999: 0.0005, 2000: 0}), (30, {0: 0.25, 3: 0.9, 30: 0}),
    (1, {0: 1, 1: 0})])
def test_the_rate_warms_up_for_100_steps_and_ends_at_zero(num_steps, scales):
    _, schedule = train_toy.build_optimizer(tiny_model(), 0.01, num_steps)
    assert {step: schedule.lr_lambdas[-1](step) for step in scales} == pytest.approx(scales)


def test_an_easier_start_looks_at_the_anchor_from_a_grid():
    model = tiny_model(anchor_temperature=20, position_frequency=4, cell_centers=True)
    train_toy.ease_start(model)
    x, y = torch.tensor([1, 3, 5, 1, 3, 5, 1]) / 6, torch.tensor([1, 1, 1, 3, 3, 3, 5]) / 6
    assert_near(model.anchor_logits.weight.sigmoid(), torch.stack([x, y, *torch.full((2, 7), 0.3)], 1))
    places = torch.cartesian_prod(*[(torch.arange(6) + 0.5) / 6] * 2)           # (y, x) of 36 cells
    encoded = dn_detr.sine_encoding(places, 16, 20.0, 4.0)
    for layer in model.decoder.layers:
        query, key = layer.cross_query_sine(encoded), layer.cross_key_position(encoded)
        assert torch.equal((query @ key.T).argmax(-1), torch.arange(36))
        assert_near(key @ key.T, 4 * encoded @ encoded.T, atol=1e-3)             # a rotation, times 2
    for part in (model.encoder, model.decoder):
        assert torch.equal(part.position_scale(torch.randn(36, 32)), torch.ones(36, 32))


def test_options_reach_the_model_and_the_rate_suits_it():
    for flags, lr in (("", 3e-3), ("--model paper", 1e-4), ("--init x.pt", 1e-4), ("--lr 1", 1),
                      ("--coco-train a b --overfit 8", 1e-3), ("--coco-train a b --coco-val a b", 1e-3)):
        assert options_of(*flags.split()).lr == lr
    flags = ("--dn-groups 2 --num-queries 9 --label-noise 0.1 --hidden-dim 32 --activation gelu --no-dn-mask "
             "--small-widths 4 8 --dropout 0.1 --num-patterns 2 --no-cell-centers").split()
    expected = dict(dn_groups=2, num_queries=9, label_noise=0.1, hidden_dim=32, activation="gelu",
                    dropout=0.1, dn_mask=False, small_widths=[4, 8], num_patterns=2, cell_centers=False)
    config = dataclasses.asdict(train_toy.build_model(options_of(*flags), 6).config)
    assert config.items() >= expected.items()
    paper = train_toy.build_model(options_of("--model", "paper", "--backbone", "resnet18"), 6)
    assert paper.config == DNDETRConfig(num_classes=6, backbone="resnet18", frozen_norm=False)
    layer = paper.decoder.layers[0]
    assert not torch.equal(layer.cross_query_sine.weight, layer.cross_key_position.weight), "no easier start"
    for kind, count in (("grid", 1), ("normal", 50)):
        model = train_toy.build_model(options_of("--anchors", kind), 6)
        assert len(model.anchor_logits.weight.sigmoid()[:, 2:].unique()) == count
        assert (model.config.num_queries, model.config.hidden_dim, model.config.num_classes) == (25, 64, 6)
    photographs = train_toy.build_model(options_of("--coco-train", "a", "b", "--overfit", 8), 3).config
    assert (photographs.num_queries, photographs.hidden_dim) == (100, 128)


def test_the_order_of_images_depends_on_seed_and_epoch():
    dataset, orders = train_toy.build_dataset(options_of("--train-size", 10), "train"), set()
    for seed, epoch in itertools.product((0, 5), (0, 1)):
        batches = [targets for _, _, targets in train_toy.train_batches(dataset, 4, seed, epoch)]
        order = [target["index"] for targets in batches for target in targets]
        assert [len(targets) for targets in batches] == [4, 4, 2] and dataset.epoch == epoch
        assert sorted(order) == list(range(10)) != order
        orders.add(tuple(order))
    assert len(orders) == 4


def test_a_run_does_what_it_should_epoch_by_epoch(tmp_path, monkeypatch):
    seeds, compared, precisions, metrics = [], [], iter([30.0, 50.0, 40.0, 45.0]), train_toy.coco_metrics
    spy(monkeypatch, train_toy, "train_batches", lambda *args, **how: seeds.append(torch.initial_seed()))
    spy(monkeypatch, train_toy, "compare_matching", lambda *matchings: compared.append(matchings))
    monkeypatch.setattr(train_toy, "coco_metrics", lambda *args: metrics(*args) | {"AP": next(precisions)})
    seen, folder = [], tmp_path / "run"
    options = options_of(*SHAPES_RUN, "--output-dir", folder, "--epochs", 4, "--seed", 5)
    history = train_toy.train(options, CPU, after_epoch=seen.append)
    assert len(set(seeds)) == 4 and len(seen) == 4 and [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert compared[0][0] == {} and all(new[0] is old[1] for old, new in itertools.pairwise(compared))
    assert torch.load(folder / "best.pt")["epoch"] == 2, "best.pt is the best of all epochs"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == json.loads(json.dumps(history)) and 0 < rows[0]["cpu_seconds"] < rows[3]["cpu_seconds"]
    for row in rows:
        parts = {prefix: sum(weight * value for kind, weight in (("ce", 2), ("bbox", 5), ("giou", 2))
                             for name, value in row.items() if name.startswith(f"{prefix}loss_{kind}"))
                 for prefix in ("", "dn_")}
        assert row["loss_denoising"] == pytest.approx(parts["dn_"], rel=1e-4)
        assert row["loss"] == pytest.approx(sum(parts.values()), rel=1e-4)
    about = json.loads((folder / "config.json").read_text())
    assert about["options"]["seed"] == 5 and about["config"]["num_queries"] == 6
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in ("curves", "detections"))
    fresh = [options_of(*SHAPES_RUN, "--seed", seed, "--output-dir", tmp_path / "x") for seed in (5, 5, 6)]
    first, same, other = (train_toy.start(each)[0].state_dict() for each in fresh)
    assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first["class_head.weight"], other["class_head.weight"])


@pytest.mark.parametrize("what, bad_step", [("loss", 0), ("gradient", 0), ("prediction", 4)])
def test_a_step_that_is_not_finite_stops_and_is_named(tmp_path, monkeypatch, what, bad_step):
    def poison(step, outputs, losses):
        if step == bad_step and outputs and what == "prediction":
            outputs["all_boxes"] = outputs["all_boxes"] * math.inf
        elif step == bad_step and losses and what != "prediction":
            losses["loss"] = losses["loss"] * (math.nan if what == "loss" else 1)
            losses["loss"].register_hook(lambda gradient: gradient * (math.inf if what == "gradient" else 1))
    change_losses(monkeypatch, poison)
    dataset = train_toy.build_dataset(options_of(*SHAPES_RUN), "train")
    batches = [targets for epoch in (0, 1) for _, _, targets in train_toy.train_batches(dataset, 4, 0, epoch)]
    images = re.escape(str([target["image_id"] for target in batches[bad_step]]))
    with pytest.raises(ValueError, match=rf"step {bad_step}, images {images}.* not finite"):
        train(*SHAPES_RUN, "--output-dir", tmp_path)
    assert torch.load(tmp_path / "last.pt")["step"] == bad_step // 3 * 3


def test_mixed_precision_is_bfloat16_unless_that_is_emulated(tmp_path, monkeypatch):
    kinds, scalers, make_scaler, linear = set(), [], torch.amp.GradScaler, nn.Linear.forward
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **how: (
        scalers.append(make_scaler(*args, **how)) or scalers[-1]))
    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, "forward", lambda self, x: (
            kinds.add((self.training, linear(self, x).dtype)), linear(self, x))[1])
        for flags, kind in (([], torch.float32), (["--amp"], torch.bfloat16)):
            kinds.clear()
            train(*SHAPES_RUN, "--epochs", 1, *flags, "--output-dir", tmp_path / str(kind))
            assert {(True, kind), (False, kind)} <= kinds and not scalers[-1].is_enabled()
            assert flags or torch.bfloat16 not in {dtype for _, dtype in kinds}
    # Where bfloat16 is emulated, float16 needs a scaler, which skips a step whose gradient overflows.
    change_losses(monkeypatch, lambda step, outputs, losses: losses and losses["loss"].register_hook(
        lambda gradient: gradient * (math.inf if step == 1 else 1)))
    with monkeypatch.context() as patched:
        patched.setattr(train_toy, "amp_dtype", lambda device: torch.float16)
        patched.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
        train(*SHAPES_RUN, "--epochs", 1, "--amp", "--output-dir", tmp_path / "half")
    assert scalers[-1].is_enabled() and scalers[-1].get_scale() == 32768
    assert torch.load(tmp_path / "half/last.pt")["optimizer"]["state"][0]["step"] == 2
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert train_toy.amp_dtype(torch.device("cuda")) == torch.float16            # a T4
    assert train_toy.amp_dtype(CPU) == torch.bfloat16


def test_overfit_trains_and_evaluates_on_the_same_plain_images(tmp_path, monkeypatch):
    images = set()
    spy(monkeypatch, train_toy, "normalize", lambda batch, *_: images.update(bytes(x.numpy()) for x in batch))
    flags = "--overfit", 3, "--epochs", 2, *SMALL_MODEL, "--batch-size", 101
    history = train(*flags, "--output-dir", tmp_path)
    _, load = train_toy.open_shapes(3, 0, "train")
    assert images == {bytes(load(index).numpy()) for index in range(3)}
    assert [row["step"] for row in history] == [2, 4] and history[-1]["lr"] == 0       # 67 times 3 images


# ---- train_toy.py: evaluation and pictures -------------------------------------------------------


def test_ap_and_distances_are_measured_in_pixels_of_the_file(tmp_path):
    objects = [(1, 3, [16, 8, 80, 40], {}), (2, 3, [8, 16, 40, 80], {}), (2, 7, [40, 80, 40, 80], {})]
    paths = save_coco(tmp_path, coco({1: (160, 80), 2: (80, 160)}, objects))
    options = options_of("--coco-train", *paths, "--overfit", 2, "--image-size", 64)
    dataset = train_toy.build_dataset(options, "val")
    boxes = torch.tensor([[[0.35, 0.35, 0.5, 0.5], [0.9, 0.1, 0.1, 0.1]]])       # a cat, and nothing
    logits = torch.tensor([[[5.0, -9.0], [-9.0, -9.0]]]), torch.tensor([[[5.0, -9.0], [-9.0, 2.0]]])
    outputs = iter({"pred_logits": each, "pred_boxes": boxes} for each in logits)
    model = tiny_model(num_classes=2, num_queries=2)
    model.forward = lambda images, padding_mask: next(outputs)
    anchors = torch.tensor([[0.5, 0.4, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9]])
    model.anchor_logits.weight.data = anchors.logit()
    metrics, matching = train_toy.evaluate(model, dataset, CPU, batch_size=1)
    assert not model.training
    assert (metrics["AP"], metrics["AP75"], metrics["AR1"]) == pytest.approx((50, 50, 50))
    assert metrics["AP_per_class"] == pytest.approx({3: 100, 7: 0})
    assert [x.tolist() for index in (0, 1) for x in matching[index][:2]] == [[0, -1], [1, 0], [0, 1], [1, 0]]
    # Cats have centers of (0.35, 0.35) in their images; the dog is not found.
    assert train_toy.anchor_distance(model, dataset, matching) == pytest.approx(0.15 + 0.05, abs=1e-5)
    lost = {index: (matched, found & False, gap) for index, (matched, found, gap) in matching.items()}
    assert train_toy.anchor_distance(model, dataset, lost) is None
    table = train_toy.class_table(dataset, metrics["AP_per_class"])
    assert re.fullmatch("cat +AP 100.0, 2 objects\ndog +AP +0.0, 1 objects", table)


def test_the_twelve_numbers_are_those_that_pycocotools_prints(capsys, monkeypatch):
    random, objects, keys = np.random.RandomState(0), [], []
    spy(monkeypatch, train_toy.COCO, "loadRes", lambda truth, detections: keys.append({*truth.dataset}))
    for index in range(40):
        (x, y), (w, h) = random.randint(0, 60, 2).tolist(), random.randint(8, 120, 2).tolist()
        objects.append((1 + index % 2, (3, 7)[index // 3 % 2], [x, y, w, h], {}))
    data = coco({1: (200, 200), 2: (200, 200)}, objects)
    detections = perfect_detections(data)
    for row in detections:
        row |= {"score": random.rand(), "bbox": (row["bbox"] + random.randint(-6, 7, 4)).tolist()}
    metrics = train_toy.coco_metrics(dataset_of(data), detections, verbose=True)
    printed = [float(line.split("= ")[-1]) for line in capsys.readouterr().out.splitlines()]
    names = "AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split()
    assert [metrics[name] / 100 for name in names] == pytest.approx(printed, abs=6e-4)
    assert metrics["AP"] == pytest.approx(np.mean([*metrics["AP_per_class"].values()]))
    fast = train_toy.coco_metrics(dataset_of(data), detections)
    assert capsys.readouterr().out == "" and fast["AP_small"] is None and fast["AP"] == metrics["AP"]
    assert all("info" in each for each in keys), "pycocotools 2.0.9 and 2.0.10 want one"


def test_gaps_in_cost_and_what_is_found_by_hand(monkeypatch):
    cost = torch.tensor([[1.0, 9.0], [3.5, 4.0], [3.0, 8.0], [7.0, 6.5]])        # 4 queries, 2 objects
    monkeypatch.setattr(dn_detr, "matching_cost", lambda *arguments: cost[None, None])
    truth = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    boxes = truth[[0, 1, 0, 0]]
    boxes[1, 0] += 0.08                                        # an IoU of 0.43
    target = {"labels": torch.tensor([0, 1]), "boxes": truth}
    for matched, found, gap in (([0, 1, -1, -1], [1, 0, 0, 0], [2.0, 2.5]),
                                ([-1, 1, 0, -1], [0, 0, 1, 0], [2.5, -2.0]), ([0, 1], [1, 0], [])):
        cost, boxes = cost[:len(matched)], boxes[:len(matched)]
        seen = train_toy.observe_matching(cost, boxes, torch.tensor(matched), target, tiny_config())
        assert [x.tolist() for x in seen] == [matched, found, gap]


def test_matchings_of_two_epochs_are_compared_by_hand():
    def epoch(*rows):
        return {index: (torch.tensor(matched), torch.tensor(found).bool(), torch.zeros(0))
                for index, (matched, found) in enumerate(rows)}
    before = epoch(([0, 1, -1], [1, 1, 0]), ([-1, 0, -1], [0, 1, 0]), ([0, -1, 1], [0, 0, 1]))
    after = epoch(([0, -1, 1], [1, 0, 1]), ([0, -1, -1], [0, 0, 0]), ([1, 0, -1], [0, 1, 0]))
    # Image 0: object 1 moved; both found both times. Image 1: object 0 moved, but is not found any more.
    # Image 2: object 0 moved, but was not found before; object 1 moved, but is not found any more.
    assert train_toy.compare_matching(before, after) == (pytest.approx((2 + 2 + 3) / 3), pytest.approx(50))
    assert train_toy.compare_matching({}, after) == (None, None)
    nothing = epoch(([0, 1, -1], [0, 0, 0]), ([-1, 0, -1], [0, 0, 0]))
    assert train_toy.compare_matching(nothing, nothing) == (0.0, None)


def test_boxes_and_names_are_drawn_where_they_belong(monkeypatch):
    texts, names = [], {3: "猫", 9: "Kätzchen Łoś"}
    spy(monkeypatch, train_toy.ImageDraw.ImageDraw, "text", lambda self, *args: texts.append(args[:2]))
    boxes, labels = torch.tensor([[0.1, 0.5, 0.6, 0.9], [0.5, 0.1, 0.9, 0.4]]), torch.tensor([1, 0])
    image, scores = torch.zeros(3, 50, 100, dtype=torch.uint8), torch.tensor([0.876, 0.5])
    picture = train_toy.draw_boxes(image, boxes, labels, names, scores)
    assert picture.size == (400, 200)                          # enlarged
    assert [text for _, text in texts] == ["Kätzchen Łoś 0.88", "category 3 0.50"]
    for color, (place, _), (x0, y0, x1, y1) in zip(
            train_toy.COLORS[1::-1], texts, ((40, 100, 240, 180), (200, 20, 360, 80))):
        color = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
        ys, xs = np.nonzero((np.asarray(picture) == color).all(2))
        assert (xs.min(), xs.max(), ys.max()) == pytest.approx((x0, x1, y1), abs=1)
        assert place == pytest.approx((x0, y0))


def test_plots_show_the_truth_of_pictures_of_any_shape(tmp_path, monkeypatch):
    objects = [(1, 3, [48, 32, 24, 16], {}), (2, 7, [16, 48, 16, 24], {})]
    paths = save_coco(tmp_path, coco({1: (96, 64), 2: (64, 96), 3: (64, 64)}, objects))
    options = options_of("--coco-train", *paths, "--overfit", 3, "--image-size", 64)
    dataset = train_toy.build_dataset(options, "val")
    calls, model = [], tiny_model(num_classes=2)
    spy(monkeypatch, train_toy, "draw_boxes", lambda image, boxes, labels, names, scores=None: calls.append(
        (tuple(image.shape), boxes.tolist(), labels.tolist(), scores)))
    model.class_head.weight.data.zero_()
    model.class_head.bias.data = torch.tensor([2.0, -2.0])
    matplotlib.pyplot.close(train_toy.draw_detections(model, dataset, CPU))
    assert [call[0] for call in calls] == [(3, 64, 96)] * 2 + [(3, 96, 64)] * 2      # not the empty image
    for call, box, label in ((calls[0], [0.5, 0.5, 0.75, 0.75], 0), (calls[2], [0.25, 0.5, 0.5, 0.75], 1)):
        assert call[1:] == ([pytest.approx(box)], [label], None)
    for _, boxes, labels, scores in calls[1::2]:
        assert len(boxes) == len(scores) == 7 and set(labels) == {0}, "scores of 0.5 and more"


# ---- train_toy.py: interruptions -----------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of two epochs that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(*SHAPES_RUN, "--output-dir", folder)
    return folder


def assert_same_run(folder, straight):
    """The same files, and checkpoints equal to the bit in everything but seconds and options."""
    files = [{path.name for path in x.iterdir() if path.suffix != ".png"} for x in (folder, straight)]
    assert files == [{"last.pt", "best.pt", "metrics.jsonl", "config.json"}] * 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(x / name) for x in (folder, straight))
        for row in ours["history"] + theirs["history"]:
            del row["seconds"], row["cpu_seconds"]
        for key in ("model", "optimizer", "schedule", "scaler", "matching", "epoch", "step", "history"):
            assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("owner, name, moment", [
    *((os, "replace", moment) for moment in (0, 1, 3, 4, 5, 7, 8)), (torch.Tensor, "backward", 4)])
def test_a_run_stopped_at_any_moment_ends_as_if_never_stopped(
        tmp_path, monkeypatch, straight, owner, name, moment):
    calls, folder = itertools.count(), tmp_path / "run"

    def stop(*arguments, **options):
        if next(calls) == moment:
            raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        spy(patched, owner, name, stop)
        train(*SHAPES_RUN, "--output-dir", folder)
    assert not list(folder.glob("*.tmp"))
    torch.manual_seed(99)
    train(*["--resume", folder] if (folder / "last.pt").exists() else [*SHAPES_RUN, "--output-dir", folder])
    assert_same_run(folder, straight)


def test_a_killed_process_resumes_and_a_finished_run_stays(tmp_path, straight):
    folder = tmp_path / "run"
    script = f"""if True:
        import time, torch, train_toy
        torch.set_num_threads(1)
        save = train_toy.save
        train_toy.save = lambda run, *rest: (save(run, *rest), time.sleep(60 * run["epoch"]))
        train_toy.main({[*SHAPES_RUN, '--output-dir', str(folder), '--device', 'cpu']!r})"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=FOLDER, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "best.pt").exists():
        time.sleep(0.05)
    process.kill()                                             # by SIGKILL, after the first epoch
    assert process.wait() == -9 and torch.load(folder / "last.pt")["epoch"] <= 1
    history = train("--resume", folder)
    assert_same_run(folder, straight)
    assert train("--resume", folder) == history
    assert_same_run(folder, straight)


def test_other_runs_are_neither_overwritten_nor_continued(tmp_path, capsys, straight):
    before = (straight / "last.pt").read_bytes()
    assert "holds another run: --resume" in refused(capsys, *SHAPES_RUN, "--output-dir", straight)
    assert re.search("nowhere.*no such file", refused(capsys, "--resume", tmp_path / "nowhere"))
    torch.save(torch.load(straight / "last.pt")["model"], tmp_path / "last.pt")
    assert "is not from a run" in refused(capsys, "--resume", tmp_path)
    (tmp_path / "last.pt").write_bytes(before[:5000])
    assert "can't be read as a checkpoint" in refused(capsys, "--resume", tmp_path)
    for flags in ("--seed 0", "--epochs 9", "--lr 1", "--dn-groups 2", "--output-dir x", "--amp"):
        assert f"{flags.split()[0]} has no effect" in refused(capsys, "--resume", straight, *flags.split())
    assert (straight / "last.pt").read_bytes() == before


def test_data_may_move_but_not_change_when_a_run_is_resumed(tmp_path, monkeypatch, capsys):
    def stop(model):
        raise KeyboardInterrupt
    paths, folder = save_coco(tmp_path / "old", tiny_coco()), tmp_path / "run"
    flags = "--coco-train", *paths, "--coco-val", *paths, "--image-size", 64, "--workers", 0, "--epochs", 2
    with pytest.raises(KeyboardInterrupt):
        train_toy.train(options_of(*flags, *SMALL_MODEL, "--output-dir", folder), CPU, after_epoch=stop)
    (tmp_path / "old").rename(tmp_path / "new")
    images, path = str(tmp_path / "new/images"), str(tmp_path / "new/annotations.json")
    assert "can't be read as JSON" in refused(capsys, "--resume", folder, "--device", "cpu")
    fewer, lost, renamed = tiny_coco(), tiny_coco(), tiny_coco()
    fewer["images"].pop()
    lost["annotations"].pop(0)
    renamed["categories"][0]["name"] = "lion"
    other = tmp_path / "other.json"
    for data, values in ((fewer, "3 images.*2 im"), (lost, "3 objects.*2 obj"), (renamed, "'cat'.*'lion'")):
        other.write_text(json.dumps(data))
        for places in ((other, other),) if data is renamed else ((other, path), (path, other)):
            with pytest.raises(ValueError, match=f"trained on other data: .*{values}"):
                train("--resume", folder, "--coco-train", images, places[0], "--coco-val", images, places[1])
    history = train("--resume", folder, "--coco-train", images, path, "--coco-val", images, path)
    assert [row["epoch"] for row in history] == [1, 2] and history[-1]["lr"] == 0
    assert torch.load(folder / "last.pt")["options"]["coco_train"] == [images, path]


def test_a_full_disk_leaves_the_old_checkpoint_and_a_message(tmp_path, monkeypatch, capsys, straight):
    folder, save = tmp_path / "run", torch.save
    shutil.copytree(straight, folder)
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}

    def full(content, path):
        save(content, path)
        os.truncate(path, 1000)
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", full)
    message = refused(capsys, "--resume", folder, "--device", "cpu")
    assert re.search(r"train_toy.py: error: .*(last|best).pt can't be written.*disk full", message)
    assert len(before) == 2 and all(path.read_bytes() == content for path, content in before.items())
    assert not list(folder.glob("*.tmp"))


# ---- train_toy.py: checkpoints and predictions ---------------------------------------------------


@pytest.mark.parametrize("content", [
    None, {"model": None}, {"config": {"hidden_dim": 7}}, {"config": {"color": 1}}, [1], b"<html>",
    {"model": {}, "args": {"lr": 1}}, {"state_dict": {"conv1.weight": torch.zeros(3)}}], ids=range(8))
def test_foreign_checkpoints_are_refused_in_our_words(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "some.pt"
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    for command in ("evaluate", path), ("predict", path, "x.png"), ("--init", path, *SHAPES_RUN[:4]):
        message = refused(capsys, *command, "--device", "cpu")
        assert "some.pt" in message and not re.search("weights_only|Traceback|pickle", message)


def test_a_checkpoint_of_other_classes_starts_only_those_anew(tmp_path, straight):
    old = train_toy.load_detector(straight / "last.pt")[0].state_dict()
    assert_close(train_toy.start_from(straight / "last.pt", 6, {}).state_dict(), old, rtol=0, atol=0)
    new = train_toy.start_from(straight / "last.pt", 3, {"dn_groups": 2})
    assert (new.config.num_classes, new.config.dn_groups) == (3, 2)
    new = new.state_dict()
    for name in ("class_head.weight", "class_head.bias", "label_embedding.weight"):
        # The last row of the label embedding is "unknown", which means the same.
        assert torch.equal(new.pop(name)[-1], old.pop(name)[-1]) == (name == "label_embedding.weight")
    assert_close(new, old, rtol=0, atol=0)
    shutil.copy(straight / "last.pt", tmp_path / "start.pt")
    sizes = "--epochs", 1, "--train-size", 4, "--val-size", 4
    train("--init", tmp_path / "start.pt", *sizes, "--output-dir", tmp_path)
    assert torch.load(tmp_path / "last.pt")["config"]["hidden_dim"] == 16
    (tmp_path / "start.pt").unlink()                           # not needed to resume
    train("--resume", tmp_path)


def test_evaluate_uses_the_held_out_images_of_the_run(tmp_path, capsys, monkeypatch):
    objects = [(2, 3, [9, 9, 60, 60], {}), (4, 7, [9, 9, 40, 40], {}), (4, 3, [9, 9, 9, 9], {})]
    val = save_coco(tmp_path / "val", coco({4: (64, 96), 2: (64, 96)}, objects))
    training = save_coco(tmp_path / "train", tiny_coco())
    flags = "--coco-train", *training, "--image-size", 48, "--workers", 0, "--epochs", 1, *SMALL_MODEL
    with monkeypatch.context() as patched:
        metrics = train_toy.coco_metrics
        patched.setattr(train_toy, "coco_metrics", lambda *args: metrics(*args) | {"AP": 0.9})
        train(*flags, "--coco-val", *val, "--output-dir", tmp_path / "run")
    table = r"cat +AP +\d+\.\d, 2 objects\ndog +AP +\d+\.\d, 1 objects"
    assert re.search(rf"{table}(?s:.*)try --overfit 8", capsys.readouterr().out)
    train(*flags, "--overfit", 1, "--output-dir", tmp_path / "heart")
    train(*SHAPES_RUN, "--epochs", 1, "--output-dir", tmp_path / "shapes")
    sizes = []
    spy(monkeypatch, train_toy, "normalize", lambda images, *rest: sizes.append(tuple(images.shape[2:])))
    for name, more, source, count, size in (
            ("run", [], val[1], 2, (72, 48)), ("run", ["--coco-val", *training], training[1], 3, (60, 60)),
            ("run", ["--image-size", 96], val[1], 2, (144, 96)), ("heart", [], training[1], 1, (48, 60)),
            ("heart", ["--coco-val", *val], val[1], 2, (72, 48)),
            ("shapes", [], "shapes (val)", 4, (64, 64))):
        capsys.readouterr()
        main("evaluate", tmp_path / name / "last.pt", "--workers", 0, *more)
        shown = capsys.readouterr().out
        assert re.match(rf"{re.escape(source)}: {count} images", shown)
        assert shown.count("Average Precision") == 6 and sizes[-1] == size
        assert re.search(r"\w+ +AP +\d+\.\d, \d+ objects", shown)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A checkpoint whose two queries find the same dog (category 18), with a score of sigmoid(1)."""
    path = tmp_path_factory.mktemp("detector") / "detector.pt"
    model = DNDETR(tiny_config(num_classes=2, num_queries=2))
    model.class_head.weight.data.zero_()
    model.class_head.bias.data = torch.tensor([-9.0, 1.0])
    model.anchor_logits.weight.data = torch.tensor([[0.35, 0.3, 0.5, 0.25]] * 2).logit()
    torch.save({"model": model.state_dict(), "config": dataclasses.asdict(model.config), "image_size": 64,
                "names": {3: "cat", 18: "dog"}}, path)
    return path


def predictions(folder):
    return json.loads((folder / "predictions.json").read_text())


def test_predictions_are_in_pixels_of_the_file_over_a_threshold(tmp_path, capsys, detector):
    exif, folder = Image.Exif(), tmp_path / "in"
    exif[0x0112] = 6
    folder.mkdir()
    Image.new("RGB", (200, 100)).save(folder / "A.JPG")
    Image.new("L", (200, 100)).save(folder / "turned.jpeg", exif=exif)
    for name in ("notes.txt", "phone.heic"):
        (folder / name).write_text("not an image")
    main("predict", detector, folder, "--output-dir", tmp_path)
    rows = predictions(tmp_path)
    assert [Path(row["file_name"]).name for row in rows] == ["A.JPG"] * 2 + ["turned.jpeg"] * 2
    assert {row["category_id"] for row in rows} == {18} and [row["image_id"] for row in rows] == [1, 1, 2, 2]
    assert rows[0]["bbox"] == pytest.approx([20, 17.5, 100, 25], abs=0.2)
    assert rows[2]["bbox"] == pytest.approx([10, 35, 50, 50], abs=0.2)
    assert rows[0]["score"] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-4)
    for name, ratio in (("A.png", 5 / 3), ("turned.png", 3 / 5)):
        width, height = Image.open(tmp_path / name).size
        assert (width > height) == (ratio > 1)
    shown = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"^2 pictures.*\b4 detections.*\b0.3\b.*\b0 images failed.*\b2 other files", shown)
    for threshold, count in ((0.74, 0), (0.72, 4), (0.0, 8)):
        main("predict", detector, folder, "--output-dir", tmp_path, "--threshold", threshold)
        assert len(predictions(tmp_path)) == count
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(capsys, "predict", detector, tmp_path / "empty", "--device", "cpu")


def test_predict_never_writes_over_its_inputs_or_its_outputs(tmp_path, detector):
    for name in ("in/a.png", "in/b.PNG", "in/c.jpg", "in/c.bmp", "more/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    main("predict", detector, tmp_path / "in", tmp_path / "more", "--output-dir", tmp_path / "in")
    assert all(path.read_bytes() == content for path, content in before.items())
    written = {path.name.lower() for path in tmp_path.rglob("*.png") if path not in before}
    assert len(written) == 5 and not written & {path.name.lower() for path in before}
    assert len(predictions(tmp_path / "in")) == 10


def test_a_bad_image_costs_only_itself_and_ctrl_c_nothing(tmp_path, capsys, monkeypatch, detector):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, size in (("a.png", (64, 64)), ("thin.png", (1, 2000)), ("z.png", (64, 64))):
        Image.new("RGB", size).save(folder / name)
    (folder / "broken.png").write_bytes(b"this is no picture")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    command = "predict", detector, "--output-dir", out, "--device", "cpu"
    with pytest.raises(SystemExit, match="^1$"):
        main(*command[:2], folder, tmp_path / "absent.png", *command[2:])
    left, shown = {path.name for path in out.iterdir()}, capsys.readouterr().out
    assert {"a.png", "z.png", "predictions.json"} <= left
    assert not left & {"broken.png", "cut.png", "absent.png"}
    assert {f"{Path(row['file_name']).stem}.png" for row in predictions(out)} == left - {"predictions.json"}
    assert all(f"{name}.png: " in shown for name in ("broken", "cut", "absent"))
    assert re.search(rf"^{len(left) - 1} pictures.*\b{7 - len(left)} images failed", shown.splitlines()[-1])
    count = itertools.count()

    def stop(*arguments, **options):
        if next(count) == 2:
            raise KeyboardInterrupt
    spy(monkeypatch, train_toy, "read_image", stop)
    assert "stopped" in refused(capsys, *command[:2], *[folder / "a.png"] * 4, *command[2:])
    assert len(predictions(out)) == 4


def test_the_authors_file_evaluates_predicts_and_is_a_start(tmp_path, capsys, monkeypatch):
    def stop(options, *rest, **how):
        raise ValueError(f"images of {options.image_size}")
    weights = blank_weights(encoder=1, decoder=2, queries=10, feed_forward=32)
    weights["class_embed.bias"] = torch.full((91,), -9.0)      # every query finds the same dog
    weights["class_embed.bias"][18] = 5.0
    anchor = torch.tensor([28 / 160, 14 / 80, 40 / 160, 20 / 80]).logit()
    weights["refpoint_embed.weight"], path = anchor.repeat(10, 1), tmp_path / "official.pth"
    torch.save({"model": weights}, path)
    scenes = {id: coco({1: (160, 80)}, [(1, id, [8, 4, 40, 20], {})], [(id, "dog")]) for id in (18, 17)}
    data, others = (save_coco(tmp_path / str(id), scene) for id, scene in scenes.items())
    evaluation = "evaluate", path, "--image-size", 64, "--workers", 0, "--device", "cpu"
    main(*evaluation, "--coco-val", *data)
    assert re.search(r"area= +all \| maxDets=100 \] = 1.000(?s:.*)dog +AP 100.0", capsys.readouterr().out)
    assert "category 17 is 'dog', but" in refused(capsys, *evaluation, "--coco-val", *others)
    assert "knows no data: add --coco-val" in refused(capsys, *evaluation)
    main("predict", path, data[0], "--image-size", 64, "--output-dir", tmp_path)
    best = predictions(tmp_path)[0]
    assert best["category_id"] == 18 and best["bbox"] == pytest.approx([8, 4, 40, 20], abs=0.1)
    started = train_toy.build_model(options_of("--init", path, "--dn-groups", 1), 6)
    assert (started.config.num_queries, started.config.dn_groups, started.config.num_classes) == (10, 1, 6)
    assert_near(started.anchor_logits.weight, weights["refpoint_embed.weight"])
    spy(monkeypatch, train_toy, "build_dataset", stop)
    assert "images of 800" in refused(capsys, *evaluation[:2], *evaluation[4:], "--coco-val", *data)


# ---- train_toy.py: options, processes, experiments -----------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--epochs 0", "--epochs: 0 is not at least 1"), ("--batch-size -1", "-1 is not at least 1"),
    ("--coco-train a b", "--coco-val is missing"), ("compare --dn-groups 5", "--dn-groups"),
    ("--seeds 0 1 2 3 4", "--seeds"), ("evaluate x.pt --epochs 3", "--epochs"), ("predict x.pt", "images"),
    ("predict x.pt a.png --seed 3", "--seed"), ("--threshold 0.3", "--threshold"),
    ("--init x.pt --model toy", "--model has no effect"), ("--coco-val a b", "--coco-val has no effect"),
    ("--init x.pt --pretrained-backbone", "--pretrained-backbone has no effect"),
    ("--image-size 64", "--image-size has no effect"), ("--overfit 8 --val-size 3", "--val-size has no"),
    ("--coco-train a b --overfit 8 --coco-val a b", "--coco-val has no effect"),
    ("--coco-train a b --coco-val a b --train-size 8", "--train-size has no effect"),
    ("--model paper --anchors grid", "--anchors has no effect"),
    ("--device gpu9", "--device gpu9 can't be used"),
    ("--train-size 4 --val-size 4 --dn-groups -1", "dn_groups is -1")])
def test_options_impossible_or_without_effect_are_refused(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *flags.split()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "compare", "ablate"])
def test_every_command_has_help_that_says_its_options(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(command, "--help")
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in train_toy.DEFAULTS[command])


def test_a_device_is_picked_by_local_rank_and_joins_the_others(monkeypatch):
    joined, current = [], []
    monkeypatch.setattr(torch, "zeros", lambda _, device: types.SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(train_toy.dist, "init_process_group", joined.append)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    for has_cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=has_cuda: answer)
        assert train_toy.pick_device() == torch.device("cuda" if has_cuda else "mps")
        assert train_toy.pick_device("cpu") == CPU
    assert not joined
    for name, value in dict(RANK="11", LOCAL_RANK="3", WORLD_SIZE="16").items():
        monkeypatch.setenv(name, value)
    assert train_toy.pick_device("cpu") == CPU and joined == ["gloo"] and not current
    assert train_toy.pick_device() == torch.device("cuda:3") == current[-1] and joined[1:] == ["nccl"]


def test_processes_on_gpus_share_the_statistics_of_batch_norm(monkeypatch):
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **options: model)
    for device, shared in ((CPU, False), (torch.device("cuda"), True)):
        parts = train_toy.parallel(tiny_model(), device).modules()
        assert any(isinstance(part, nn.SyncBatchNorm) for part in parts) == shared


def test_worker_errors_are_one_line_and_any_name_is_printed(tmp_path, capsys, monkeypatch, detector):
    paths = save_coco(tmp_path, tiny_coco())
    (tmp_path / "images/8.png").write_bytes((tmp_path / "images/8.png").read_bytes()[:200])
    for workers in (0, 1):
        flags = "--coco-train", *paths, "--coco-val", *paths, "--image-size", 64, *SMALL_MODEL
        message = refused(capsys, *flags, "--workers", workers, "--output-dir", tmp_path / str(workers))
        assert re.match("train_toy.py: error: image .*8.png can't be read", message)
        assert "Traceback" not in message
    Image.new("RGB", (64, 64)).save(tmp_path / "猫.png")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    flags = detector, tmp_path / "猫.png", tmp_path / "Łoś.png", "--output-dir", tmp_path, "--device", "cpu"
    monkeypatch.setattr(sys, "argv", ["train_toy.py", "predict", *map(str, flags)])
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    with pytest.raises(SystemExit, match="^1$"):
        runpy.run_path(str(FOLDER / "train_toy.py"), run_name="__main__")
    assert (tmp_path / "猫_.png").exists() and b"1 pictures" in stream.buffer.getvalue()


def half_of_the_work(rank, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    device = train_toy.pick_device("cpu")
    images, targets, config, data = torch.load(folder / "work.pt", weights_only=False)
    torch.manual_seed(0)
    model, part, batches = DNDETR(config), slice(2 * rank, 2 * rank + 2), []
    parallel = train_toy.parallel(model, device)               # gradients are not shared once it is gone
    loss = DNDETRCriterion(config)(parallel(images[part], None, targets[part]), targets[part])["loss"]
    loss.backward()
    metrics, matching = train_toy.evaluate(tiny_model(), dataset_with_images(data), CPU, batch_size=2)
    with pytest.MonkeyPatch.context() as patched:
        spy(patched, train_toy, "normalize", lambda x, *_: batches.append((len(x), torch.initial_seed())))
        history = train(*SHAPES_RUN, "--num-decoder-layers", 1, "--output-dir", folder / "run")
    order = [target["index"] for _, _, targets in train_toy.train_batches(dataset_with_images(data), 2, 0, 0)
             for target in targets]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    results = loss.item(), gradients, metrics, sorted(matching), batches, history, order
    torch.save(results, folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="--batch-size 3 can't be shared by 2 processes"):
        train(*SHAPES_RUN, "--batch-size", 3, "--output-dir", folder / "odd")
    train_toy.dist.destroy_process_group()


def dataset_with_images(data):
    return train_toy.DetectionDataset(data, train_toy.open_shapes(6, 0, "val")[1])


def test_two_processes_are_like_one_but_draw_noise_of_their_own(tmp_path):
    config = tiny_config(backbone="resnet18", **NO_NOISE)      # live statistics are not shared
    images, targets = torch.randn(4, 3, 64, 64), random_targets(3, 1, 0, 2)
    # The truth are the best predictions in each of 5 images, so that AP is not 0.
    data, load = train_toy.open_shapes(5, 0, "val")
    data["annotations"] = []
    for index in range(5):
        found = train_toy.detect(tiny_model(), load(index), CPU, threshold=0.0)
        boxes = box_convert(found["boxes"][:3].clamp(0, 1) * 64, "xyxy", "xywh").tolist()
        data["annotations"] += [{"image_id": index, "category_id": label, "bbox": box}
                                for label, box in zip(found["labels"].tolist(), boxes)]
    data["categories"].pop()
    torch.save((images, targets, config, data), tmp_path / "work.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(half_of_the_work, (tmp_path, port), nprocs=2)
    losses, gradients, metrics, indices, batches, histories, orders = zip(*(
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)))
    torch.manual_seed(0)
    model = DNDETR(config)
    loss = DNDETRCriterion(config)(model(images, None, targets), targets)["loss"]
    loss.backward()
    assert np.mean(losses) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(gradients[0], expected, rtol=1e-3, atol=1e-4)
    alone, _ = train_toy.evaluate(tiny_model(), dataset_with_images(data), CPU, batch_size=2)
    assert alone["AP"] > 10 and indices == ([0, 1, 2, 3, 4],) * 2
    for each in metrics:
        assert [each[name] for name in ("AP", "AP50", "AR1", "AR10")] == pytest.approx(
            [alone[name] for name in ("AP", "AP50", "AR1", "AR10")])
    for steps in batches:                                      # 2, 2, 1 images, and 2 held-out ones
        assert [size for size, _ in steps] == [2, 2, 1, 2] * 2
    assert len({seed for steps in batches for _, seed in steps}) == 4, "processes and epochs differ in noise"
    assert {*orders[0], *orders[1]} == {0, 1, 2, 3, 4} and len(orders[0]) == len(orders[1]) == 3
    assert [row["step"] for row in histories[0]] == [3, 6] and histories[0][-1]["lr"] == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "odd").exists()


def history_of(*precisions, seconds=2.0):
    others = dict.fromkeys(train_toy.CURVES, 0.5)
    return [others | {"epoch": epoch, "seconds": seconds * epoch, "cpu_seconds": 3 * seconds * epoch,
                      "AP": ap, "AP50": ap + 1} for epoch, ap in enumerate(precisions, 1)]


def test_arms_are_compared_with_the_baseline_of_the_same_seed(capsys):
    without = [history_of(5, 20, 30), history_of(5, 20, 40), history_of(1, 2, 3)]
    slower = [history_of(10, 40, 50, seconds=4), history_of(10, 30, 50, seconds=4), history_of(10, 20, 40)]
    train_toy.print_table({"without denoising": without, "5 groups": slower}, "seconds")
    shown, cells = capsys.readouterr().out.splitlines(), []
    # At equal time, 6 s: 25 against 30, 20 against 40, 40 against 3. Student's t of 3 seeds is 4.3027.
    for values in ((20, 10, 37), (-5, -20, 37), (2, 3, 1)):
        half = 4.3027 * np.std(values, ddof=1) / math.sqrt(3)
        cells.append(f"{np.mean(values):.1f} ± {half:.1f}")
    assert f"| 5 groups | 50.0 (40.0 to 50.0) | 51.0 (41.0 to 51.0) | {' | '.join(cells)} |" in shown
    assert "| without denoising | 30.0 (3.0 to 40.0) | 31.0 (4.0 to 41.0) | 0.0 | 0.0 | 3.0 |" in shown
    train_toy.print_table({"without denoising": [history_of(9)], "5 groups": [history_of(1)]}, "cpu_seconds")
    assert "| 1.0 (1.0 to 1.0) | 2.0 (2.0 to 2.0) | -8.0 | -8.0 | not by all |" in capsys.readouterr().out


class OneByOne(contextlib.nullcontext):
    """Like ProcessPoolExecutor, but in this process."""

    def __enter__(self):
        return self

    def map(self, function, *columns):
        return map(function, *pickle.loads(pickle.dumps([list(column) for column in columns])))


def test_experiments_give_every_run_its_settings(tmp_path, monkeypatch):
    asked, grid = [], {"without denoising": 0.4, "5 groups": 0.5}
    rates = {"normal": {"without denoising": 0.1, "1 group, no mask": 0.2, "5 groups": 0.3}, "grid": grid}
    monkeypatch.setattr(train_toy, "RATES", rates)
    monkeypatch.setattr(train_toy, "ProcessPoolExecutor", lambda *arguments: OneByOne())
    monkeypatch.setattr(train_toy, "train", lambda options, device: (
        asked.append(options) or history_of(3.0, options.seed)))
    flags = "--epochs", 2, "--train-size", 8, "--batch-size", 2, "--output-dir", tmp_path
    main("ablate", "--seeds", 4, 9, *flags)
    expected = {  # dn_groups, label_noise, dn_mask, lr
        "without denoising": (0, 0.2, True, 0.1), "1 group, boxes only": (1, 0.0, True, 0.3),
        "1 group": (1, 0.2, True, 0.3), "1 group, no mask": (1, 0.2, False, 0.2),
        "2 groups": (2, 0.2, True, 0.3), "5 groups": (5, 0.2, True, 0.3), "10 groups": (10, 0.2, True, 0.3)}
    configs = [train_toy.build_model(each, 6).config for each in asked]
    got = [(config.dn_groups, config.label_noise, config.dn_mask, each.lr, each.seed)
           for config, each in zip(configs, asked)]
    assert sorted(got) == sorted((*values, seed) for seed in (4, 9) for values in expected.values())
    assert {(each.anchors, each.epochs, each.train_size, each.val_size, each.batch_size, each.resume)
            for each in asked} == {("normal", 2, 8, 200, 2, None)}
    content = json.loads((tmp_path / "ablate-normal.json").read_text())
    assert list(content["runs"]) == list(expected) and (tmp_path / "ablate-normal.png").exists()
    assert [history[-1]["AP"] for history in content["runs"]["2 groups"]] == [4.0, 9.0]
    main("compare", "--seeds", 4, *flags, "--anchors", "grid")
    assert [(each.dn_groups, each.lr) for each in asked[14:]] == [(0, 0.4), (5, 0.5)]
    assert {each.anchors for each in asked[14:]} == {"grid"}
    assert len({each.output_dir for each in asked}) == 16


def test_an_experiment_keeps_finished_and_continues_stopped_runs(tmp_path, monkeypatch):
    evaluated = []
    flags = *"--seeds 3 --epochs 2 --train-size 4 --val-size 4 --output-dir".split(), tmp_path
    monkeypatch.setattr(train_toy, "ProcessPoolExecutor", lambda *arguments: OneByOne())
    for name in ("save_figure", "draw_curves", "draw_detections"):
        monkeypatch.setattr(train_toy, name, lambda *arguments: None)
    spy(monkeypatch, train_toy, "evaluate", lambda *args, **how: evaluated.append(args))
    main("compare", *flags)
    before = json.loads((tmp_path / "compare-normal.json").read_text())["runs"]
    (without,), (five,) = before["without denoising"], before["5 groups"]
    assert without[0]["loss_denoising"] == 0 < five[0]["loss_denoising"] and len(five) == len(without) == 2
    stopped, = (path for path in tmp_path.glob("*/last.pt") if torch.load(path)["config"]["dn_groups"] == 5)
    state = torch.load(stopped)
    assert state["options"]["lr"] == train_toy.RATES["normal"]["5 groups"] and state["options"]["seed"] == 3
    torch.save(state | {"epoch": 1, "history": state["history"][:1]}, stopped)       # as if stopped
    main("compare", *flags)
    after = json.loads((tmp_path / "compare-normal.json").read_text())["runs"]
    assert len(evaluated) == 4 + 1 and len(after["5 groups"][0]) == 2
    assert after["without denoising"] == [without] and after["5 groups"][0][0] == five[0]


# ---- README and notebook -------------------------------------------------------------------------

README = (FOLDER / "README.md").read_text()
NOTEBOOK = FOLDER / "walkthrough.ipynb"
NOT_MEASURED_HERE = {"42.2", "43.0", "43.4", "44.1", "24.0", "0.5"}     # the paper's AP; an IoU


def test_links_lead_somewhere_and_commands_are_accepted(monkeypatch):
    for link in re.findall(r"\]\(([^)#\s]+)", README + NOTEBOOK.read_text()):
        assert re.match("https?:|attachment:", link) or (FOLDER / link).exists(), link
    monkeypatch.setattr(train_toy, "read_checkpoint", lambda path: {"options": {}})     # for --resume
    blocks = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
    shell = [block for language, block in blocks if language != "python"]
    shell += [*re.findall("`(python [^`]*)`", README), train_toy.__doc__]
    text = re.sub(r"\\\n *", "", "\n".join(shell))
    commands = re.findall(r"(?:python|torchrun.*) train_toy\.py(.*)", text)
    assert len(commands) >= 10
    for command in commands:
        flags = re.split(r" {3,}|&|\.\.\.", command)[0]        # without the remark after it
        train_toy.parse_options(shlex.split(flags, comments=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_python_snippets_run(dtype):
    targets = [target | {"boxes": target["boxes"].to(dtype)} for target in random_targets(1, 3)]
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        given = {name: torch.cat([target[name] for target in targets]) for name in ("labels", "boxes")}
        given |= {"targets": targets, "num_classes": CLASSES, "num_queries": 7, "width": 32}
        names = vars(dn_detr) | given | {"label_embedding": nn.Embedding(CLASSES + 1, 32)}
        exec(snippet, names)
        if "blocked" in names:
            assert torch.equal(names["blocked"], dn_detr.dn_attention_mask(5, 3, 7))


def numbers_in(content):
    """All numbers in nested dicts and lists."""
    if isinstance(content, (dict, list)):
        inner = content.values() if isinstance(content, dict) else content
        return [number for each in inner for number in numbers_in(each)]
    return [content] if isinstance(content, (int, float)) else []


def measured_samples():
    """What assets say, as lists with a number for each seed: of training runs {name: [history of each seed]}
    the final values, and for any two configurations differences in AP, at the end and at equal time, epochs
    to the other's AP, and ratios of time; and every number outside of runs."""
    for path in (FOLDER / "assets").glob("*.json"):
        content = json.loads(path.read_text())
        runs = content.pop("runs", {})
        yield from ([number] for number in numbers_in(content))
        for first, second in itertools.product(runs.values(), repeat=2):
            pairs, final = [*zip(first, second)], [history[-1] for history in first]
            numeric = [key for key, value in final[0].items() if isinstance(value, (int, float))]
            yield from ([row[key] for row in final] for key in numeric)
            yield [ours[-1]["AP"] - other[-1]["AP"] for ours, other in pairs]
            yield [next((row["epoch"] for row in ours if row["AP"] >= other[-1]["AP"]), math.nan)
                   for ours, other in pairs]
            for clock in {"seconds", "cpu_seconds"} & final[0].keys():
                yield [ours[-1][clock] / other[-1][clock] for ours, other in pairs]
                curves = [[[0, *(row[key] for row in ours)] for key in (clock, "AP")] for ours in first]
                yield [np.interp(other[-1][clock], *curve) - other[-1]["AP"]
                       for curve, other in zip(curves, second)]


def test_every_decimal_number_of_the_readme_is_found_in_assets():
    known = []
    for sample in measured_samples():                          # each, median, mean, half of the 95 % interval
        known += [*sample, np.median(sample), np.mean(sample)]
        if len(sample) > 1:
            deviation = np.std(sample, ddof=1) / math.sqrt(len(sample))
            known.append(stats.t.ppf(0.975, len(sample) - 1) * deviation)
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", " ", README, flags=re.DOTALL)
    prose = re.sub(r"(arXiv|Python|torch|torchvision|Sec\.|Eq\.) *\d[\d.]*( and \d[\d.]*)*", " ", prose)
    unknown = []
    for text in set(re.findall(r"(?<![\w.-])-?\d+\.\d+\b", prose.replace("−", "-"))) - NOT_MEASURED_HERE:
        if not (np.abs(np.array(known) - float(text)) < 0.5001 / 10 ** len(text.split(".")[1])).any():
            unknown.append(text)
    assert not unknown, f"not in assets: {unknown}"


def test_notebook_is_stored_as_executed_without_errors():
    code = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell["outputs"]):
        text = "".join(output.get("data", {}).get("text/plain", ""))
        assert output["output_type"] != "error" and not text.startswith("<Figure size")
        assert not re.search("Warning|Traceback", "".join(output.get("text", "")))


def test_notebook_runs_from_top_to_bottom_and_changes_no_asset(monkeypatch, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("DN_DETR_FAST", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for name in ("README.md", "dn_detr.py", "train_toy.py", "walkthrough.ipynb"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copytree(FOLDER / "assets", tmp_path / "assets")
    notebook = nbformat.read(tmp_path / "walkthrough.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, after = ({path.name: path.read_bytes() for path in (folder / "assets").iterdir()}
                     for folder in (FOLDER, tmp_path))
    assert before == after
