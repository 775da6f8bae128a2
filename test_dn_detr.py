"""Tests, on a CPU, without network and without data.

    pytest                        everything, in about a minute on two cores
    pytest -k "mask or noise"     the paper's contribution, a few seconds

In this order: the parts of dn_detr.py, the authors' numbers and files, dn_detr.py as a whole; of train_toy.py
data, recipe, evaluation, interruptions, checkpoints, options and many processes; README and notebook.

Each test is named after the property it protects. Results are compared, number by number, with a naive loop,
a case worked by hand, another library, or what the authors' code computes.
"""
import argparse
import itertools
import json
import math
import os
import re
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
import pycocotools.coco
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.testing import assert_close
from torchvision.models import get_model

import dn_detr
import train_toy
from dn_detr import DNDETR, DNDETRConfig, DNDETRCriterion, assign_slots, noise_boxes, noise_labels

matplotlib.use("Agg")
torch.set_num_threads(1)                # several are slower on tensors as small as these
FOLDER = Path(dn_detr.__file__).parent
README = FOLDER / "README.md"
SOURCE = (FOLDER / "dn_detr.py").read_text()
CPU = torch.device("cpu")
CLASSES = 5
TINY = dict(num_classes=CLASSES, num_queries=7, hidden_dim=32, num_heads=4, num_encoder_layers=1, dn_groups=2,
            num_decoder_layers=2, dim_feedforward=48, backbone="small", small_widths=(8, 16, 32))
NO_NOISE = dict(label_noise=0, center_noise=0, size_noise=0)


@pytest.fixture(autouse=True)
def same_seed_and_no_progress_bars(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(train_toy, "progress", lambda iterable, description: iterable)


# ---- Helpers -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("names, value, message", [
    ("num_classes num_queries num_heads num_decoder_layers dim_feedforward", 0, "0, it must be at least 1"),
    ("num_encoder_layers num_patterns dn_groups dn_max_queries", -1, "-1, it must be at least 0"),
    ("label_noise center_noise size_noise", -0.1, r"-0.1, it must be in \[0, 1\]"),
    ("label_noise center_noise size_noise", 1.01, r"1.01, it must be in \[0, 1\]"),
    ("image_temperature anchor_temperature position_frequency", 0, "0, it must be positive"),
    ("dropout", 1.0, r"1.0, it must be in \[0, 1\)"),
    ("hidden_dim", 36, r"36.*num_heads \(8\)"),
    ("activation", "swish", "'swish', it must be one of prelu, relu, gelu"),
    ("backbone", "vgg", "'vgg', it must be one of small, resnet18"),
    ("small_widths", (), r"\(\)")])
def test_impossible_configurations_are_refused_by_name(names, value, message):
    for name in names.split():
        with pytest.raises(ValueError, match=f"{name} is {message}"):
            DNDETRConfig(**{name: value})
    for options, rule in ((dict(backbone="resnet34", dilation=True), "dilation is True"),
                          (dict(hidden_dim=6, num_heads=3), "hidden_dim is 6.*by 4")):
        with pytest.raises(ValueError, match=rule):
            DNDETRConfig(**options)


def test_every_field_of_the_configuration_is_read():
    assert DNDETRConfig.__dataclass_fields__.keys() <= set(re.findall(r"config\.(\w+)", SOURCE))


@pytest.mark.parametrize("options", [
    dict(hidden_dim=24, num_heads=3, dn_groups=0), dict(num_encoder_layers=0, num_decoder_layers=3),
    dict(activation="gelu", dropout=0.1), dict(activation="relu", small_widths=(8,)),
    dict(label_noise=1.0, num_classes=1), dict(num_patterns=2, dn_groups=1)], ids=str)
def test_every_parameter_gets_a_gradient_whatever_the_choice(options):
    model, targets = tiny_model(**options), random_targets(1, 3)
    for target in targets:
        target["labels"] = target["labels"].clamp(max=model.config.num_classes - 1)
    losses_of(model, random_images(), targets)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_dropout_acts_in_training_only_and_on_attention_too():
    model, x = patch_model(dropout=0.5), torch.randn(1, 6, 32)
    attention = dn_detr.Attention(model.config)
    for call in (lambda: model(random_images())["pred_logits"], lambda: attention(x, x, x)):
        assert not torch.equal(call(), call())
        model.eval(), attention.eval()
        assert torch.equal(call(), call())
        attention.train()


# ---- Boxes, targets, images ----------------------------------------------------------------------


GOOD = [0.5, 0.5, 0.2, 0.2]


@pytest.mark.parametrize("labels, boxes, message", [
    ([1], [[0.2, 0.2, 0.9, 0.9]], r"targets\[1\].*label 1 and box \[0.2, 0.2, 0.9, 0.9\].*\(x0, y0"),
    ([1], [[120.0, 80.0, 30.0, 20.0]], "120.0, 80.0, 30.0, 20.0.*pixels"),
    ([1, 2], [GOOD, [-0.3, 0.5, 0.2, 0.2]], r"-0.3, 0.5.*in \[0, 1\]"),
    ([1], [[0.5, math.nan, 0.2, 0.2]], "nan.*finite"),
    ([1], [[0.5, 0.5, 0.0, 0.2]], "0.0, 0.2.*area"),
    ([1], [[0.5, 0.5, 0.2, -0.0005]], "-0.0005.*area"),
    ([CLASSES], [GOOD], rf"targets\[1\] .*label {CLASSES} .*0 \.\. {CLASSES - 1}"),
    ([2, -1], [GOOD, GOOD], "label -1"),
    ([1, 2], [GOOD], r"targets\[1\].*int64 \[2\].*float32 \[1, 4\]"),
    ([1], [GOOD[:3]], r"\[1, 3\]"),
    ([1.0], [GOOD], "long.*float32"),
    ([1], [[0, 0, 1, 1]], "float.*int64")])
def test_impossible_targets_are_refused_by_value(labels, boxes, message):
    # A box in the corner, which can't be (x0, y0, x1, y1), would hide the mistake; these two don't.
    harmless = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.3, 0.3, 0.4, 0.4]])}
    targets = [harmless, {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}]
    for check in (lambda: tiny_model()(random_images(), targets=targets),
                  lambda: DNDETRCriterion(tiny_config())(as_outputs(*random_predictions()), targets)):
        with pytest.raises(ValueError, match=message):
            check()


def test_a_wrong_number_of_targets_is_refused_and_boxes_that_stick_out_are_accepted():
    with pytest.raises(ValueError, match="1 targets for a batch of 2"):
        tiny_model()(random_images(2), targets=random_targets(1))
    with pytest.raises(ValueError, match="3 targets for a batch of 2"):
        DNDETRCriterion(tiny_config())(as_outputs(*random_predictions()), random_targets(1, 1, 1))
    # Annotators round, and leave boxes that stick out. These can't be (x0, y0, x1, y1).
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0005], [0.9, 0.95, 0.4, 0.2]])
    targets = [{"labels": torch.tensor([0, CLASSES - 1]), "boxes": boxes}, *random_targets(0)]
    dn_detr.check_targets(targets, 2, CLASSES)


@pytest.mark.parametrize("images, padding, message", [
    (torch.rand(3, 32, 32), None, r"\[B, 3, H, W\].*\[3, 32, 32\]"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, "uint8"),
    (torch.zeros(0, 3, 32, 32), None, r"\[0, 3, 32, 32\]"),
    (torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 16, dtype=torch.bool), r"\[2, 32, 16\]"),
    (torch.rand(2, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool), r"\[1, 32, 32\]"),
    (torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32), "float32"),
    (torch.rand(2, 3, 9, 9), torch.tensor([[[0]], [[1]]]).bool().expand(2, 9, 9), "covers a whole image")],
    ids=range(7))
def test_impossible_images_and_paddings_are_refused_by_value(images, padding, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(images, padding)


# ---- Noise ---------------------------------------------------------------------------------------

BOX = torch.tensor([0.5, 0.45, 0.4, 0.2])                      # wide, far from every border


@pytest.mark.parametrize("center_noise, size_noise", [(0.4, 0.2), (0.1, 0.9), (1.0, 1.0)])
def test_box_noise_is_uniform_and_independent_between_its_bounds_and_in_zero_to_one(center_noise, size_noise):
    noised = noise_boxes(BOX.expand(20000, 4), center_noise, size_noise)
    reaches = 0.2 * center_noise, 0.1 * center_noise, 0.4 * size_noise, 0.2 * size_noise
    for values, middle, reach in zip(noised.T, BOX, reaches):  # spread evenly, from end to end
        expected = torch.linspace(-reach, reach, 20000)
        assert_near(values.sort().values - middle, expected, atol=4 / math.sqrt(20000) * reach, rtol=0)
        assert_near(values.aminmax()[0] - middle, -reach, atol=0.02 * reach, rtol=0)
        assert (values - middle).abs().max() <= reach + 1e-6
    assert_near(torch.corrcoef(noised.T), torch.eye(4), atol=0.03)
    at_border = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.049, 0.951, 0.1, 0.1]]).repeat(500, 1)
    noised = noise_boxes(at_border, 1.0, 1.0)
    assert noised.min() == 0 and noised.max() == 1


def test_label_noise_redraws_at_its_rate_uniformly_over_all_classes_and_never_unknown():
    for num_classes, rate in ((1, 0.2), (2, 0.2), (5, 1.0), (91, 0.2), (5, 0.0)):
        labels = torch.randint(num_classes, (100000,))
        noised = noise_labels(labels, num_classes, rate)
        assert_near((noised != labels).float().mean(), rate * (1 - 1 / num_classes), atol=0.005 * (rate > 0))
    share = noise_labels(torch.full((50000,), 3), CLASSES, 1.0).bincount() / 50000    # longer with "unknown"
    assert_near(share, [1 / CLASSES] * CLASSES, atol=0.01)


def test_noise_leaves_its_inputs_alone_and_draws_from_its_generator_only():
    boxes, labels, state = BOX.repeat(20, 1), torch.arange(20) % CLASSES, torch.get_rng_state()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return noise_boxes(boxes, 0.4, 0.4, generator), noise_labels(labels, 91, 0.5, generator)
    for first, again, other in zip(draw(1), draw(1), draw(2)):
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(boxes, BOX.repeat(20, 1)) and torch.equal(labels, torch.arange(20) % CLASSES)


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_noise_out_of_range_is_refused_by_value(bad):
    for name, call in (("center_noise", lambda: noise_boxes(BOX[None], bad, 0.4)),
                       ("size_noise", lambda: noise_boxes(BOX[None], 0.4, bad)),
                       ("label_noise", lambda: noise_labels(torch.tensor([0]), CLASSES, bad))):
        with pytest.raises(ValueError, match=f"{name} is {bad}"):
            call()


# ---- Groups, slots, noised queries ---------------------------------------------------------------


def naive_slots(counts, num_groups):
    """-> [(image, slot, source)] sorted, is_real."""
    size, first = max(counts), [0, *itertools.accumulate(counts)]
    copies = [(image, group * size + index, first[image] + index) for image, count in enumerate(counts)
              for group in range(num_groups) for index in range(count)]
    return sorted(copies), [[slot % size < count for slot in range(num_groups * size)] for count in counts]


def copies_in(slots):
    return sorted(zip(*(x.tolist() for x in (slots.image, slots.slot, slots.source))))


@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [4], [1, 3], [3, 0, 1], [0, 5, 0, 2, 2]], ids=str)
def test_slots_are_those_of_a_naive_loop(counts):
    for num_groups in (0, 1, 2, 5):
        slots = assign_slots(counts, num_groups)
        copies, is_real = naive_slots(counts, num_groups)
        assert copies_in(slots) == copies and slots.is_real.tolist() == is_real
        assert slots.is_real.shape == (len(counts), num_groups * max(counts))
        assert (slots.num_groups, slots.group_size) == (num_groups, max(counts))


def test_impossible_slots_are_refused():
    for arguments, message in ((([1, -2], 3), r"counts \[1, -2\] must not"), (([], 3), "at least one image"),
                               (([1], -3), "num_groups -3"), (([1], 3, -8), "max_queries -8")):
        with pytest.raises(ValueError, match=message):
            assign_slots(*arguments)


@pytest.mark.parametrize("max_queries, num_groups", [
    (0, 5), (100, 5), (20, 5), (19, 4), (8, 2), (7, 1), (4, 1), (1, 1)])
def test_a_budget_of_queries_lowers_the_groups_but_never_below_one(max_queries, num_groups):
    slots = assign_slots([2, 4], 5, max_queries=max_queries)
    assert slots.num_groups == num_groups and copies_in(slots) == naive_slots([2, 4], num_groups)[0]
    assert assign_slots([0, 0], 5, max_queries=max_queries).is_real.shape == (2, 0)
    assert assign_slots([2, 4], 0, max_queries=max_queries).num_groups == 0


def test_a_budget_of_queries_and_more_groups_change_no_loss():
    images, targets = random_images(), random_targets(1, 3)
    two, one = (losses_of(tiny_model(**NO_NOISE, dn_groups=groups), images, targets) for groups in (2, 1))
    budget = losses_of(tiny_model(**NO_NOISE, dn_groups=5, dn_max_queries=7), images, targets)
    assert_close(budget, two)
    assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_a_copy_without_noise_is_its_label_row_its_box_and_a_one():
    model, targets = tiny_model(**NO_NOISE), random_targets(1, 3)
    targets[1]["boxes"][0] = torch.tensor([0.0, 1.0, 0.9999, 0.0001])
    slots, content, anchor_logits = dn_detr.denoising_queries(targets, model.label_embedding, model.config)
    assert content.shape == (2, 6, 32) and anchor_logits.shape == (2, 6, 4)
    for image, slot, _ in copies_in(slots):
        label, box = (targets[image][name][slot % 3] for name in ("labels", "boxes"))
        row = model.label_embedding.weight[label]
        assert torch.equal(content[image, slot], torch.cat([row, torch.ones(1)]))
        assert_near(anchor_logits[image, slot], (box.clamp(min=1e-3) / (1 - box).clamp(min=1e-3)).log())


def test_a_matching_query_is_the_unknown_row_its_anchor_and_a_zero():
    model = tiny_model(num_patterns=3)
    content, anchor_logits = model.matching_queries(2)
    unknown = torch.cat([model.label_embedding.weight[CLASSES], torch.zeros(1)])
    for image, pattern, query in itertools.product(range(2), range(3), range(7)):    # all anchors per pattern
        assert torch.equal(content[image, pattern * 7 + query], unknown + model.patterns.weight[pattern])
        assert torch.equal(anchor_logits[image, pattern * 7 + query], model.anchor_logits.weight[query])
    assert torch.equal(tiny_model().matching_queries(2)[0], unknown.expand(2, 7, 32))


def test_each_kind_of_noise_acts_on_its_own_part_and_every_copy_draws_its_own():
    targets, rows = random_targets(300), []
    for name in ("label_noise", "center_noise", "size_noise"):
        model = tiny_model(**NO_NOISE | {name: 0.5}, dn_groups=2)
        _, content, anchor_logits = dn_detr.denoising_queries(targets, model.label_embedding, model.config)
        copies = [x[0].split(300) for x in (content, anchor_logits)]
        (content, _), (anchors, _) = copies
        assert not all(torch.equal(first, second) for first, second in copies)
        is_other = (content[:, :-1] != model.label_embedding(targets[0]["labels"])).any(-1)
        change = (anchors.sigmoid() - targets[0]["boxes"]).abs()
        rows.append([is_other.float().mean(), change[:, :2].max(), change[:, 2:].max()])
    assert torch.equal(torch.tensor(rows) > 1e-4, torch.eye(3, dtype=torch.bool))
    assert 0.3 < rows[0][0] < 0.5                              # 0.5 * (1 - 1/5)
    assert_close(targets, random_targets(300), rtol=0, atol=0)


def test_labels_without_noise_train_the_row_of_their_class_and_no_other():
    model, targets = tiny_model(label_noise=0), random_targets(1, 2)
    losses_of(model, random_images(), targets)["loss"].backward()
    used = {*torch.cat([target["labels"] for target in targets]).tolist(), CLASSES}
    trained = model.label_embedding.weight.grad.any(dim=1).nonzero().flatten().tolist()
    assert set(trained) == used and len(used) < CLASSES + 1


def test_denoising_runs_in_training_with_targets_only():
    model, images, targets = tiny_model(), random_images(), random_targets(1, 2)
    plain = {"pred_logits", "pred_boxes", "all_logits", "all_boxes"}
    assert model(images, targets=targets).keys() == plain | {"dn_logits", "dn_boxes", "dn_slots"}
    assert model(images).keys() == tiny_model(dn_groups=0)(images, targets=targets).keys() == plain
    model.eval()
    assert_close(model(images, targets=targets), model(images), rtol=0, atol=0)


# ---- Attention mask, and no leak -----------------------------------------------------------------


def test_mask_is_equation_7():
    for groups, size, matching in itertools.product((0, 1, 2, 5), (0, 1, 4), (1, 3)):
        denoising, total = groups * size, groups * size + matching
        expected = [[j < denoising and (i >= denoising or i // size != j // size) for j in range(total)]
                    for i in range(total)]
        mask = dn_detr.dn_attention_mask(groups, size, matching)
        assert mask.tolist() == expected and mask.dtype == torch.bool


def test_mask_in_the_docstring_is_the_mask_and_negative_sizes_are_refused():
    rows = re.findall(r"^ +[01m] ((?:[.x] ){6}[.x])", dn_detr.dn_attention_mask.__doc__, re.MULTILINE)
    expected = [[cell == "x" for cell in row.split()] for row in rows]
    assert dn_detr.dn_attention_mask(2, 2, 3).tolist() == expected
    with pytest.raises(ValueError, match="group_size -2"):
        dn_detr.dn_attention_mask(1, -2, 3)


def test_mask_decides_who_influences_whom_in_the_whole_model(monkeypatch):
    leaves, original = [], dn_detr.denoising_queries           # content and anchors of the copies

    def as_leaves(*arguments):
        slots, *copies = original(*arguments)
        leaves.extend(x.detach().requires_grad_() for x in copies)
        return slots, *leaves
    monkeypatch.setattr(dn_detr, "denoising_queries", as_leaves)
    targets, model = random_targets(1, 3), tiny_model()
    outputs = run(model, random_images(), targets)
    results = torch.cat([torch.cat([outputs[f"{kind}_{name}"][-1] for name in ("logits", "boxes")], dim=-1)
                         for kind in ("dn", "all")], dim=1) * torch.randn(CLASSES + 4)  # [B, Q, C + 4]
    for i in range(6 + 7):
        # Copies see the real ones of their own group of 3, an empty slot sees itself too, and that is all.
        expected = [[i == j or (i < 6 and i // 3 == j // 3 and j % 3 < count) for j in range(6)]
                    for count in (1, 3)]
        total = results[:, i].sum()
        gradients = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
        assert [gradient.any(-1).tolist() for gradient in gradients] == [expected] * 2
    loss = DNDETRCriterion(model.config)(outputs, targets)["loss"]
    for gradient in torch.autograd.grad(loss, leaves):
        assert torch.equal(gradient.any(-1), outputs["dn_slots"].is_real)


# ---- Positions, backbone, encoder, initialisation ------------------------------------------------


def naive_sine(coordinate, width, temperature, frequency):
    factors = [2 * math.pi * frequency / temperature ** (2 * i / width) for i in range(width // 2)]
    return [f(factor * coordinate) for factor in factors for f in (math.sin, math.cos)]


def test_anchors_are_encoded_with_their_temperature_and_frequency_and_modulated_by_their_size():
    decoder = tiny_model(anchor_temperature=7.0, position_frequency=3.0).decoder
    anchors, content = torch.rand(1, 1, 4) * 0.5 + 0.2, torch.randn(1, 1, 32)
    cx, cy, w, h = anchors.flatten().tolist()
    sine = torch.tensor([naive_sine(x, 16, 7, 3) for x in (cy, cx, w, h)])
    w_ref, h_ref = decoder.reference_size(content).sigmoid().flatten()
    modulated = torch.cat([sine[0] * h_ref / h, sine[1] * w_ref / w])
    for is_first, scale in ((True, 1), (False, decoder.position_scale(content).flatten())):
        position, query_sine = decoder.encode_anchors(anchors, content, is_first)
        assert_near(position.flatten(), decoder.anchor_mlp(sine.flatten()))
        assert_near(query_sine.flatten(), modulated * scale)


def test_pixel_coordinates_end_at_the_border_of_the_image_not_of_the_padding():
    padding = torch.tensor([[[False, False, True], [False, False, True], [True, True, True]]])
    for centers, (first, second) in ((False, (0.5, 1.0)), (True, (0.25, 0.75))):
        yx = dn_detr.pixel_coordinates(padding, centers)[0]
        assert_near(yx[:2, :2, 0], [[first, first], [second, second]])
        assert_near(yx[:2, :2, 1], [[first, second], [first, second]])


def test_mask_of_padding_hides_a_cell_if_its_first_pixel_is_padding():
    mask = torch.ones(1, 40, 48, dtype=torch.bool)
    mask[:, :28, :33] = False                                  # 3.5 and 4.1 cells of 8 pixels
    _, _, token_padding = patch_model().encode_image(random_images(1, 40, 48), mask)
    assert token_padding.view(5, 6).tolist() == [[y > 3 or x > 4 for x in range(6)] for y in range(5)]


def test_mask_of_padding_leaves_predictions_as_they_are_without_padding():
    model = patch_model(num_encoder_layers=2).eval()
    image = random_images(1, 32, 24)
    padded, mask = torch.randn(1, 3, 48, 56), torch.ones(1, 48, 56, dtype=torch.bool)
    padded[:, :, :32, :24], mask[:, :32, :24] = image, False
    alone, nothing = model(image), torch.zeros(1, 32, 24, dtype=torch.bool)
    assert_close(model(padded, mask), alone, rtol=1e-4, atol=1e-4)
    assert_close(model(image, nothing), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options, channels, stride", [
    (dict(backbone="small", small_widths=(8, 16, 24, 32)), 32, 16), (dict(backbone="resnet18"), 512, 32),
    (dict(backbone="resnet50", dilation=True), 2048, 16)])
def test_backbones_have_their_channels_and_stride_and_dc5_dilates_the_last_stage(options, channels, stride):
    backbone, width = dn_detr.build_backbone(DNDETRConfig(**options))
    assert width == channels
    assert backbone.eval()(random_images(1, 64, 128)).shape == (1, channels, 64 // stride, 128 // stride)
    if "dilation" in options:
        stages = backbone.layer2, backbone.layer3, backbone.layer4
        assert [stage[1].conv2.dilation for stage in stages] == [(1, 1), (1, 1), (2, 2)]


def test_weights_start_as_the_authors_do():
    model = DNDETR(tiny_config())
    for part in (model.encoder, model.decoder):
        for name, weight in part.named_parameters():
            if weight.dim() > 1 and weight.numel() > 500:     # Xavier: uniform within +- sqrt(6 / (in + out))
                bound = math.sqrt(6 / sum(weight.shape))
                assert 0.97 * bound < weight.abs().max() <= bound, name
    assert_near(model.class_head.bias.sigmoid(), [0.01] * CLASSES)
    boxes = model.eval()(random_images())["all_boxes"]
    assert_near(boxes, model.anchor_logits.weight.sigmoid().expand_as(boxes))


# ---- Matching and loss ---------------------------------------------------------------------------


def naive_giou(a, b):
    """Of two cxcywh boxes, in plain numbers, with the authors' epsilon."""
    sides, hull_sides = [], []
    for center, side in ((0, 2), (1, 3)):
        lows, highs = zip(*((x[center] - x[side] / 2, x[center] + x[side] / 2) for x in (a, b)))
        sides.append(max(0, min(highs) - max(lows)))
        hull_sides.append(max(highs) - min(lows))
    overlap, hull = math.prod(sides), math.prod(hull_sides)
    union = a[2] * a[3] + b[2] * b[3] - overlap
    return overlap / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def naive_focal(logit, is_object, config):
    p, alpha, gamma = 1 / (1 + math.exp(-logit)), config.focal_alpha, config.focal_gamma
    if is_object:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p ** gamma * math.log(1 - p)


def naive_l1(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


def naive_costs(logits, boxes, target, config):
    """What it costs to match each query (logits [N, C], boxes [N, 4]) with each object, in one image."""
    def cost(logits, box, label, truth):
        focal = naive_focal(logits[label], True, config) - naive_focal(logits[label], False, config)
        return (config.cost_class * focal + config.cost_box * naive_l1(box, truth)
                - config.cost_giou * naive_giou(box, truth))
    return [[cost(*query, *item) for item in zip(target["labels"].tolist(), target["boxes"].tolist())]
            for query in zip(logits.tolist(), boxes.tolist())]


def cheapest_assignment(*arguments):
    """{query: object} of one image."""
    return dict(zip(*(x.tolist() for x in linear_sum_assignment(naive_costs(*arguments)))))


UNUSUAL = tiny_config(cost_class=1.5, cost_box=0.7, cost_giou=3.0, loss_class=0.3, loss_box=2.5,
                      loss_giou=1.7, focal_alpha=0.4, focal_gamma=1.5)
CONFIGS = pytest.mark.parametrize("config", [tiny_config(), UNUSUAL], ids=["default", "unusual"])


@CONFIGS
def test_matching_cost_is_that_of_a_naive_loop(config):
    (logits, boxes), targets = random_predictions(), random_targets(3, 3)
    boxes[0, 0] += torch.tensor([[0.5], [0.0], [0.0], [-0.1]])                   # apart from the objects, too
    targets[0]["boxes"][1] = boxes[0, 0, 1] = torch.tensor([0.5, 0.5, 0.001, 0.001])    # where epsilon counts
    labels, truth = (torch.stack([target[name] for target in targets]) for name in ("labels", "boxes"))
    cost = dn_detr.matching_cost(logits, boxes, labels, truth, config)
    assert_near(cost, [[naive_costs(logits[layer, image], boxes[layer, image], targets[image], config)
                        for image in range(2)] for layer in range(2)])


@CONFIGS
def test_matching_is_the_cheapest_of_all_assignments(config):
    targets, first = random_targets(3, 0, 1, 4, 6), [0, 3, 3, 4, 8]    # the last: more objects than queries
    for seed in range(3):
        logits, boxes = random_predictions(layers=2, images=5, queries=5, seed=seed)
        pairs = dn_detr.match(logits, boxes, targets, config)
        assert pairs.image.shape == pairs.query.shape == pairs.source.shape == (2, 13)
        for layer in range(2):
            owners = [{} for _ in targets]
            for image, query, source in zip(*(x[layer].tolist() for x in pairs)):
                owners[image][query] = source - first[image]
            assert owners == [cheapest_assignment(logits[layer, image], boxes[layer, image], target, config)
                              for image, target in enumerate(targets)]


def naive_set_loss(logits, boxes, owners, targets, normalizer, config):
    """One layer. owners: {query: object or None} per image; a query that is missing is silent."""
    focal = l1 = giou = 0.0
    for image, target in enumerate(targets):
        for query, k in owners[image].items():
            label = None if k is None else int(target["labels"][k])
            for c, logit in enumerate(logits[image, query].tolist()):
                focal += naive_focal(logit, c == label, config)
            if k is not None:
                box, truth = boxes[image, query].tolist(), target["boxes"][k].tolist()
                l1, giou = l1 + naive_l1(box, truth), giou + 1 - naive_giou(box, truth)
    return {"ce": focal / normalizer, "bbox": l1 / normalizer, "giou": giou / normalizer}


@CONFIGS
def test_every_loss_term_is_that_of_a_naive_loop(config):
    targets, slots = random_targets(1, 3), assign_slots([1, 3], 2)
    logits, boxes = random_predictions(layers=3, queries=2)    # fewer than objects in the second image
    dn_logits, dn_boxes = random_predictions(layers=3, queries=6, seed=1)
    outputs = as_outputs(logits, boxes, dn_logits=dn_logits, dn_boxes=dn_boxes, dn_slots=slots)
    copies = [{0: 0, 3: 0}, {group * 3 + k: k for group in range(2) for k in range(3)}]
    weights = {"ce": config.loss_class, "bbox": config.loss_box, "giou": config.loss_giou}
    expected = {"loss": 0}
    for layer, suffix in enumerate(("_0", "_1", "")):
        owners = [dict.fromkeys(range(2)) | cheapest_assignment(*image, config)
                  for image in zip(logits[layer], boxes[layer], targets)]
        for prefix, terms in (
                ("", naive_set_loss(logits[layer], boxes[layer], owners, targets, 4, config)),
                ("dn_", naive_set_loss(dn_logits[layer], dn_boxes[layer], copies, targets, 4 * 2, config))):
            for name, value in terms.items():
                expected[f"{prefix}loss_{name}{suffix}"] = value
                expected["loss"] += weights[name] * value
    losses = {name: value.item() for name, value in DNDETRCriterion(config)(outputs, targets).items()}
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_loss_of_a_batch_is_the_sum_over_its_images_whatever_their_neighbours():
    model, images, targets = patch_model(**NO_NOISE), random_images(3), random_targets(1, 5, 2)
    together = losses_of(model, images, targets)
    alone = [losses_of(model, images[i:i + 1], targets[i:i + 1]) for i in range(3)]
    for name, value in together.items():
        expected = sum(losses[name] * count for losses, count in zip(alone, (1, 5, 2)))
        assert_near(value * 8, expected, atol=1e-4)


@pytest.mark.parametrize("counts", [(0, 2), (0, 0), (12, 1)], ids=str)
def test_empty_images_and_crowds_train(counts):
    model, targets = tiny_model(), random_targets(*counts)
    outputs = run(model, random_images(), targets)
    losses = DNDETRCriterion(model.config)(outputs, targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values()) and losses["loss_ce"] > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for name, value in losses.items():
        if name.startswith(("dn_", "loss_bbox", "loss_giou")):
            assert (value == 0) == (max(counts) == 0)


@pytest.mark.parametrize("here, elsewhere, normalizer", [(4, 6, 5), (0, 4, 2), (0, 1, 1), (1, 0, 1)])
def test_the_normaliser_is_averaged_over_processes_and_only_then_at_least_one(
        monkeypatch, here, elsewhere, normalizer):
    logits, boxes = random_predictions(layers=1, images=1, queries=6)
    targets, criterion = random_targets(here), DNDETRCriterion(tiny_config())
    alone = criterion(as_outputs(logits, boxes), targets)["loss_ce"] * max(here, 1)
    for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: 2),
                        ("all_reduce", lambda tensor: tensor.add_(elsewhere))):
        monkeypatch.setattr(torch.distributed, name, value)
    shared = criterion(as_outputs(logits, boxes), targets)["loss_ce"]
    assert_close(shared * normalizer, alone)


# ---- Predictions and instability -----------------------------------------------------------------


def test_postprocess_by_hand():
    logits = torch.tensor([[[2.0, -9.0, -1.0], [0.0, -9.0, 1.0]],               # [B, N = 2, C = 3]
                           [[-3.0, -9.0, -2.0], [4.0, -9.0, -4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]],
                          [[0.1, 0.2, 0.2, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    outputs = as_outputs(logits[None], boxes[None])
    first, second = dn_detr.postprocess(outputs, [(100, 200), (10, 10)], num_select=3)
    a, b = [80.0, 30.0, 120.0, 70.0], [0.0, 50.0, 100.0, 100.0]
    c, d = [0.0, 0.0, 2.0, 4.0], [0.0, 0.0, 10.0, 10.0]
    for result, scores, labels, expected in ((first, [2.0, 1.0, 0.0], [0, 2, 0], [a, b, b]),
                                             (second, [4.0, -2.0, -3.0], [0, 2, 0], [d, c, c])):
        assert_near(result["scores"], torch.tensor(scores).sigmoid())
        assert result["labels"].tolist() == labels
        assert_near(result["boxes"], expected)


def test_postprocess_selects_three_hundred_or_what_there_is_and_refuses_sizes_of_other_images():
    for queries, selected in ((7, 7 * CLASSES), (70, 300)):
        outputs = {"pred_logits": torch.randn(2, queries, CLASSES), "pred_boxes": torch.rand(2, queries, 4)}
        assert len(dn_detr.postprocess(outputs, [(32, 32)] * 2)[1]["scores"]) == selected
        for sizes in ([(10, 10)], [(10, 10)] * 3, [10, 10]):
            with pytest.raises(ValueError, match=r"each of the 2 images.*\["):
                dn_detr.postprocess(outputs, sizes)


def test_matching_instability_by_hand():
    instability = dn_detr.matching_instability
    assert instability([0, -1, 1, -1], [-1, 0, 1, -1]) == 2       # object 0 moved
    assert instability([0, -1, 1, -1], [1, -1, 0, -1]) == 2       # a swap
    with pytest.raises(ValueError, match="same queries, not 3 and 2"):
        instability([0, 1, -1], [0, 1])


def test_copies_to_a_device_are_asynchronous_only_on_cuda():
    tensor = types.SimpleNamespace(to=lambda device, non_blocking: non_blocking)
    assert all(dn_detr.to_device(tensor, device) for device in ("cuda", "cuda:1", torch.device("cuda")))
    assert not any(dn_detr.to_device(tensor, device) for device in ("mps", "cpu", CPU, None))


# ---- The authors' weights and numbers ------------------------------------------------------------

# Of the authors' code: ResNet-18, 2 + 3 layers, 12 queries, 2 groups. Logits are [:, 0, :4], boxes [:, 0].
GOLDEN = dict(
    pred_logits=[[0.427449, -0.923196, 0.242535, -0.10369], [0.631754, -1.087975, 0.188411, 0.029284]],
    pred_boxes=[[0.090606, 0.777184, 0.610356, 0.311936], [0.089103, 0.769441, 0.581301, 0.303353]],
    mean_logits_per_layer=[-0.02305660471087748, 0.034439871834775246, 0.04206441767384117],
    mean_boxes_per_layer=[0.5274777500890195, 0.5154991260108849, 0.4940830652291576],
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


def test_predictions_losses_gradient_and_matching_are_those_of_the_authors():
    model = DNDETR.from_official(golden_weights(), dn_groups=2, **NO_NOISE)
    images, padding, targets = golden_batch()
    with torch.no_grad():
        outputs = model.eval()(images, padding)
    assert_near(outputs["pred_logits"][:, 0, :4], GOLDEN["pred_logits"])
    assert_near(outputs["pred_boxes"][:, 0], GOLDEN["pred_boxes"])
    assert_near(outputs["all_logits"].mean((1, 2, 3)), GOLDEN["mean_logits_per_layer"])
    assert_near(outputs["all_boxes"].mean((1, 2, 3)), GOLDEN["mean_boxes_per_layer"])
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
    (SMALL,
     dict(nheads=4, dropout=0.1, transformer_activation="gelu", scalar=3, label_noise_scale=0.5,
          box_noise_scale=0.3),
     SMALL_CONFIG | dict(num_heads=4, dropout=0.1, activation="gelu", dn_groups=3, label_noise=0.5,
                         center_noise=0.3, size_noise=0.3)),
    (SMALL, None, SMALL_CONFIG),                               # neither slopes nor arguments
    (SMALL | dict(backbone="resnet34", width=64, patterns=3, classes=7), {},
     SMALL_CONFIG | dict(backbone="resnet34", hidden_dim=64, num_patterns=3, num_classes=7)),
    (SMALL | dict(backbone="resnet101"), dict(dilation=True),                                      # DC5
     SMALL_CONFIG | dict(backbone="resnet101", dilation=True)),
    (SMALL | dict(backbone="resnet152"), {}, SMALL_CONFIG | dict(backbone="resnet152"))], ids=range(6))
def test_an_authors_file_is_read_with_its_sizes_its_arguments_and_overrides(tmp_path, sizes, args, expected):
    weights = {f"module.{name}": tensor for name, tensor in blank_weights(**sizes).items()}
    assert expected or len(weights) == 591                     # as many as in the R50 file
    content = weights if args is None else {"model": weights, "args": argparse.Namespace(**args), "epoch": 49}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert DNDETR.from_official(tmp_path / "checkpoint.pth").config == DNDETRConfig(**expected)
    overrides = dict(num_heads=2, dn_groups=0, dropout=0.2)
    assert DNDETR.from_official(content, **overrides).config == DNDETRConfig(**expected | overrides)


@pytest.mark.parametrize("lost, added, message", [
    ("transformer.decoder.norm.weight", {"extra.weight": torch.zeros(256)}, "(?s)decoder.norm.weight.*extra"),
    ("input_proj.bias", {"input_proj.bias": torch.zeros(3)}, r"(?s)input_projection.bias.*\[3\].*\[256\]"),
    (None, {"backbone.0.body.layer9.0.conv7.weight": torch.zeros(3)}, "a network of 21 convolutions"),
    ("class_embed.weight", {}, "not a DN-DETR checkpoint.*class_head.weight")])
def test_weights_that_do_not_fit_are_named(lost, added, message):
    weights = blank_weights(encoder=1, decoder=1, queries=4)
    weights.pop(lost, None)
    with pytest.raises(ValueError, match=message):
        DNDETR.from_official(weights | added)


class Trap:
    """Its pickle makes a directory when it is opened without care."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("kind", ["absent", "truncated", "tensor", "code"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name_and_runs_no_code(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some.pth"
    content = {"tensor": torch.zeros(3), "code": {"args": Trap()}, "truncated": {}}
    if kind != "absent":
        torch.save(content[kind], path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="some.pth can't be read as a checkpoint"):
        DNDETR.from_official(path)
    assert not (tmp_path / "sprung").exists()


# ---- dn_detr.py as a whole -----------------------------------------------------------------------


def test_the_tour_shows_noise_mask_shapes_and_losses(capsys):
    dn_detr.tour()
    mask, shape, losses = r"(x ){4}(\. ){5}\.\n", r"dn_logits +\[2, 2, 4, 3\]", r"loss_giou( +\d\.\d\d){2}\n"
    assert re.search(f"(?s){mask}.*{shape}.*{losses}", capsys.readouterr().out)


def test_without_sections_2_to_4_and_tagged_lines_the_file_is_dab_detr(monkeypatch):
    before, after, tour = (SOURCE.index(f"# ---- {section}. ") for section in (2, 5, 15))   # where they begin
    lines = (SOURCE[:before] + SOURCE[after:tour]).splitlines()
    source = "\n".join(line for line in lines if not line.rstrip().endswith("[DN]"))
    module = types.ModuleType("dab_detr")
    monkeypatch.setitem(sys.modules, "dab_detr", module)
    exec(compile(source, "dab_detr", "exec"), module.__dict__)
    assert not re.search("dn_|noise", " ".join(module.DNDETRConfig.__dataclass_fields__))
    full = tiny_model(dn_groups=0)
    dab = module.DNDETR(module.DNDETRConfig(**{name: TINY[name] for name in TINY if name != "dn_groups"}))
    nn.init.zeros_(full.label_embedding.weight)                # DAB-DETR's contents start from zero
    weights = full.state_dict()
    del weights["label_embedding.weight"]
    dab.load_state_dict(weights)
    images, targets = random_images(), random_targets(1, 3)
    expected, outputs = run(full, images, targets), run(dab, images, targets)
    assert_close(outputs, expected, rtol=0, atol=0)
    losses = DNDETRCriterion(full.config)(expected, targets)
    assert_close(module.DNDETRCriterion(dab.config)(outputs, targets), losses)


# ---- train_toy.py: data --------------------------------------------------------------------------

SHAPES_RUN = ("--train-size 8 --val-size 4 --epochs 2 --batch-size 4 --hidden-dim 16 --num-heads 2 "
              "--num-queries 6 --dim-feedforward 16 --num-decoder-layers 2 --device cpu").split()


def train_tiny(folder, *flags):
    return train_toy.train(train_toy.parse_options([*SHAPES_RUN, "--output-dir", str(folder), *flags]), CPU)


def main(*flags):
    train_toy.main([str(flag) for flag in (*flags, "--device", "cpu")])


def refused(capsys, *flags):
    """What the program says when it ends because of these flags, after its exit code or error."""
    with pytest.raises(SystemExit) as ended:
        train_toy.main([str(flag) for flag in flags])
    assert ended.value.code not in (0, None)
    return f"{ended.value.code} {capsys.readouterr().err}"


def write_coco(folder, sizes, annotations, categories=((3, "cat"), (7, "dog"))):
    """A data set of images {id: (width, height)} of noise and of (image id, category id, bbox, more);
    returns its folder and file. Annotation ids start at 0, as in many files."""
    (folder / "images").mkdir(parents=True)
    for image_id, (width, height) in sizes.items():
        pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{image_id}.png")
    (folder / "annotations.json").write_text(json.dumps({
        "images": [{"id": id, "file_name": f"{id}.png", "width": width, "height": height}
                   for id, (width, height) in sizes.items()],
        "annotations": [{"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}
                        for number, (image_id, category_id, bbox, more) in enumerate(annotations)],
        "categories": [{"id": id, "name": name} for id, name in categories]}))
    return str(folder / "images"), str(folder / "annotations.json")


def tiny_coco(folder):
    """Ids with gaps, a crowd, a degenerate box, one that reaches out, an empty image, mixed sizes."""
    return write_coco(folder, {5: (80, 64), 8: (64, 80), 9: (64, 64)}, [
        (5, 7, [6, 4, 30, 20], {}), (5, 3, [60, 10, 40, 20], {}), (5, 3, [10, 10, 0, 5], {}),
        (8, 3, [4, 6, 20, 30], {}), (8, 3, [0, 0, 64, 80], dict(iscrowd=1, area=2400))])


def test_shapes_touch_all_four_sides_of_their_boxes_at_every_size():
    for (name, inside), size in itertools.product(train_toy.SHAPES.items(), (9, 12, 20, 80)):
        v, u = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
        shape = inside(u, v)
        assert shape[0].any() and shape[-1].any() and shape[:, 0].any() and shape[:, -1].any(), (name, size)


def test_shapes_are_a_scene_for_every_seed_split_and_index_with_empty_and_crowded_ones_and_little_overlap():
    few, many = (train_toy.ShapesDataset(size, 1, "val") for size in (4, 200))
    for index in range(4):
        image = few[index][0]
        assert torch.equal(image, many[index][0])
        small = few.picture(index).float().unflatten(1, (64, 4)).unflatten(3, (64, 4)).mean((2, 4))
        assert (small - image.float()).abs().mean() < 12
    for seed, split in ((2, "val"), (1, "train")):
        assert not torch.equal(few[0][0], train_toy.ShapesDataset(1, seed, split)[0][0])
    counts = [len(labels) for labels in many.labels]
    assert min(counts) == 0 and max(counts) > 8 and not many.clipped and not many.dropped
    for a, b in (pair for boxes in many.boxes for pair in itertools.combinations(boxes, 2)):
        overlap = (torch.minimum(a, b)[2:] - torch.maximum(a, b)[:2]).clamp(min=0).prod()
        assert overlap <= 0.301 * min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())


def test_augmentation_depends_on_seed_epoch_and_index_only_and_moves_boxes_with_the_image():
    dataset, plain = (train_toy.ShapesDataset(40, 0, "train", augment=augment) for augment in (True, False))
    state, first = torch.get_rng_state(), [dataset[index] for index in range(40)]
    assert torch.equal(state, torch.get_rng_state()), "augmentation disturbs the noise"
    assert all(torch.equal(dataset[index][0], first[index][0]) for index in reversed(range(40)))
    mirrored = 0
    for (image, target), (original, truth) in zip(first, plain):
        spread, boxes = original.float().std(0), truth["boxes"].clone()      # recolouring keeps this spread
        if not torch.equal(image.float().std(0), spread):
            mirrored, spread, boxes[:, 0] = mirrored + 1, spread.flip(-1), 1 - boxes[:, 0]
        assert_near(image.float().std(0), spread)
        assert_near(target["boxes"], boxes)
    assert 8 < mirrored < 32
    dataset.epoch = 1
    assert sum(torch.equal(dataset[index][0], first[index][0]) for index in range(40)) < 10


def test_coco_loader_handles_gaps_crowds_degenerate_boxes_empty_images_and_limits_the_longer_side(tmp_path):
    paths = tiny_coco(tmp_path)
    dataset = train_toy.CocoDataset(*paths, image_size=64)
    assert (dataset.dropped, dataset.clipped, dataset.names) == (1, 1, {3: "cat", 7: "dog"})
    (wide, target), (tall, tall_target), (_, empty) = dataset
    assert target["labels"].tolist() == [1, 0] and tall_target["labels"].tolist() == [0]   # not the crowd
    assert_near(target["boxes"], [[21 / 80, 14 / 64, 30 / 80, 20 / 64], [70 / 80, 20 / 64, 20 / 80, 20 / 64]])
    assert wide.shape == (3, 64, 80) and tall.shape == (3, 80, 64) and target["size"] == (64, 80)
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)
    transform = train_toy.coco_transform(60, augment=False)
    for size, expected in (((120, 150), (60, 75)), ((150, 120), (75, 60)), ((60, 300), (20, 100))):
        assert transform(torch.zeros(3, *size, dtype=torch.uint8)).shape[1:] == expected
    for flags, is_cropped in ((["--model", "paper"], True), ([], False), (["--overfit", "3"], False)):
        held_out = [] if "--overfit" in flags else ["--coco-val", *map(str, paths)]
        flags = [*flags, "--coco-train", *map(str, paths), *held_out, "--image-size", "64"]
        dataset, _ = train_toy.build_datasets(train_toy.parse_options(flags))
        shapes = set()
        for epoch in range(8):
            train_toy.train_batches(dataset, 1, seed=0, epoch=epoch)        # sets the epoch
            items = list(dataset)
            dn_detr.check_targets([target for _, target in items], len(items), 2)
            shapes |= {image.shape[1:] for image, _ in items}
        assert (len(shapes) > 3) == is_cropped


def test_batches_are_padded_masked_and_normalised_with_imagenets_numbers():
    items = [(torch.full((3, h, w), 200, dtype=torch.uint8), {}) for h, w in ((4, 6), (6, 5))]
    images, mask, _ = train_toy.collate(items)
    for index, (height, width) in enumerate(((4, 6), (6, 5))):
        assert mask[index].tolist() == [[y >= height or x >= width for x in range(6)] for y in range(6)]
    normalized, _ = train_toy.normalize(images, mask, CPU)
    for channel, average, deviation in ((0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)):    # R, G, B
        expected = torch.where(mask, 0.0, (200 / 255 - average) / deviation)
        assert_near(normalized[:, channel], expected, rtol=1e-3, atol=1e-3)
    assert train_toy.collate(items[:1] * 2)[1] is None


@pytest.mark.parametrize("change, message", [
    (lambda data: data["annotations"][1].update(image_id=77), "the image_id of an image.*'image_id': 77"),
    (lambda data: data["annotations"][1].update(category_id=4), "id of a category.*'category_id': 4"),
    (lambda data: data["annotations"][1].update(bbox=[1, 2, 3]), r"bbox \[x, y, width.*\[1, 2, 3\]"),
    (lambda data: data["images"][2].update(id=5), "two images .* have the same id"),
    (lambda data: data["images"][1].pop("height"), "not in COCO format.*height"),
    (lambda data: data.update(images=[], annotations=[]), "has no images"),
    (lambda data: [a.update(bbox=[*a["bbox"][:2], 79, 79]) for a in data["annotations"]], "x0, y0, x1, y1"),
    (lambda data: data["images"][0].update(file_name="gone.png"), "1 of 3 images are not in .*gone.png"),
    (lambda data: "not json", "can't be read as JSON")], ids=range(9))
def test_broken_annotations_are_named_before_training(tmp_path, change, message):
    folder, path = tiny_coco(tmp_path)
    data = json.loads(Path(path).read_text())
    text = change(data)
    Path(path).write_text(text if isinstance(text, str) else json.dumps(data))
    with pytest.raises(ValueError, match=message):
        train_toy.CocoDataset(folder, path, 64)


def test_broken_resized_and_turned_images_are_named(tmp_path):
    folder, path = tiny_coco(tmp_path)
    dataset = train_toy.CocoDataset(folder, path, 64)
    Image.new("RGB", (64, 80)).save(f"{folder}/5.png")
    Path(f"{folder}/8.png").write_bytes(b"this is no picture")
    for index, message in ((0, r"5.png has \(80, 64\) pixels.*\(64, 80\).*EXIF"), (1, "8.png can't be read")):
        with pytest.raises(ValueError, match=message):
            dataset[index]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "turned"])
def test_images_of_every_kind_are_read_as_rgb(tmp_path, mode):
    gray, exif = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6), Image.Exif()
    image = Image.fromarray(gray.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(gray)
    if mode == "turned":
        exif[0x0112] = 6                                       # to be turned by 90 degrees clockwise
    image = image.convert(mode) if mode in ("P", "RGBA") else image
    image.save(tmp_path / "image.png", exif=exif)
    for channel in train_toy.read_image(tmp_path / "image.png", upright=True):
        assert channel.tolist() == (np.rot90(gray, -1) if mode == "turned" else gray).tolist()
    assert train_toy.read_image(tmp_path / "image.png").shape == (3, 4, 6)


def test_held_out_data_of_other_categories_or_without_objects_are_refused(tmp_path):
    train = tiny_coco(tmp_path / "train")
    others = write_coco(tmp_path / "others", {1: (64, 64)}, [(1, 3, [8, 4, 20, 20], {})], [(3, "cow")])
    empty = write_coco(tmp_path / "empty", {1: (64, 64)}, [])
    for val, message in ((others, "differ: --coco-train has .*'cat'.*'cow'"), (empty, "hold no object")):
        with pytest.raises(ValueError, match=message):
            train_toy.build_datasets(train_toy.parse_options(["--coco-train", *train, "--coco-val", *val]))


def test_the_data_are_described_and_what_can_not_be_learned_is_warned_of(tmp_path):
    paths = write_coco(tmp_path, {1: (128, 128), 2: (128, 256)}, [
        (1, 3, [8, 4, 20, 20], {}), (1, 3, [40, 40, 15, 15], {}),
        (2, 3, [8, 4, 64, 50], {}), (2, 3, [9, 9, 0, 9], {})])
    dataset, few = train_toy.CocoDataset(*paths, 64), tiny_config(num_queries=1)
    text, *warnings = train_toy.describe(dataset, few, 64, is_random=True).split("\nwarning: ")
    # The box of 15 pixels is shrunk to 7.5, less than the stride of 8.
    assert re.search("2 .*images, 3 objects, 1.5 per .* at most 2, 33% .* smaller.*; cat 3, dog 0", text)
    for warning, message in itertools.zip_longest(warnings, (
            "more than the model has queries (1)", "no training object is a dog", "one class",
            "1 boxes without area", "smaller than a feature cell", "random weights and 2 photographs")):
        assert message in warning
    shapes, enough = train_toy.ShapesDataset(50, 0, "train"), tiny_config(num_queries=20)
    assert "warning" not in train_toy.describe(shapes, enough, 64, is_random=False)


# ---- train_toy.py: the recipe --------------------------------------------------------------------


def tiny_run(num_steps=10, amp=False):
    return train_toy.Run(tiny_model(), 0.01, num_steps, CPU, amp)


def tiny_batches(count):
    return [(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), None,
             [target | {"image_id": 7} for target in random_targets(1, 2, seed=i)]) for i in range(count)]


def test_training_steps_are_adamw_steps_done_by_hand():
    run, batches, reference = tiny_run(), tiny_batches(3), tiny_model()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in reference.named_parameters()}
    scales = 1, 1e-5, 1                                       # the second gradient is too small to be clipped
    factors, totals, norms = iter(scales), [], []
    run.criterion.register_forward_hook(lambda *args: args[-1] | {"loss": args[-1]["loss"] * next(factors)})
    torch.manual_seed(5)
    means = train_toy.train_one_epoch(run, batches)
    torch.manual_seed(5)
    for step, (scale, (images, _, targets)) in enumerate(zip(scales, batches)):
        inputs, _ = train_toy.normalize(images, None, CPU)
        reference.train().zero_grad()
        loss = scale * DNDETRCriterion(reference.config)(reference(inputs, None, targets), targets)["loss"]
        loss.backward()
        totals.append(loss.item())
        norms.append(torch.stack([p.grad.norm() for p in reference.parameters()]).norm())
        rate = 0.01 * min((step + 1) / 2, 1 - step / 10)       # 2 steps of warm-up, then decay
        with torch.no_grad():
            for name, p in reference.named_parameters():
                gradient, (first, second) = p.grad * min(1, 0.1 / norms[-1]), moments[name]
                first.mul_(0.8).add_(0.2 * gradient)
                second.mul_(0.95).add_(0.05 * gradient ** 2)
                p.mul_(1 - rate * 0.05)
                denominator = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                p.sub_(rate * first / (1 - 0.8 ** (step + 1)) / denominator)
    assert norms[0] > 1 and norms[1] < 0.1 and norms[2] > 1
    for name, parameter in reference.named_parameters():
        assert_close(run.model.get_parameter(name), parameter, rtol=1e-4, atol=1e-4)
    assert means["loss"] == pytest.approx(np.mean(totals), rel=1e-3)


def test_a_pretrained_backbone_has_a_tenth_of_the_rate_and_its_first_stages_are_frozen():
    for frozen_norm, factor in ((True, 0.1), (False, 1)):
        model = tiny_model(backbone="resnet18", frozen_norm=frozen_norm)
        optimizer, schedule = train_toy.build_optimizer(model, 0.01, 2000)
        rate_of = {p: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            expected = 0.01 * factor if name.startswith("backbone.") else 0.01
            is_frozen = frozen_norm and name.startswith(("backbone.conv1", "backbone.layer1"))
            assert rate_of.get(parameter) == (None if is_frozen else pytest.approx(expected)), name
    rates = [schedule.lr_lambdas[0](step) for step in (0, 49, 500, 1500, 1999)]
    assert rates == pytest.approx([0.01, 0.5, 0.75, 0.25, 0.0005]), "100 steps of warm-up, then decay to zero"


def test_an_easier_start_looks_at_the_anchor_from_a_grid():
    model = tiny_model(anchor_temperature=20, position_frequency=4, cell_centers=True)
    train_toy.ease_start(model)
    x, y = torch.tensor([1, 3, 5, 1, 3, 5, 1]) / 6, torch.tensor([1, 1, 1, 3, 3, 3, 5]) / 6
    assert_near(model.anchor_logits.weight.sigmoid(), torch.stack([x, y, *torch.full((2, 7), 0.3)], 1))
    places = torch.cartesian_prod(*[(torch.arange(6) + 0.5) / 6] * 2)           # (y, x) of 36 cells
    encoded = dn_detr.sine_encoding(places, 16, 20.0, 4.0)
    _, positions, _ = model.encode_image(random_images(1, 48, 48), None)
    assert_near(positions[0], encoded)
    for layer in model.decoder.layers:
        scores = layer.cross_query_sine(encoded) @ layer.cross_key_position(positions[0]).T
        assert torch.equal(scores.argmax(-1), torch.arange(36))
    for part in (model.encoder, model.decoder):
        assert torch.equal(part.position_scale(torch.randn(36, 32)), torch.ones(36, 32))


def test_a_run_does_what_it_should_epoch_by_epoch(tmp_path, monkeypatch):
    seeds, orders, compared, precisions = [], [], [], iter([30.0, 50.0, 40.0, 45.0])
    train_one_epoch, metrics = train_toy.train_one_epoch, train_toy.coco_metrics

    def watched_epoch(run, batches, description):
        seeds.append(torch.initial_seed())
        batches = list(batches)
        orders.append(tuple(target["image_id"] for _, _, targets in batches for target in targets))
        return train_one_epoch(run, batches, description)

    def watched_comparison(previous, current):
        compared.append((previous, current))
        return len(compared), 50.0                             # IS, and objects that moved
    monkeypatch.setattr(train_toy, "train_one_epoch", watched_epoch)
    monkeypatch.setattr(train_toy, "compare_matching", watched_comparison)
    monkeypatch.setattr(train_toy, "coco_metrics", lambda *args: metrics(*args) | {"AP": next(precisions)})
    history = train_tiny(tmp_path / "run", "--epochs", "4")
    assert [row["lr"] for row in history] == pytest.approx([3e-3 * (1 - epoch / 4) for epoch in (1, 2, 3, 4)])
    assert len(set(orders)) == len(set(seeds)) == 4
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert [(row["instability"], row["moved"]) for row in history] == [(i, 50.0) for i in (1, 2, 3, 4)]
    assert compared[0][0] == {} and all(new[0] is old[1] for old, new in itertools.pairwise(compared))
    assert torch.load(tmp_path / "run/best.pt")["epoch"] == 2, "best.pt is the best of all epochs"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == history and [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        parts = {prefix: sum(weight * value for kind, weight in (("ce", 2), ("bbox", 5), ("giou", 2))
                             for name, value in row.items() if name.startswith(f"{prefix}loss_{kind}"))
                 for prefix in ("", "dn_")}
        expected = parts[""], parts["dn_"], sum(parts.values())
        assert (row["loss_matching"], row["loss_denoising"], row["loss"]) == pytest.approx(expected, rel=1e-4)
    assert all((tmp_path / "run" / f"{name}.png").stat().st_size > 5000 for name in ("curves", "detections"))


@pytest.mark.parametrize("what", ["loss", "gradient", "prediction"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_that_is_not_finite_stops_the_epoch_and_is_named(what, step):
    run = tiny_run()

    def poison(module, inputs, outputs):
        if run.step == step and what == "prediction" and module is run.model:
            outputs["all_boxes"] = outputs["all_boxes"] * math.inf
        elif run.step == step and module is run.criterion:
            outputs["loss"] = outputs["loss"] * (math.nan if what == "loss" else 1)
            outputs["loss"].register_hook(lambda gradient: gradient * (math.inf if what == "gradient" else 1))
    for module in (run.model, run.criterion):
        module.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=rf"step {step}, images \[7, 7\].* not finite"):
        train_toy.train_one_epoch(run, tiny_batches(3))


def test_mixed_precision_predicts_float32_and_is_in_bfloat16_only_where_that_is_not_emulated(monkeypatch):
    losses, types_of_outputs = [], set()
    for amp in (False, True):
        run = tiny_run(amp=amp)
        run.model.register_forward_hook(lambda module, inputs, outputs: types_of_outputs.update(
            output.dtype for name, output in outputs.items() if name != "dn_slots"))
        losses.append(train_toy.train_one_epoch(run, tiny_batches(1))["loss"])
    assert types_of_outputs == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert train_toy.amp_dtype(torch.device("cuda")) == torch.float16            # a T4
    assert train_toy.amp_dtype(CPU) == torch.bfloat16


# ---- train_toy.py: evaluation and pictures -------------------------------------------------------


def test_ap_is_measured_in_original_pixels_also_of_annotation_id_0_and_distances_between_centers(tmp_path):
    cats, dog = [(1, 3, [16, 8, 80, 40], {}), (2, 3, [8, 16, 40, 80], {})], (2, 7, [40, 80, 40, 80], {})
    paths = write_coco(tmp_path, {1: (160, 80), 2: (80, 160)}, [*cats, dog])
    dataset = train_toy.CocoDataset(*paths, image_size=64)
    boxes = torch.tensor([[[0.35, 0.35, 0.5, 0.5], [0.9, 0.1, 0.1, 0.1]]])       # a cat, and nothing
    logits = torch.tensor([[[5.0, -9.0], [-9.0, -9.0]]]), torch.tensor([[[5.0, -9.0], [-9.0, 2.0]]])
    outputs = iter({"pred_logits": each, "pred_boxes": boxes} for each in logits)
    model = tiny_model(num_classes=2, num_queries=2)
    model.forward = lambda images, padding_mask: next(outputs)
    model.anchor_logits.weight.data = torch.tensor([[0.0] * 4, [20.0] * 4])     # middle and right bottom
    metrics, matching = train_toy.evaluate(model, dataset, CPU, batch_size=1)
    assert not model.training
    assert (metrics["AP"], metrics["AP75"]) == pytest.approx((50, 50))
    assert metrics["AP_per_class"] == pytest.approx({"cat": 100, "dog": 0})
    assert [x.tolist() for x in (*matching[1], *matching[2])] == [[0, -1], [1, 0], [0, 1], [1, 0]]
    near, far = math.dist((0.5, 0.5), (0.35, 0.35)), math.dist((1, 1), (0.75, 0.75))
    assert metrics["anchor_distance_found"] == pytest.approx(near, abs=1e-5)
    assert metrics["anchor_distance"] == pytest.approx((2 * near + far) / 3, abs=1e-5)
    table = train_toy.class_table(dataset, metrics["AP_per_class"])
    assert re.fullmatch("cat +AP 100.0, 2 objects\ndog +AP +0.0, 1 objects", table)


def test_matchings_of_two_epochs_are_compared_by_hand():
    def epoch(*rows):
        return {index: (torch.tensor(matched), torch.tensor(found).bool())
                for index, (matched, found) in enumerate(rows)}
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
    boxes, texts, colors = train_toy.judge(result, torch.tensor([0, 1]), true_boxes, ["cat", "dog"], 0.5)
    assert texts == ["cat 0.90", "cat 0.80 again", "dog 0.70 wrong", "dog missed"]
    assert colors == [train_toy.COLORS[0], "red", "red", "red"] and torch.equal(boxes[3], true_boxes[1])
    picture = train_toy.draw_boxes(torch.zeros(3, 40, 60, dtype=torch.uint8), boxes, texts, colors)
    assert picture.size == (60, 40) and picture.getpixel((25, 30)) == (255, 0, 0)


# ---- train_toy.py: interruptions -----------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of two epochs that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train_tiny(folder)
    return folder


def assert_same_run(folder, straight):
    """The same files, and checkpoints equal to the bit in everything but seconds and options."""
    names = [{path.name for path in x.iterdir() if path.suffix != ".tmp"} for x in (folder, straight)]
    assert names[0] == names[1]
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(x / name) for x in (folder, straight))
        for row in ours["history"] + theirs["history"]:
            del row["seconds"]
        for key in ("model", "optimizer", "schedule", "matching", "epoch", "step", "history"):
            assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("target, name, moment", [
    *((os, "replace", moment) for moment in (0, 1, 3, 4, 5, 7, 8, 11)), (torch.Tensor, "backward", 3)])
def test_a_run_stopped_at_any_moment_ends_as_if_never_stopped(
        tmp_path, monkeypatch, straight, target, name, moment):
    for drawing in ("draw_curves", "draw_detections"):
        monkeypatch.setattr(train_toy, drawing, lambda *arguments: matplotlib.figure.Figure((1, 1)))
    original, calls = getattr(target, name), itertools.count()

    def stop_at_moment(*arguments, **options):
        if next(calls) == moment:
            raise KeyboardInterrupt
        return original(*arguments, **options)
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(target, name, stop_at_moment)
        train_tiny(folder)
    torch.manual_seed(99)
    if (folder / "last.pt").exists():
        main("--resume", folder)
    else:
        train_tiny(folder)
    assert_same_run(folder, straight)


def test_a_killed_process_resumes_as_if_never_killed(tmp_path, straight):
    script = f"""if True:
        import time, torch, train_toy
        torch.set_num_threads(1)
        record = train_toy.record
        train_toy.record = lambda run, *rest: (record(run, *rest), time.sleep(60 * (run.epoch == 2)))
        train_toy.main({[*SHAPES_RUN, '--output-dir', str(tmp_path / 'run')]!r})"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=FOLDER, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    process.kill()                                             # in the second epoch, by SIGKILL
    assert process.wait() == -9
    assert torch.load(tmp_path / "run/last.pt")["epoch"] == 1
    main("--resume", tmp_path / "run", "--workers", "1")
    assert_same_run(tmp_path / "run", straight)


def test_other_runs_are_neither_overwritten_nor_continued(tmp_path, capsys, straight):
    assert "holds another run: --resume" in refused(capsys, *SHAPES_RUN, "--output-dir", straight)
    assert "no run to continue" in refused(capsys, "--resume", tmp_path / "nowhere")
    state = torch.load(straight / "last.pt")
    for broken, message in ((state | {"names": {0: "cow"}}, "categories differ: the checkpoint has .*'cow'"),
                            (state["model"], "no run to continue: 'options'")):
        torch.save(broken, tmp_path / "last.pt")
        assert re.search(message, refused(capsys, "--resume", tmp_path))
    (tmp_path / "last.pt").write_bytes((straight / "last.pt").read_bytes()[:5000])
    assert re.search("no run to continue.*can't be read", refused(capsys, "--resume", tmp_path))


# ---- train_toy.py: checkpoints and predictions ---------------------------------------------------


def test_a_coco_run_ends_with_its_classes_and_advice_and_can_be_evaluated_and_predict(
        tmp_path, capsys, monkeypatch):
    metrics = train_toy.coco_metrics
    monkeypatch.setattr(train_toy, "coco_metrics", lambda *args: metrics(*args) | {"AP": 0.9})
    paths, last = tiny_coco(tmp_path / "data"), tmp_path / "run/last.pt"
    main("--coco-train", *paths, "--coco-val", *paths, "--image-size", 64, "--epochs", 1, "--num-queries", 6,
         "--workers", 0, "--batch-size", 2, "--output-dir", last.parent)
    table = r"cat +AP +\d+\.\d, 2 objects\ndog +AP +\d+\.\d, 1 objects"
    assert re.search(table + "\nAP is below 1. First see with --overfit 8", capsys.readouterr().out)
    main("--evaluate", last, "--workers", 0)
    shown = capsys.readouterr().out
    assert shown.count("Average Precision") == 6 and re.search(table, shown)
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((50, 70), dtype=np.uint8)).save(tmp_path / "in/gray.jpg")
    (tmp_path / "in/notes.txt").write_text("not an image")
    flags = "--output-dir", tmp_path / "out", "--threshold", 0, "--device", "cpu", "--predict", last
    with pytest.raises(SystemExit, match="^0$"):
        main(*flags, tmp_path / "in", f"{paths[0]}/5.png", tmp_path / "in/gray.jpg")
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").glob("*.png")}
    assert sizes == {"gray-1.png": (70, 50), "5.png": (80, 64), "gray-3.png": (70, 50)}
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [Path(row["file_name"]).name for row in results[::12]] == ["gray.jpg", "5.png", "gray.jpg"]
    assert len(results) == 3 * 6 * 2 and {row["category_id"] for row in results} == {3, 7}
    coco = pycocotools.coco.COCO()
    coco.dataset = {"images": [{"id": id} for id in (1, 2, 3)], "annotations": [],
                    "categories": [{"id": id} for id in (3, 7)]}
    coco.createIndex()
    assert len(coco.loadRes(str(tmp_path / "out/predictions.json")).getAnnIds()) == len(results)
    (tmp_path / "in/broken.png").write_bytes(b"this is no picture")
    assert refused(capsys, *flags, tmp_path / "in", tmp_path / "absent.png").startswith("1")
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())) == 6 * 2       # the readable one
    assert "--predict needs images" in refused(capsys, *flags)


def test_the_authors_file_evaluates_and_predicts_with_raw_category_ids(tmp_path, capsys):
    weights = blank_weights(encoder=1, decoder=2, queries=10, feed_forward=32)
    weights["class_embed.bias"] = torch.full((91,), -9.0)      # every query finds the same dog
    weights["class_embed.bias"][18] = 5.0
    box = torch.tensor([28 / 160, 14 / 80, 40 / 160, 20 / 80])
    weights["refpoint_embed.weight"] = dn_detr.inverse_sigmoid(box).repeat(10, 1)
    torch.save({"model": weights}, tmp_path / "official.pth")
    data, others = (write_coco(tmp_path / str(id), {1: (160, 80)}, [(1, id, [8, 4, 40, 20], {})], [(id, "x")])
                    for id in (18, 120))
    evaluation = "--evaluate", tmp_path / "official.pth", "--image-size", 64, "--workers", 0, "--coco-val"
    main(*evaluation, *data)
    assert capsys.readouterr().out.splitlines()[0].endswith("1.000")
    assert "no classes for the category ids [120]" in refused(capsys, *evaluation, *others)
    with pytest.raises(SystemExit, match="^0$"):
        main("--predict", tmp_path / "official.pth", data[0], "--image-size", 64, "--output-dir", tmp_path)
    best = json.loads((tmp_path / "predictions.json").read_text())[0]
    assert best["category_id"] == 18 and best["bbox"] == pytest.approx([8, 4, 40, 20], abs=0.1)


def test_a_checkpoint_of_other_classes_starts_only_those_anew_and_is_not_needed_to_resume(tmp_path, straight):
    old = train_toy.load_detector(straight / "last.pt")[0].state_dict()
    assert_close(train_toy.start_from(straight / "last.pt", 6, {}).state_dict(), old, rtol=0, atol=0)
    model = train_toy.start_from(straight / "last.pt", 3, {"dn_groups": 2})
    assert (model.config.num_classes, model.config.dn_groups) == (3, 2)
    new = model.state_dict()
    for name in ("class_head.weight", "class_head.bias", "label_embedding.weight"):
        # The last row of the label embedding is "unknown", which means the same.
        assert torch.equal(new.pop(name)[-1], old.pop(name)[-1]) == (name == "label_embedding.weight")
    assert_close(new, old, rtol=0, atol=0)
    shutil.copy(straight / "last.pt", tmp_path / "start.pt")
    train_tiny(tmp_path / "run", "--init", str(tmp_path / "start.pt"), "--epochs", "1")
    (tmp_path / "start.pt").unlink()
    main("--resume", tmp_path / "run")


def test_pretrained_weights_offline_give_a_clear_error(monkeypatch, tmp_path):
    def offline(*arguments, **options):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for backbone, message in (("resnet18", "can't be downloaded.*drop --pretrained-backbone.*no route"),
                              ("small", "needs a torchvision backbone")):
        with pytest.raises(ValueError, match=message):
            train_toy.load_imagenet(tiny_model(backbone=backbone))


def test_overfit_trains_and_evaluates_on_the_same_images_without_augmentation(tmp_path):
    for flags in (["--coco-train", *tiny_coco(tmp_path), "--image-size", "64"], []):
        train_set, val_set = train_toy.build_datasets(train_toy.parse_options([*flags, "--overfit", "2"]))
        assert len(val_set) == 2 and len(train_set) == 200
        assert torch.equal(train_set[3][0], val_set[1][0])
        first = [image for image, _ in val_set]
        for val_set.epoch in range(1, 6):
            assert all(torch.equal(image, again) for image, (again, _) in zip(first, val_set))


# ---- train_toy.py: options, experiments, processes -----------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--epochs 0", "--epochs is 0, it must be at least 1"),
    ("--lr nan", "--lr is nan"),
    ("--coco-train a b --coco-val a b --image-size 32", "--image-size is 32"),
    ("--coco-train a b", "needs --coco-train and --coco-val"),
    ("--compare --dn-groups 5", "--dn-groups has no effect"),
    ("--seeds 0 1 2 3 4", "--seeds has no effect"),
    ("--evaluate x.pt --epochs 3", "--epochs has no effect"),
    ("--init x.pt --model toy", "--model has no effect"),
    ("--threshold 0.3", "--threshold has no effect"),
    ("--overfit 8 --val-size 300", "--val-size has no effect"),
    ("--resume nowhere --seed 0", "--seed has no effect"),
    ("--device gpu9", "--device gpu9 can't be used"),
    ("--train-size 1 --dn-groups -1", "dn_groups is -1")])
def test_options_that_are_impossible_or_without_effect_are_refused(
        flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_toy, "train_one_epoch", lambda *_: pytest.fail("not refused"))
    assert message in refused(capsys, *flags.split())


def test_options_reach_the_model_and_the_rate_suits_it():
    for flags, lr in (("", 3e-3), ("--model paper", 1e-4), ("--init x.pt", 1e-4), ("--lr 1", 1)):
        assert train_toy.parse_options(flags.split()).lr == lr
    options = train_toy.parse_options("--dn-groups 2 --num-queries 9 --label-noise 0.1".split())
    config = train_toy.build_model(options, 6).config
    assert (config.dn_groups, config.num_queries, config.label_noise, config.hidden_dim) == (2, 9, 0.1, 64)
    model = train_toy.build_model(train_toy.parse_options(["--model", "paper", "--backbone", "resnet18"]), 6)
    assert model.config == DNDETRConfig(num_classes=6, backbone="resnet18", frozen_norm=False)


def test_mask_is_off_but_for_empty_slots_with_no_mask(tmp_path):
    options = train_toy.parse_options([*SHAPES_RUN, "--no-mask", "--output-dir", str(tmp_path)])
    run, *_ = train_toy.start_run(options, CPU)
    blocked = run.model.query_mask(assign_slots([1, 3], 2), 2).expand(2, 1, 8, 8)[:, 0]
    assert blocked.tolist() == [[[j in (1, 2, 4, 5) for j in range(8)]] * 8, [[False] * 8] * 8]


def test_an_experiment_runs_its_arms_once_and_compares_them_seed_by_seed(tmp_path, monkeypatch):
    main("--compare", "--seeds", 3, "--epochs", 1, "--train-size", 8, "--val-size", 4, "--jobs", 2,
         "--output-dir", tmp_path)
    runs = json.loads((tmp_path / "compare-normal.json").read_text())["runs"]
    (without,), (five,) = runs["without denoising"], runs["5 groups"]
    assert without[0]["loss_denoising"] == 0 < five[0]["loss_denoising"]
    assert (tmp_path / "compare-normal.png").exists()
    folder = tmp_path / "normal-anchors-5-groups-seed-3"
    state = torch.load(folder / "last.pt")
    assert (state["options"]["seed"], state["options"]["lr"]) == (3, train_toy.RATES["normal"][1])
    with monkeypatch.context() as patched:
        patched.setattr(train_toy, "train", lambda *_: pytest.fail("ran again"))
        assert train_toy.run_quietly(state["options"], CPU) == five
        with pytest.raises(ValueError, match="other options"):
            train_toy.run_quietly(state["options"] | {"lr": 0.5}, CPU)
    torch.save(state | {"epoch": 0}, folder / "last.pt")       # as if stopped in its only epoch
    assert len(train_toy.run_quietly(state["options"], CPU)) == 2


def test_arms_are_compared_with_the_baseline_of_the_same_seed(capsys):
    def history(*precisions):
        return [{"epoch": e, "step": 10 * e, "seconds": 2.0 * e, "AP": ap, "AP50": ap + 1}
                for e, ap in enumerate(precisions, 1)]
    runs = {"without denoising": [history(5, 20, 30), history(5, 20, 40), history(1, 2, 3)],
            "5 groups": [history(10, 40, 50), history(10, 30, 50), history(10, 20, 40)]}
    train_toy.print_table(runs, [4, 5, 6])
    everything, without_failed = capsys.readouterr().out.split("seeds [4, 5]")
    assert "| 5 groups | 50.0 (40.0 to 50.0) | 51.0 (41.0 to 51.0) | 22.3 ± 33.9 |" in everything
    assert "| 22.3 ± 33.9 | 2.0 ± 2.5 | 20.0 ± 24.8 | 4.0 ± 5.0 |" in everything
    assert "| 50.0 (50.0 to 50.0) | 51.0 (51.0 to 51.0) | 15.0 ± 63.5 | 2.5 ± 6.4 |" in without_failed
    train_toy.print_table({"without denoising": [history(0)], "5 groups": [history(1)]}, [4])
    assert "seeds []" not in capsys.readouterr().out           # of which there would be nothing to print


def process_half_of_a_batch(rank, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    device = train_toy.pick_device("cpu")
    images, targets, config = torch.load(folder / "batch.pt", weights_only=False)
    torch.manual_seed(0)
    model, part, seeds = DNDETR(config), slice(2 * rank, 2 * rank + 2), []
    parallel = train_toy.parallel(model, device)               # gradients are not shared once it is gone
    loss = DNDETRCriterion(config)(parallel(images[part], None, targets[part]), targets[part])["loss"]
    loss.backward()
    dataset, items = train_toy.ShapesDataset(8, 0, "train", augment=True), {}
    for images, _, targets in train_toy.train_batches(dataset, 4, seed=0, epoch=1):
        items |= {target["image_id"]: image for image, target in zip(images, targets)}
    epoch = train_toy.train_one_epoch
    train_toy.train_one_epoch = lambda *arguments: seeds.append(torch.initial_seed()) or epoch(*arguments)
    history = train_tiny(folder / "run")
    gathered = train_toy.gather((loss.item(), items, seeds))
    if rank == 0:
        gradients = {name: p.grad for name, p in model.named_parameters()}
        torch.save([gathered, gradients, history], folder / "result.pt")


def test_two_processes_are_like_one_but_draw_random_numbers_of_their_own(tmp_path):
    config = tiny_config(backbone="resnet18", **NO_NOISE)      # live statistics are not shared
    images, targets = torch.randn(4, 3, 64, 64), random_targets(3, 1, 0, 2)
    torch.save((images, targets, config), tmp_path / "batch.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process_half_of_a_batch, (tmp_path, port), nprocs=2)
    gathered, gradients, history = torch.load(tmp_path / "result.pt")
    losses, items, seeds = zip(*gathered)
    torch.manual_seed(0)
    model = DNDETR(config)
    loss = DNDETRCriterion(config)(model(images, None, targets), targets)["loss"]
    loss.backward()
    assert np.mean(losses) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(gradients, expected, rtol=1e-3, atol=1e-4)
    dataset = train_toy.ShapesDataset(8, 0, "train", augment=True)
    dataset.epoch = 1
    assert len(items[0]) == len(items[1]) == 4, "each image goes to one process"
    for index, image in (items[0] | items[1]).items():
        assert torch.equal(image, dataset[index][0]), "augmentation does not depend on the process"
    assert len({*items[0], *items[1]}) == 8 and len({*seeds[0], *seeds[1]}) == 4
    assert [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == history


# ---- README and notebook -------------------------------------------------------------------------


def test_readme_is_short_its_links_lead_somewhere_and_its_commands_are_accepted(monkeypatch):
    assert len(README.read_text().splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#]+)", README.read_text()):
        assert re.match("https?:", link) or (FOLDER / link).exists(), link
    monkeypatch.setattr(dn_detr, "read_checkpoint", lambda path: {"options": {}})       # for --resume
    blocks = re.findall(r"```(\w*)\n(.*?)```", README.read_text(), re.DOTALL)
    shell = [block for language, block in blocks if language != "python"]
    text = re.sub(r"\\\n *", "", "\n".join([*shell, train_toy.__doc__]))
    commands = re.findall(r"(?:python|torchrun.*) train_toy\.py(.*)", text)
    assert len(commands) >= 10
    for command in commands:
        flags = re.split(r" {3,}|&|\.\.\.", command)[0]              # without the remark after it
        train_toy.parse_options(shlex.split(flags, comments=True))


def test_readme_snippets_run():
    targets = random_targets(1, 3)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert any("assign_slots" in snippet for snippet in snippets)
    for snippet in snippets:
        given = {name: torch.cat([target[name] for target in targets]) for name in ("labels", "boxes")}
        given |= {"targets": targets, "num_classes": CLASSES, "num_queries": 7, "width": 32}
        names = vars(dn_detr) | given | {"label_embedding": nn.Embedding(CLASSES + 1, 32)}
        exec(snippet, names)
        if "blocked" in names:
            assert torch.equal(names["blocked"], dn_detr.dn_attention_mask(5, 3, 7))


def test_notebook_is_short_and_stored_as_executed_from_top_to_bottom_without_errors():
    assert (FOLDER / "walkthrough.ipynb").stat().st_size < 1_000_000
    cells = json.loads((FOLDER / "walkthrough.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 66 and max(len("".join(cell["source"]).splitlines()) for cell in code) <= 20
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell["outputs"]):
        text = "".join(output.get("data", {}).get("text/plain", ""))
        assert output["output_type"] != "error" and not text.startswith("<Figure size")


def test_notebook_runs_from_top_to_bottom_and_changes_no_asset(monkeypatch, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("DN_DETR_FAST", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for name in ("dn_detr.py", "train_toy.py", "walkthrough.ipynb"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copytree(FOLDER / "assets", tmp_path / "assets")
    notebook = nbformat.read(tmp_path / "walkthrough.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, after = ({path.name: path.read_bytes() for path in (folder / "assets").iterdir()}
                     for folder in (FOLDER, tmp_path))
    assert before == after
