"""Tests, on a CPU, without network and without data.

    pytest                                      everything, in 1 to 2 minutes on two cores
    pytest -k "mask_shape or noise_bounds"      the first two tests below

They show how mask shape and noise bounds are checked. Then follow dn_detr.py in its own order, what it
refuses, train_toy.py, and README and notebook. A test is named after the property it protects. Results are
compared, number by number, with a naive loop, a case worked by hand, another library, or what the authors'
code computes.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torchvision.models import get_model
from torchvision.ops import box_convert, generalized_box_iou

import dn_detr
import train_toy
from dn_detr import DNDETR, DNDETRConfig, assign_slots, noise_boxes, noise_labels, training_loss


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

FOLDER = Path(dn_detr.__file__).parent
CPU = torch.device("cpu")
CLASSES = 5
TINY = dict(num_classes=CLASSES, num_queries=7, hidden_dim=32, num_heads=4, num_encoder_layers=1, dn_groups=2,
            num_decoder_layers=2, dim_feedforward=48, backbone="small", small_widths=(8, 16, 32))
NO_NOISE = dict(label_noise=0, center_noise=0, size_noise=0)


@pytest.fixture(autouse=True)
def same_seed_one_thread_and_no_progress_bars(monkeypatch):
    torch.manual_seed(0)
    torch.set_num_threads(1)            # several are slower on tensors as small as these
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
    return training_loss(run(model, images, targets), targets, model.config)


def random_predictions(layers=2, images=2, queries=4, seed=0):
    """-> logits [L, B, N, C], boxes [L, B, N, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(layers, images, queries, CLASSES, generator=generator),
            torch.rand(layers, images, queries, 4, generator=generator) * 0.3 + 0.2)


def as_outputs(logits, boxes, **more):
    return more | dict(pred_logits=logits[-1], all_logits=logits, pred_boxes=boxes[-1], all_boxes=boxes)


def assert_near(actual, expected, atol=1e-5, rtol=1e-4):
    assert_close(actual, torch.as_tensor(expected), atol=atol, rtol=rtol)


def spy(monkeypatch, owner, name, watch):
    """Call `watch` with the arguments of a function, whenever it is called."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **how: (watch(*args, **how), original(*args, **how))[1])


# ---- Sections 1 and 3: noise ---------------------------------------------------------------------

def test_copies_to_a_device_are_asynchronous_only_on_cuda():
    tensor = types.SimpleNamespace(to=lambda device, non_blocking: non_blocking)
    assert all(dn_detr.to_device(tensor, device) for device in ("cuda", "cuda:1", torch.device("cuda")))
    assert not any(dn_detr.to_device(tensor, device) for device in ("mps", "cpu", CPU, None))


@pytest.mark.parametrize("center_noise, size_noise", [(0.4, 0.2), (0.1, 0.9), (1.0, 1.0)])
def test_box_noise_is_uniform_independent_and_in_zero_to_one(center_noise, size_noise):
    box = torch.tensor([0.5, 0.45, 0.4, 0.2])                  # wide, far from every border
    noised = noise_boxes(box.expand(20000, 4), center_noise, size_noise)
    reaches = 0.2 * center_noise, 0.1 * center_noise, 0.4 * size_noise, 0.2 * size_noise
    for values, middle, reach in zip(noised.T, box, reaches):  # spread evenly, from end to end
        expected = torch.linspace(-reach, reach, 20000)
        assert_near(values.sort().values - middle, expected, atol=4 / math.sqrt(20000) * reach, rtol=0)
    assert_near(torch.corrcoef(noised.T), torch.eye(4), atol=0.03)
    at_border = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.049, 0.951, 0.1, 0.1]]).repeat(500, 1)
    noised = noise_boxes(at_border, 1.0, 1.0)
    assert noised.min() == 0 and noised.max() == 1
    assert noise_boxes(at_border.half(), 1.0, 1.0).dtype == torch.half


def test_label_noise_redraws_at_its_rate_from_all_classes():
    for num_classes, rate in ((1, 0.2), (2, 0.2), (5, 1.0), (91, 0.2), (5, 0.0)):
        noised = noise_labels(torch.zeros(100000, dtype=torch.long), num_classes, rate)
        shares = torch.full((num_classes,), rate / num_classes)            # longer with "unknown"
        shares[0] += 1 - rate
        assert_near(noised.bincount(minlength=num_classes) / 100000, shares, atol=0.007 * (rate > 0))


def test_noise_draws_from_its_generator_alone():
    boxes, labels, state = torch.rand(20, 4), torch.arange(20), torch.get_rng_state()
    first, again, other = (
        [noise_boxes(boxes, 0.4, 0.4, generator), noise_labels(labels, 91, 0.5, generator)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2)))
    assert all(torch.equal(*x) for x in zip(first, again)) and torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(*x) for x in zip(first, other))


# ---- Section 4: groups, slots, denoising queries -------------------------------------------------

@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [2, 4], [3, 0, 1, 4], [0, 4, 0, 2, 2]], ids=str)
def test_slots_are_those_of_a_naive_loop_within_the_budget(counts):
    size, first = max(counts), [0, *itertools.accumulate(counts)]
    for groups, budget, expected in ((0, 0, 0), (0, 7, 0), (2, 0, 2), (5, 0, 5), (5, 100, 5), (5, 20, 5),
                                     (5, 19, 4), (5, 8, 2), (5, 7, 1), (5, 1, 1)):
        slots, expected = assign_slots(counts, groups, budget), expected if size else groups
        copies = {(image, group * size + index, first[image] + index) for image, count in enumerate(counts)
                  for group in range(expected) for index in range(count)}
        assert {*zip(slots.image.tolist(), slots.slot.tolist(), slots.source.tolist())} == copies
        assert slots.is_real.tolist() == [[slot % size < count for slot in range(expected * size)]
                                          for count in counts]
        assert (slots.num_groups, slots.group_size) == (expected, size) and len(slots.slot) == len(copies)


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


def test_each_noise_acts_on_its_own_part_and_anew_on_every_copy():
    targets, rows = random_targets(300), []
    for name in ("label_noise", "center_noise", "size_noise"):
        model = tiny_model(**NO_NOISE | {name: 0.5})
        _, content, anchor_logits = dn_detr.denoising_queries(targets, model.label_embedding, model.config)
        assert not all(torch.equal(*x[0].split(300)) for x in (content, anchor_logits))
        rows_of = torch.cdist(content[0, :, :-1], model.label_embedding.weight).argmin(-1)
        is_other = rows_of[:300] != targets[0]["labels"]
        assert {*rows_of.tolist()} == {*range(CLASSES)}, "never the row of matching queries"
        change = (anchor_logits[0, :300].sigmoid() - targets[0]["boxes"]).abs()
        rows.append([is_other.float().mean(), change[:, :2].max(), change[:, 2:].max()])
    assert torch.equal(torch.tensor(rows) > 1e-4, torch.eye(3, dtype=torch.bool))
    assert_close(targets, random_targets(300), rtol=0, atol=0)


# ---- Section 5: attention mask, and no leak ------------------------------------------------------

def test_mask_is_equation_7():
    for groups, size, matching in itertools.product((0, 1, 2, 5), (0, 1, 4), (1, 3)):
        denoising, total = groups * size, groups * size + matching
        expected = [[j < denoising and (i >= denoising or i // size != j // size) for j in range(total)]
                    for i in range(total)]
        assert dn_detr.dn_attention_mask(groups, size, matching).tolist() == expected


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
    loss = training_loss(outputs, targets, model.config)["loss"]
    for gradient in torch.autograd.grad(loss, leaves):
        assert torch.equal(gradient.any(-1), outputs["dn_slots"].is_real)


# ---- Sections 6 to 9: positions, backbone, layers ------------------------------------------------

def naive_sine(coordinate, width, temperature, frequency):
    factors = [2 * math.pi * frequency / temperature ** (2 * i / width) for i in range(width // 2)]
    return [f(factor * coordinate) for factor in factors for f in (math.sin, math.cos)]


def test_positions_are_sines_of_their_temperature_and_frequency():
    model = patch_model(image_temperature=9.0, anchor_temperature=7.0, position_frequency=3.0)
    _, positions, _ = model.encode_image(random_images(1, 16, 16), None)
    assert_near(positions[0], [naive_sine(y, 16, 9, 3) + naive_sine(x, 16, 9, 3)
                               for y in (0.5, 1.0) for x in (0.5, 1.0)], atol=1e-4)
    anchors, content = torch.rand(1, 1, 4) * 0.5 + 0.2, torch.randn(1, 1, 32)
    cx, cy, w, h = anchors.flatten().tolist()
    sine = torch.tensor([naive_sine(x, 16, 7, 3) for x in (cy, cx, w, h)])
    position, query_sine = model.decoder.encode_anchors(anchors, content, is_first=True)
    assert_near(position.flatten(), model.decoder.anchor_mlp(sine.flatten()))
    w_ref, h_ref = model.decoder.reference_size(content).sigmoid().flatten()
    assert_near(query_sine.flatten(), torch.cat([sine[0] * h_ref / h, sine[1] * w_ref / w]))


def test_cell_coordinates_end_at_the_image_not_at_the_padding():
    padding = torch.ones(1, 4, 4, dtype=torch.bool)
    padding[0, :2, :3] = False
    for centers, shift in ((False, 0), (True, 0.5)):
        expected = [[((y - shift) / 2, (x - shift) / 3) for x in (1, 2, 3)] for y in (1, 2)]
        assert_near(dn_detr.cell_coordinates(padding, centers)[0, :2, :3], expected)


def test_mask_of_padding_hides_the_cells_that_start_in_padding():
    mask = torch.ones(1, 40, 48, dtype=torch.bool)
    mask[:, :28, :33] = False                                  # 3.5 and 4.1 cells of 8 pixels
    _, _, token_padding = patch_model().encode_image(random_images(1, 40, 48), mask)
    assert token_padding.view(5, 6).tolist() == [[y > 3 or x > 4 for x in range(6)] for y in range(5)]


def test_backbones_have_channels_stride_and_dilation():
    for options, shape, dilated in ((dict(backbone="small", small_widths=(8, 32, 24)), (1, 24, 8, 16), 0),
                                    (dict(backbone="resnet50", dilation=True), (1, 2048, 4, 8), 2)):
        backbone, channels = dn_detr.build_backbone(DNDETRConfig(**options))
        assert backbone.eval()(random_images(1, 64, 128)).shape == shape and channels == shape[1]
        convolutions = [module for module in backbone[-1].modules() if isinstance(module, nn.Conv2d)]
        assert [each.dilation for each in convolutions].count((2, 2)) == dilated       # of the last stage
    for frozen, count in ((True, 2), (False, 0)):              # the stem and layer 1
        backbone, _ = dn_detr.build_backbone(DNDETRConfig(backbone="resnet18", frozen_norm=frozen))
        parts = [[p.requires_grad for p in part.parameters()] for part in backbone]
        assert [any(part) for part in parts if part].count(False) == count
        assert any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules()) != frozen


def test_dropout_acts_everywhere_in_training_and_nowhere_else():
    x = torch.randn(1, 6, 32)
    for kind, more, inputs in ((dn_detr.EncoderLayer, (), (x, x, None)),
                               (dn_detr.DecoderLayer, (True,), (x, x, x, x, x, None, None))):
        layer, plain = (kind(tiny_config(dropout=p), *more) for p in (1 - 1e-9, 0))    # the first drops all
        plain.load_state_dict(layer.state_dict())
        left, seen = layer.norm2(layer.norm1(x)), []
        assert_close(layer.eval()(*inputs), plain(*inputs))
        attentions = [part.out_proj for part in layer.children() if isinstance(part, dn_detr.Attention)]
        for part in (layer.linear2, *attentions):
            part.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].any().item()))
        assert torch.equal(layer.train()(*inputs), layer.norm3(left) if more else left)
        assert seen == [False] * len(seen) and layer.self_attn.dropout == 1 - 1e-9


# ---- Sections 2 and 10: the model ----------------------------------------------------------------

def test_weights_start_as_the_authors_do():
    model = DNDETR(tiny_config(num_queries=300))
    assert 0.9 < model.anchor_logits.weight.std() < 1.1
    for name, weight in [*model.encoder.named_parameters(), *model.decoder.named_parameters()]:
        if weight.dim() > 1 and weight.numel() > 500:         # Xavier: uniform within +- sqrt(6 / (in + out))
            assert 0.97 < weight.abs().max() / math.sqrt(6 / sum(weight.shape)) <= 1, name
    assert_near(model.class_head.bias.sigmoid(), [0.01] * CLASSES)
    boxes = model.eval()(random_images())["all_boxes"]
    assert_near(boxes, model.anchor_logits.weight.sigmoid().expand_as(boxes))


def test_a_matching_query_is_unknown_and_a_zero_and_its_anchor():
    model = tiny_model(num_patterns=3)
    content, anchor_logits = model.matching_queries(2)
    unknown = torch.cat([model.label_embedding.weight[CLASSES], torch.zeros(1)])
    for image, pattern, query in itertools.product(range(2), range(3), range(7)):    # all anchors per pattern
        assert torch.equal(content[image, pattern * 7 + query], unknown + model.patterns.weight[pattern])
        assert torch.equal(anchor_logits[image, pattern * 7 + query], model.anchor_logits.weight[query])


def test_denoising_runs_in_training_with_targets_only():
    model, images, targets = tiny_model(dn_max_queries=3), random_images(), random_targets(1, 2)
    plain = {"pred_logits", "pred_boxes", "all_logits", "all_boxes"}
    outputs = model(images, targets=targets)
    assert outputs.keys() == plain | {"dn_logits", "dn_boxes", "dn_slots"}
    assert outputs["dn_slots"].num_groups == 1, "two groups of two exceed the limit"
    assert (outputs["dn_boxes"].shape[2], outputs["all_boxes"].shape[2]) == (2, 7)
    assert model(images).keys() == tiny_model(dn_groups=0)(images, targets=targets).keys() == plain
    model.eval()
    assert_close(model(images, targets=targets), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("counts, options", [
    ((1, 3), dict(hidden_dim=24, num_heads=3, dn_groups=0)), ((0, 2), dict(num_patterns=2, dn_groups=1)),
    ((1, 3), dict(num_encoder_layers=0, num_decoder_layers=3)), ((0, 0), dict()),
    ((1, 3), dict(activation="relu", small_widths=(8,), num_decoder_layers=1)),
    ((12, 1), dict(activation="gelu", dropout=0.1)),
    ((1, 3), dict(label_noise=1.0, num_classes=1))], ids=str)
def test_every_parameter_gets_a_gradient_whatever_the_choice(counts, options):
    model, targets = tiny_model(**options), random_targets(*counts)
    targets = [{"labels": target["labels"].clamp(max=model.config.num_classes - 1),
                "boxes": target["boxes"].double()} for target in targets]
    losses = losses_of(model, random_images(), targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values()) and losses["loss_ce"] > 0
    assert {value.dtype for value in losses.values()} == {torch.float32}, "whatever the boxes are"
    if counts == (0, 0):                                       # everything learns to say no
        assert losses["loss"] == losses["loss_matching"] > losses["loss_ce"] and losses["loss_bbox"] == 0
    else:
        unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        # The first decoder layer has no use for position_scale, which is in the authors' weights even so.
        assert all("decoder.position_scale" in name for name in unused)
        assert not unused or model.config.num_decoder_layers == 1


def test_boxes_and_losses_are_float32_under_autocast():
    model, images, targets = patch_model(**NO_NOISE), random_images(), random_targets(1, 3)
    expected = losses_of(model, images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model, images, targets)
    assert {outputs[name].dtype for name in outputs if name != "dn_slots"} == {torch.float32}
    assert_close(training_loss(outputs, targets, model.config), expected, rtol=0.05, atol=0.02)


# ---- Sections 11 and 12: matching and loss -------------------------------------------------------

def naive_focal(logits, is_object, config):
    p, alpha, gamma = logits.sigmoid(), config.focal_alpha, config.focal_gamma
    return -alpha * (1 - p) ** gamma * p.log() if is_object else -(1 - alpha) * p ** gamma * (1 - p).log()


def naive_l1_and_giou(boxes, truth):
    return torch.cdist(boxes, truth, p=1), generalized_box_iou(
        *(box_convert(x, "cxcywh", "xyxy") for x in (boxes, truth)))


def cheapest_assignment(logits, boxes, target, config):
    """{query: object} of one image, logits [N, C] and boxes [N, 4], and what each pair costs."""
    logits, (l1, giou) = logits[:, target["labels"]], naive_l1_and_giou(boxes, target["boxes"])
    focal = naive_focal(logits, True, config) - naive_focal(logits, False, config)
    cost = config.cost_class * focal + config.cost_box * l1 - config.cost_giou * giou
    return dict(zip(*(x.tolist() for x in linear_sum_assignment(cost)))), cost


def unusual_config():
    return tiny_config(cost_class=1.5, cost_box=0.7, cost_giou=3.0, loss_class=0.3, loss_box=2.5,
                       loss_giou=1.7, focal_alpha=0.4, focal_gamma=1.5)


def test_matching_is_the_cheapest_of_all_assignments():
    config = unusual_config()
    targets, first = random_targets(6, 3, 0, 1, 4), [0, 6, 9, 9, 10]   # the first: more objects than queries
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
    sure = dn_detr.match(logits.sign() * 200, boxes, targets, config)         # probabilities of 0 and 1
    assert [index.shape for index in sure] == [(2, 13)] * 3
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
                l1, giou = naive_l1_and_giou(boxes[image, query][None], target["boxes"][k][None])
                sums[1:] += l1.item(), 1 - giou.item()
    return sums / normalizer


def test_every_loss_term_is_that_of_a_naive_loop():
    config = unusual_config()
    targets, slots = random_targets(3, 1), assign_slots([3, 1], 2)
    logits, boxes = random_predictions(layers=3, queries=2)    # fewer than objects in the first image
    copies = [x.requires_grad_() for x in random_predictions(layers=3, queries=6, seed=1)]
    outputs = as_outputs(logits, boxes, dn_logits=copies[0], dn_boxes=copies[1], dn_slots=slots)
    losses = training_loss(outputs, targets, config)
    for gradient in torch.autograd.grad(losses["loss"], copies):           # empty slots learn nothing
        assert torch.equal(gradient.any(-1), slots.is_real.expand(3, -1, -1))
    dn_owners = [{group * 3 + k: k for group in range(2) for k in range(3)}, {0: 0, 3: 0}]
    expected = dict(loss=0, loss_matching=0, loss_denoising=0)
    for layer in range(3):                                     # the terms are those of the last one
        owners = [dict.fromkeys(range(2)) | cheapest_assignment(*image, config)[0]
                  for image in zip(logits[layer], boxes[layer], targets)]
        matching = naive_set_loss(logits[layer], boxes[layer], owners, targets, 4, config)
        denoising = naive_set_loss(*(x[layer].detach() for x in copies), dn_owners, targets, 4 * 2, config)
        for part, prefix, terms in (("matching", "", matching), ("denoising", "dn_", denoising)):
            total = terms @ [config.loss_class, config.loss_box, config.loss_giou]
            expected["loss"] += total
            expected[f"loss_{part}"] += total
            expected |= {f"{prefix}loss_{name}": term for name, term in zip(("ce", "bbox", "giou"), terms)}
    losses = {name: loss.item() for name, loss in losses.items()}
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_order_of_objects_does_not_matter_without_noise():
    model, images, targets = tiny_model(**NO_NOISE), random_images(), random_targets(2, 4)
    flipped = [{name: values.flip(0) for name, values in target.items()} for target in targets]
    assert_close(losses_of(model, images, flipped), losses_of(model, images, targets))


def test_training_learns_two_images_by_heart():
    model, images, targets, history = tiny_model(), random_images(), random_targets(1, 3), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        losses = training_loss(model(images, targets=targets), targets, model.config)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append(torch.stack([losses["loss_matching"], losses["loss_denoising"]]).detach())
    assert (history[-1] < 0.6 * history[0]).all()


def test_giou_of_tiny_boxes_has_the_authors_epsilon():
    side = torch.tensor([0.5, 0.5, 0.001, 0.001])              # its area is as large as epsilon
    assert_near(dn_detr.generalized_iou(side, side), 0.5)
    assert_near(dn_detr.generalized_iou(side, side + torch.tensor([0.002, 0, 0, 0])), 0 - 1e-6 / 4e-6)


def pretend_two_processes(monkeypatch, all_reduce):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)


@pytest.mark.parametrize("here, elsewhere, normalizer", [(4, 6, 5), (0, 4, 2), (0, 1, 1), (1, 0, 1)])
def test_the_normalizer_is_averaged_over_processes(monkeypatch, here, elsewhere, normalizer):
    targets, config, slots = random_targets(here), tiny_config(), assign_slots([here], 1)
    (logits, boxes), (dn_logits, dn_boxes) = (random_predictions(1, 1, queries) for queries in (6, here))
    outputs = as_outputs(logits, boxes, dn_logits=dn_logits, dn_boxes=dn_boxes, dn_slots=slots)
    alone = training_loss(outputs, targets, config)
    pretend_two_processes(monkeypatch, lambda tensor: tensor.add_(elsewhere))
    shared = training_loss(outputs, targets, config)
    for name in ("loss_ce", "dn_loss_ce"):                     # at least 1, after averaging
        assert_close(shared[name] * normalizer, alone[name] * max(here, 1))


# ---- Section 13: predictions, instability; devices -----------------------------------------------

def test_postprocess_by_hand():
    logits = torch.tensor([[[2.0, -1.0, -9.0], [0.0, 1.0, -9.0]],               # [B, N = 2, C = 3]
                           [[-3.0, -9.0, -2.0], [-9.0, -9.0, 4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]],
                          [[0.1, 0.2, 0.2, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    a, b = [80.0, 30.0, 120.0, 70.0], [0.0, 50.0, 100.0, 100.0]
    c, d = [0.0, 0.0, 2.0, 4.0], [0.0, 0.0, 10.0, 10.0]
    expected = ([2.0, 1.0, 0.0], [0, 1, 0], [a, b, b]), ([4.0, -2.0, -3.0], [2, 2, 0], [d, c, c])
    results = dn_detr.postprocess(as_outputs(logits[None], boxes[None]), [(100, 200), (10, 10)], num_select=3)
    for result, (scores, labels, boxes) in zip(results, expected, strict=True):
        assert_near(result["scores"], torch.tensor(scores).sigmoid())
        assert_near(result["boxes"], boxes)
        assert result["labels"].tolist() == labels
    for queries, selected in ((7, 35), (70, 300)):             # of 5 classes
        outputs = as_outputs(*random_predictions(queries=queries))
        assert [len(each["scores"]) for each in dn_detr.postprocess(outputs, [(9, 9)] * 2)] == [selected] * 2
    with pytest.raises(RuntimeError, match="shape"):           # one size for two images
        dn_detr.postprocess(outputs, [(9, 9)])


def test_matching_instability_by_hand():
    before = torch.tensor([[0, -1, 1, -1]])
    for current, changes in (([-1, 0, 1, -1], 2), ([1, -1, 0, -1], 2), ([0, -1, -1, -1], 1)):
        # An object moved, two were swapped, one was lost.
        assert dn_detr.matching_instability(before, torch.tensor([current])) == changes
    both = torch.tensor([[-1, 0, 1, -1], [0, -1, -1, -1]])     # the mean over the images
    assert dn_detr.matching_instability(before.expand(2, -1), both) == 1.5


def test_no_tensor_is_on_the_wrong_device(monkeypatch):
    """On fake tensors, which have a shape, a type and a device, but no values: no GPU is needed."""
    try:
        with FakeTensorMode():
            torch.zeros(1).to("cuda")
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"torch 2.4 and builds without CUDA have no fake GPU: {error}")
    targets, slots, summed = random_targets(1, 3), assign_slots([1, 3], 2), []
    # What reads values is replaced.
    monkeypatch.setattr(dn_detr, "assign_slots", lambda counts, groups, limit, device: dn_detr.DenoisingSlots(
        *slots[:2], *(tensor.to(device) for tensor in slots[2:])))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda cost: np.zeros(cost.shape) if cost.is_cpu else None)
    monkeypatch.setattr(dn_detr, "check_targets", lambda *arguments: None)
    pretend_two_processes(monkeypatch, summed.append)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = DNDETR(tiny_config(num_patterns=2))
        padding = torch.zeros(2, 32, 32, dtype=torch.bool)
        images, mask = train_toy.normalize(torch.zeros(2, 3, 32, 32), padding, torch.device("cuda"))
        outputs = model(images, mask, targets)
        losses = training_loss(outputs, targets, model.config)
        results = dn_detr.postprocess(outputs, [(32, 24), (16, 32)])
        assert dn_detr.matched_objects(outputs, targets, model.config).device.type == "cpu"
    found = *summed, *losses.values(), *(x for result in results for x in result.values())
    assert len(summed) == 2 and {x.device.type for x in found} == {"cuda"}
    assert {x.device.type for x in assign_slots([1, 3], 2, device="meta")[2:]} == {"meta"}


# ---- Section 15: the authors' weights and numbers; the tour --------------------------------------

@functools.lru_cache
def authors():
    """Names and shapes of their R50 file ("r50"), and of the small model ("r18": ResNet-18, 2 + 3 layers, 12
    queries, 2 groups) that their code computed the other numbers with."""
    return json.loads((FOLDER / "assets/authors.json").read_text(encoding="utf-8"))


R18_ARGS = dict(enc_layers=2, dec_layers=3, num_queries=12, dim_feedforward=64, backbone="resnet18")
R18 = dict(zip(("num_encoder_layers", "num_decoder_layers", *list(R18_ARGS)[2:]), R18_ARGS.values()))


def blank_weights(kind="r18"):
    """Their state dict, of zeros that take no memory."""
    return {name: torch.zeros(()).expand(shape) for name, shape in authors()[kind].items()}


def golden_weights():
    """Every number from a frozen random stream."""
    random, weights = np.random.RandomState(7), {}
    for name, shape in sorted(authors()["r18"].items()):
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
    """-> images, padding mask, targets of "golden"."""
    random, targets = np.random.RandomState(8), []
    images, padding = torch.zeros(2, 3, 128, 128), torch.ones(2, 128, 128, dtype=torch.bool)
    for index, (height, width) in enumerate(((96, 128), (128, 96))):
        images[index, :, :height, :width] = torch.tensor(random.uniform(-2, 2, (3, height, width)))
        padding[index, :height, :width] = False
    for _ in range(2):
        boxes = np.concatenate([random.uniform(0.3, 0.7, (3, 2)), random.uniform(0.1, 0.4, (3, 2))], axis=1)
        labels = random.randint(0, 91, 3)
        targets.append({"labels": torch.tensor(labels), "boxes": torch.tensor(boxes).float()})
    return images, padding, targets


def test_outputs_losses_gradient_and_matching_are_the_authors():
    model = dn_detr.load_official(golden_weights(), dn_groups=2, **R18, **NO_NOISE)
    (images, padding, targets), golden, config = golden_batch(), authors()["golden"], model.config
    with torch.no_grad():
        outputs = model.eval()(images, padding)
    assert_near(outputs["pred_logits"][:, 0, :4], golden["pred_logits"])
    assert_near(outputs["pred_boxes"][:, 0], golden["pred_boxes"])
    outputs = model.train()(images, padding, targets)
    losses = training_loss(outputs, targets, config)
    losses["loss"].backward()
    found = {name: losses[name].item() for name in golden["losses"]}
    assert found == pytest.approx(golden["losses"], rel=1e-4)
    gradients = [p.grad.norm() for p in model.parameters() if p.requires_grad]
    assert torch.stack(gradients).norm().item() == pytest.approx(golden["gradient_norm"], rel=1e-4)
    assert dn_detr.matched_objects(outputs, targets, config).tolist() == golden["matched"]
    assert (config.cost_class, config.cost_box, config.cost_giou) == (2, 5, 2)


@pytest.mark.parametrize("kind, args, expected", [
    ("r50", dict(hidden_dim=256, nheads=8, dropout=0.0, transformer_activation="prelu", dilation=True,
                 scalar=5, lr=1e-4, label_noise_scale=0.2, box_noise_scale=0.4, num_patterns=0),
     dict(dilation=True)),
    ("r18", R18_ARGS | dict(nheads=4, dropout=0.1, transformer_activation="gelu", scalar=0, num_patterns=3,
                            label_noise_scale=0.5, box_noise_scale=0.0),
     R18 | dict(num_heads=4, dropout=0.1, activation="gelu", dn_groups=0, num_patterns=3, label_noise=0.5,
                center_noise=0.0, size_noise=0.0))])
def test_authors_files_give_sizes_options_and_overrides(tmp_path, kind, args, expected):
    weights = {f"module.{name}": tensor for name, tensor in blank_weights(kind).items()}
    if kind == "r18":                                          # gelu has no slopes
        weights = {name: tensor for name, tensor in weights.items() if "activation" not in name}
        weights["module.transformer.patterns.weight"] = torch.zeros(3, 256)
    content = {"model": weights, "args": argparse.Namespace(**args), "epoch": 49}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert dn_detr.load_official(tmp_path / "checkpoint.pth").config == DNDETRConfig(**expected)
    overrides = dict(num_heads=2, dn_groups=0, dropout=0.2)
    for given in (content, content | {"args": args}):          # options as a dict, too
        assert dn_detr.load_official(given, **overrides).config == DNDETRConfig(**expected | overrides)


@pytest.mark.parametrize("lost, added, message", [
    ("transformer.decoder.norm.weight", {"extra.weight": torch.zeros(256)}, "(?s)decoder.norm.weight.*extra"),
    ("input_proj.bias", {"input_proj.bias": torch.zeros(3)}, r"(?s)input_projection.bias.*\[3\].*\[256\]"),
    ("class_embed.weight", {}, "not a DN-DETR checkpoint.*class_head.weight"), (None, {7: 8}, "not a DN-")])
def test_weights_that_are_not_the_authors_are_named(lost, added, message):
    weights = blank_weights()
    weights.pop(lost, None)
    with pytest.raises(ValueError, match=message):
        dn_detr.load_official(weights | added, **R18)


def test_the_tour_prints_noise_mask_shapes_and_losses(capsys):
    runpy.run_path(str(FOLDER / "dn_detr.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "dn_boxes [L, B, P*M, 4] = [2, 2, 4, 4]" in shown and "[1, 1, 1, 1, 0, 0, 0]]" in shown
    assert re.search("'loss_denoising': [0-9.]+", shown) and shown.count("tensor(") == 3
    assert len({*re.findall(r"\[0\.\d+, .*?\]", shown)}) == 4, "an object and three different copies"


# ---- What dn_detr.py refuses ---------------------------------------------------------------------

def test_impossible_fields_are_refused_by_name():
    counts = dict(num_classes=[0], num_queries=[0], hidden_dim=[0], num_heads=[0], num_decoder_layers=[0],
                  num_encoder_layers=[-1], num_patterns=[-1], dn_groups=[-1], dn_max_queries=[-1])
    scales = {name: [-0.1, 1.01, math.nan] for name in ("label_noise", "center_noise", "size_noise")}
    others = dict(hidden_dim=[6, 8], activation=["swish"], backbone=["vgg16"])
    for width, heads in ((4, 2), (12, 4), (40, 8), (24, 3)):   # multiples of 4 and of the heads
        DNDETRConfig(hidden_dim=width, num_heads=heads)
    for name, values in [*counts.items(), *scales.items(), *others.items()]:
        for value in values:
            with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; it must be")):
                DNDETRConfig(**dict(hidden_dim=24, num_heads=3) | {name: value})


GOOD = [0.5, 0.5, 0.2, 0.2]


@pytest.mark.parametrize("labels, boxes, message", [
    ([1], [[120.0, 80.0, 30.0, 20.0]], r"targets\[1\] has label 1 and box \[120.0, 80.0, 30.0, 20.0\], not"),
    ([1, 2], [GOOD, [-0.3, 0.5, 0.2, 0.2]], r"label 2 and box \[-0.3.*cx, cy, w, h.*\[0, 1\] with an area"),
    ([1], [[0.5, math.nan, 0.2, 0.2]], "nan"), ([1], [[0.5, 0.5, 0.2, 1.25]], "1.25"),
    ([1, 1], [GOOD, [0.5, 0.5, 0.2, 0.0]], "0.2.*, 0.0"), ([1, 1], [GOOD, [0.5, 0.5, 0.0, 0.2]], "0.0, 0.2"),
    ([CLASSES], [GOOD], rf"targets\[1\] has label {CLASSES} .* from 0 to {CLASSES - 1}"),
    ([2, -1], [GOOD, GOOD], r"targets\[1\] has label -1"), ([1, 2], [GOOD], r"int64 \[2\].*float32 \[1, 4\]"),
    ([1.0], [GOOD], "long.*float32"), ([1], [[0, 0, 1, 1]], "float.*int64"),
    (None, None, "1 targets for a batch of 2")])
def test_only_impossible_targets_are_refused_by_value(labels, boxes, message):
    # The first image is accepted: a box that is rounded, and one that looks like corners.
    targets = [{"labels": torch.tensor([0, CLASSES - 1]),
                "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0005], [0.45, 0.42, 0.95, 0.9]])}]
    targets += [{"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}] if labels else []
    for model in (tiny_model(), tiny_model(dn_groups=0)):
        with pytest.raises(ValueError, match=message):
            model(random_images(), targets=targets)


def test_impossible_noise_masks_and_costs_are_refused():
    images, padding, model = torch.rand(2, 3, 9, 9), torch.zeros(2, 9, 9, dtype=torch.bool), tiny_model()
    label, box, (logits, boxes) = torch.tensor([0]), torch.rand(1, 4), random_predictions()
    for message, function, *arguments in (
            *((f"label_noise is {bad}", noise_labels, label, 5, bad) for bad in (math.nan, 1.01, -0.1)),
            *((f"center_noise is {bad}", noise_boxes, box, bad, 0.4) for bad in (math.nan, 1.01, -0.1)),
            *((f"size_noise is {bad}", noise_boxes, box, 0.4, bad) for bad in (math.nan, 1.01, -0.1)),
            ("boxes must be float.*int64", noise_boxes, torch.tensor([[30, 20, 10, 10]]), 0.4, 0.4),
            *(("cost is not finite", dn_detr.match, logits, boxes * bad, random_targets(1, 1), model.config)
              for bad in (math.nan, math.inf)),
            (r"bool \[B, H, W\].*\[1, 9, 9\]", model, images, padding[:1]),
            ("float32", model, images, padding.float()),
            ("a whole image", model, images, padding | torch.tensor([[[False]], [[True]]]))):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


# ==== train_toy.py ================================================================================

SMALL_MODEL = ("--batch-size 4 --hidden-dim 16 --num-heads 2 --num-queries 6 --dim-feedforward 16 "
               "--num-decoder-layers 2 --num-encoder-layers 0 --small-widths 4 8 16").split()
# 10 images in batches of 4: the last batch of an epoch is smaller.
SHAPES_RUN = [*"--train-size 10 --val-size 4 --epochs 2".split(), *SMALL_MODEL]


def options_of(*flags):
    return train_toy.parse_options([str(flag) for flag in flags])


def train(*flags):
    """Train without pictures, which take longer than these trainings."""
    blank = types.SimpleNamespace(savefig=Path.touch, save=Path.touch)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("draw_curves", "draw_detections"):
            patched.setattr(train_toy, name, lambda *arguments: blank)
        return train_toy.train(options_of(*flags), CPU)


def main(*flags):
    device = () if "--device" in flags else ("--device", "cpu")
    train_toy.main([str(flag) for flag in (*flags, *device)])


def refused(capsys, *flags):
    """What the program says when it ends because of these flags."""
    with pytest.raises(SystemExit) as ended:
        main(*flags)
    assert ended.value.code not in (0, None)
    return f"{ended.value.code} {capsys.readouterr().err}"


def stop_at(moment):
    """-> a function that interrupts at its call of this number."""
    calls = itertools.count()

    def stop(*arguments, **options):
        if next(calls) == moment:
            raise KeyboardInterrupt
    return stop


def coco(sizes, annotations, categories=((3, "cat"), (7, "dog"))):
    """A dict in COCO format of images {id: (width, height)} and of (image id, category id, bbox, more).
    Annotation ids start at 0, as in many files; there is no "info"."""
    return {"images": [{"id": id, "file_name": f"{id}.png", "width": width, "height": height}
                       for id, (width, height) in sizes.items()],
            "annotations": [{"id": number, "image_id": image_id, "category_id": id, "bbox": bbox} | more
                            for number, (image_id, id, bbox, more) in enumerate(annotations)],
            "categories": [{"id": id, "name": name} for id, name in categories]}


def tiny_coco():
    """Ids with gaps, a crowd, boxes without area, one that reaches out, an empty image, mixed sizes."""
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


def dataset_of(folder, data, count=None):
    """The plain images, with --overfit."""
    flags = "--coco-train", *save_coco(folder, data), "--overfit", count or len(data["images"])
    return train_toy.build_dataset(options_of(*flags, "--image-size", 64), "val")


def perfect_detections(data):
    """One for each object of a dict in COCO format that can be found, numbered as in DetectionDataset."""
    images, categories = ([each["id"] for each in data[kind]] for kind in ("images", "categories"))
    return [{"image_id": images.index(each["image_id"]), "score": 0.9, "bbox": each["bbox"],
             "category_id": sorted(categories).index(each["category_id"])}
            for each in data["annotations"] if min(each["bbox"][2:]) > 1]


# ---- Section 1: options --------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    *((f"--{name} {low}", f"{name.replace('-', '_')} can't be {low}") for name, low in (
        ("epochs", 0), ("batch-size", 0), ("train-size", 0), ("val-size", -1), ("seed", -1), ("overfit", -1),
        ("workers", -1), ("lr", -0.1), ("lr", math.nan))),
    ("--coco-train a b", "--coco-val belongs to --coco-train"), ("--coco-train a", "expected 2 arguments"),
    ("--coco-val a b", "--coco-val belongs"), ("--coco-train a b --overfit 8 --coco-val a b", "--coco-val"),
    ("--anchors both", "invalid choice"), ("compare --dn-groups 5", "--dn-groups"), ("--seeds 0", "--seeds"),
    ("evaluate x.pt --epochs 3", "--epochs"), ("predict x.pt", "images"), ("--device gpu9", "can't be used"),
    ("--overfit 8 --val-size 3", "val_size has no effect with overfit"), ("--image-size 65", "no effect on"),
    ("--coco-train a b --coco-val a b --train-size 8", "train_size has no effect with coco_train"),
    ("--init x.pt --anchors grid", "anchors has no effect with init"),
    ("--init x.pt --pretrained-backbone", "pretrained_backbone has no effect"),
    ("--num-classes 3", "--num-classes"), ("--train-size 4 --val-size 4 --dn-groups -1", "dn_groups is -1")])
def test_options_impossible_or_without_effect_are_refused(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *flags.split()) and not list(tmp_path.iterdir())


def test_options_reach_the_model_and_defaults_suit_each_other(monkeypatch):
    monkeypatch.setattr(train_toy.sys, "argv", ["train_toy.py", "compare", "--seeds", "7"])
    assert (train_toy.parse_options().seeds, train_toy.parse_options().epochs) == ([7], 12)
    for flags, *expected in (([], 3e-3, 8), (["--init x.pt"], 1e-4, 8), (["--lr 1"], 1, 8),
                             (["--overfit 0"], 3e-3, 8), (["--coco-train a b", "--coco-val a b"], 1e-3, 50),
                             (["--coco-train a b", "--overfit 8"], 1e-3, 6)):
        for order in (flags, flags[::-1]):
            options = options_of(*" ".join(order).split())
            assert [options.lr, options.epochs] == expected
    flags = "--dn-groups 2 --label-noise 0.1 --activation gelu --no-dn-mask --small-widths 4 8".split()
    config = dataclasses.asdict(train_toy.build_model(options_of(*flags), "abcdef").config)
    assert config.items() >= dict(dn_groups=2, label_noise=0.1, activation="gelu", dn_mask=False,
                                  num_classes=6, small_widths=[4, 8], num_queries=25).items()
    for kind, count in (("grid", 1), ("normal", 50)):
        model = train_toy.build_model(options_of("--anchors", kind), "abcdef")
        assert len(model.anchor_logits.weight.sigmoid()[:, 2:].unique()) == count
        assert model.config.dn_groups == 3
    photographs = train_toy.build_model(options, "abc").config
    assert (photographs.num_queries, photographs.hidden_dim) == (100, 128)


# ---- Section 2: processes, devices, files --------------------------------------------------------

def test_a_device_is_picked_by_local_rank_and_joins_the_others(monkeypatch):
    joined, current = [], []
    monkeypatch.setattr(torch, "zeros", lambda _, device: types.SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(train_toy.dist, "init_process_group", joined.append)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for has_cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=has_cuda: answer)
        assert train_toy.pick_device().type == ("cuda" if has_cuda else "mps")
    assert train_toy.pick_device("cpu") == CPU and not joined
    monkeypatch.setattr(train_toy, "WORLD_SIZE", 16)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert train_toy.pick_device("cpu") == CPU and joined == ["gloo"] and not current
    assert train_toy.pick_device().type == "cuda" and current == [3] and joined[1:] == ["nccl"]


def test_processes_on_gpus_share_the_statistics_of_batch_norm(monkeypatch):
    monkeypatch.setattr(train_toy, "WORLD_SIZE", 2)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **options: model)
    for device, is_shared in ((CPU, False), (torch.device("cuda"), True)):
        parts = train_toy.parallel(tiny_model(), device).modules()
        assert any(isinstance(part, nn.SyncBatchNorm) for part in parts) == is_shared


def test_a_log_has_every_letter_it_can_and_no_progress_bar(monkeypatch, tmp_path):
    monkeypatch.undo()                                         # of the fixture: the real progress bar
    with open(tmp_path / "log", "w", encoding="cp1252") as file, contextlib.redirect_stdout(file), (
            contextlib.redirect_stderr(file)):
        assert list(train_toy.progress(range(3), "counting")) == [0, 1, 2]
        train_toy.log("Kätzchen 猫")
        assert (tmp_path / "log").read_text(encoding="cp1252") == "Kätzchen ?\n", "at once"


# ---- Section 3: shapes ---------------------------------------------------------------------------

def test_a_shape_fills_its_box_and_stands_out():
    scenes = {seed: train_toy.draw_scene(seed) for seed in range(150)}
    lonely = [(seed, image.float(), *objects[0]) for seed, (image, objects) in scenes.items()
              if len(objects) == 1]
    assert {label for _, _, label, _ in lonely} == {*range(6)}
    for seed, image, label, (x, y, w, h) in lonely:
        v, u = ((np.mgrid[:side, :side] + 0.5) / side * 2 - 1 for side in (h, w))
        inside = [*train_toy.SHAPE_MASKS.values()][label](u[1][:1], v[0][:, :1])
        shape = image[:, y:y + h, x:x + w][:, inside]
        color = shape.median(1).values
        assert (shape - color[:, None]).abs().mean() < 8       # noise of 7 gray values
        ys, xs = ((image - color[:, None, None]).abs().amax(0) < 30).nonzero().T
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + w, y + h)
        ends = np.random.default_rng(seed).uniform(0, 255, (2, 3))             # of the background's gradient
        assert np.linalg.norm(ends - color.numpy(), axis=1).min() > 105


def test_scenes_depend_on_seed_split_and_index_and_vary_in_crowding():
    few, many = (train_toy.draw_shapes(size, 1, "val")["images"] for size in (3, 200))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(few, many))
    for seed, split in ((2, "val"), (1, "train"), (0, "train")):
        other = train_toy.draw_shapes(1, seed, split)["images"][0]
        assert not any(torch.equal(other["image"], each["image"]) for each in many)
    for split, size in (("train", 3), ("val", 2)):
        dataset = train_toy.build_dataset(options_of("--seed", 2, "--train-size", 3, "--val-size", 2), split)
        expected = train_toy.draw_shapes(size, 2, split)["images"]
        assert_close(dataset.images, [each["image"] for each in expected])
    scenes = [[np.array(box) for _, box in train_toy.draw_scene(seed)[1]] for seed in range(400)]
    counts = np.array([len(boxes) for boxes in scenes])
    assert 10 <= (counts == 0).sum() <= 32 and 10 <= (counts > 8).sum() <= 32 and {*range(13)} == {*counts}
    corners = np.array([[*box[:2], *(box[:2] + box[2:])] for boxes in scenes for box in boxes])
    assert corners[:, :2].min(0).tolist() == [0, 0] and corners[:, 2:].max(0).tolist() == [64, 64]
    for a, b in (pair for boxes in scenes for pair in itertools.combinations(boxes, 2)):
        shared = (np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
        assert shared <= 0.301 * min(a[2:].prod(), b[2:].prod())


# ---- Section 4: datasets, image files, batches ---------------------------------------------------

def test_gaps_crowds_bad_boxes_and_empty_images_are_read_right(tmp_path):
    data = tiny_coco()
    data["annotations"] += [dict(image_id=8, category_id=7, bbox=[3, 3, 5, 0.9]),
                            dict(image_id=8, category_id=3, bbox=[-9, -7, 29, 8.5])]
    dataset, first = dataset_of(tmp_path, data), dataset_of(tmp_path, data, count=1)
    (wide, target), (tall, tall_target), (_, empty) = dataset
    assert target["labels"].tolist() == [1, 0] and tall_target["labels"].tolist() == [0, 0]    # no crowd
    assert_near(target["boxes"], [[21 / 80, 14 / 64, 30 / 80, 20 / 64], [70 / 80, 20 / 64, 20 / 80, 20 / 64]])
    assert_near(tall_target["boxes"], [[14 / 64, 21 / 80, 20 / 64, 30 / 80],
                                       [10 / 64, 0.75 / 80, 20 / 64, 1.5 / 80]])
    assert wide.shape == (3, 64, 80) and tall.shape == (3, 80, 64) and target["size"] == (64, 80)
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)
    assert dataset.class_counts == [3, 1] and [dataset[i][1]["image_id"] for i in range(3)] == [5, 8, 9]
    assert [each["bbox"] for each in dataset.truth][1] == [60, 10, 20, 20], "clipped as for training"
    assert dataset.description == ("3 images, 4 objects of 2 of 2 classes, at most 2 in an image; 2 boxes of "
                                   "a pixel or less dropped, 2 clipped to their image")
    assert len(first) == 1 and "1 images, 2 objects of 2 of 2" in first.description and len(first.truth) == 2
    rounded = coco({1: (64, 48)}, [(1, 3, [0, 0, 64, 48.5], {})])
    assert "0 clipped" in dataset_of(tmp_path / "x", rounded).description, "half a pixel is rounding"


@pytest.mark.parametrize("kind, name, value", [
    *(("annotations", "bbox", value) for value in ([1, 2, 3], None, [1, 2, "3", 4], [1, 2, math.nan, 4])),
    *(("annotations", name, value) for name, value in (("image_id", 77), ("category_id", 4), ("area", "9"),
                                                       ("category_id", None), ("iscrowd", "x"))),
    *(("images", name, value) for name, value in (("height", 0), ("width", "80"), ("id", 5), ("id", [1]),
                                                  ("width", math.inf), ("file_name", "5.png"))),
    ("categories", "id", 3), ("categories", "id", None)])
def test_broken_records_are_shown_before_training(tmp_path, kind, name, value):
    data = tiny_coco()
    folder, path = save_coco(tmp_path, data)
    data[kind][1][name] = value
    Path(path).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{path}: .*" + re.escape(f"'{name}': {value!r}")):
        train_toy.build_dataset(options_of("--coco-train", folder, path, "--overfit", 3), "train")


def test_what_annotation_tools_write_is_accepted_if_it_is_coco(tmp_path):
    data = tiny_coco()
    data["categories"][0]["name"] = "Łoś 猫"
    paths = save_coco(tmp_path, data)
    options = options_of("--coco-train", *paths, "--overfit", 3)
    build = functools.partial(train_toy.build_dataset, options, "val")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        Path(paths[1]).write_bytes(json.dumps(data, ensure_ascii=False).encode(encoding))
        assert build().names[3] == "Łoś 猫"
    for text, message in (("[1]", "list indices"), ("{", "Expecting"), ("{}", "KeyError.*images")):
        Path(paths[1]).write_text(text)
        with pytest.raises(ValueError, match=f"annotations.json: .*{message}"):
            build()


ONE, OTHER = [8, 8, 20, 20], [8, 30, 20, 20]


@pytest.mark.parametrize("annotations, ids", [
    ([(1, 3, ONE, dict(area=None, iscrowd=None)), (1, 7, OTHER, dict(area=-400, iscrowd="0")),
      (4, 7, [90, 8, 0, 5], {})], (3, 7)),
    ([(1, 3, ONE, {}), (1, 7, OTHER, dict(area=1e12)), (4, 3, [0, 0, 32, 32], dict(iscrowd="1"))], (3, 7)),
    ([(1, 30, ONE, {}), (4, 4, ONE, {})], (30, 4)), ([(1, "b", ONE, {}), (1, "a", OTHER, {})], ("b", "a"))])
def test_perfect_detections_reach_100_whatever_the_annotations(tmp_path, annotations, ids):
    data = coco({1: (64, 64), 4: (32, 32)}, annotations, [(id, "one name for all") for id in ids])
    dataset, found = dataset_of(tmp_path, data), perfect_detections(data)
    found += [each | {"bbox": [9, 9, 9, 9], "score": 1} for each in found[2:]]             # within a crowd
    metrics = train_toy.coco_metrics(dataset, found)
    assert metrics["AP"] == pytest.approx(100) and dataset.class_counts == [1, 1]
    assert metrics["AP_per_class"] == pytest.approx(dict.fromkeys(ids, 100))


@pytest.mark.parametrize("boxes, more, counted", [
    ([[0.1, 0.1, 0.8, 0.8], [0, 0, 1, 2]], {}, "2 boxes of a pixel or less"),               # relative
    ([[10, 10, 60, 60], [30, 40, 60, 50]], {}, "2 clipped"),                                # corners
    ([[30, 9, -20, 20], [99, 9, 20, 20]], {}, "2 boxes of a pixel"), ([ONE], dict(iscrowd=1), "0 objects")])
def test_boxes_of_another_format_and_no_object_are_explained(tmp_path, boxes, more, counted):
    with pytest.raises(ValueError, match=rf"json: 1 images.*{counted}.*A bbox is \[x, y.*iscrowd"):
        dataset_of(tmp_path, coco({1: (64, 64)}, [(1, 3, box, more) for box in boxes]))


def test_held_out_data_have_the_training_labels_or_are_refused(tmp_path):
    training = save_coco(tmp_path / "train", tiny_coco())
    for name, message in (("dog", None), ("cow", r"no class cow \(7\)")):
        categories = [(7, name), (9, "never seen")]
        held_out = save_coco(tmp_path / "val", coco({1: (64, 64)}, [(1, 7, ONE, {})], categories))
        options = options_of("--coco-train", *training, "--coco-val", *held_out, "--output-dir", tmp_path)
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            val_set = train_toy.load_or_start(options)[2]
            assert val_set.labels[0].tolist() == [1]
            assert len({bytes(val_set[0][0].numpy()) for val_set.epoch in range(8)}) == 1, "not augmented"


def test_missing_damaged_and_turned_training_images_are_named(tmp_path):
    folder, path = save_coco(tmp_path, tiny_coco())
    exif = Image.Exif()
    exif[0x0112] = 6                                           # to be turned by 90 degrees when shown
    Image.new("RGB", (64, 80)).save(f"{folder}/5.png", exif=exif)
    Path(f"{folder}/8.png").write_bytes(b"this is no picture")
    os.remove(f"{folder}/9.png")
    first, all_three = (options_of("--coco-train", folder, path, "--overfit", n, "--image-size", 64)
                        for n in (2, 3))
    for index, message in ((0, r"5.png has \(80, 64\) pixels.*\(64, 80\).*EXIF"), (1, "8.png can't be read")):
        with pytest.raises(ValueError, match=message):
            train_toy.build_dataset(first, "train")[index]
    with pytest.raises(ValueError, match=re.escape(f"1 of 3 images are missing, e.g. ['{folder}/9.png']")):
        train_toy.build_dataset(all_three, "train")


@pytest.mark.parametrize("is_photograph", [True, False])
def test_augmentation_follows_seed_epoch_and_index_and_moves_boxes(tmp_path, monkeypatch, is_photograph):
    data = coco({id: (80, 60) for id in range(40)}, [(id, 3, [6, 9, 30, 12], {}) for id in range(40)])
    picture, paths = np.zeros((60, 80, 3), np.uint8), save_coco(tmp_path, data)
    picture[9:21, 6:36] = 255, 200, 150                        # the object, on black
    for image in data["images"]:
        Image.fromarray(picture).save(tmp_path / "images" / image["file_name"])
        image["image"] = torch.from_numpy(picture).permute(2, 0, 1).clone()
    monkeypatch.setattr(train_toy, "draw_shapes", lambda *_: data)
    flags = ("--coco-train", *paths, "--coco-val", *paths, "--image-size", 120) if is_photograph else ()
    dataset, state = train_toy.build_dataset(options_of(*flags), "train"), torch.get_rng_state()
    first, sides, colors = [dataset[index] for index in range(40)], [], set()
    assert torch.equal(state, torch.get_rng_state()), "augmentation disturbs the noise"
    for image, target in first:
        _, height, width = image.shape
        ys, xs = ((image.float() - image[:, :1, :1]).abs().sum(0) > 100).nonzero().T
        found = [xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height]
        assert_near(box_convert(target["boxes"], "cxcywh", "xyxy")[0], torch.stack(found), atol=0.01)
        sides.append(found[0] > 0.5)
        colors.add(tuple(image.flatten(1).amax(1).tolist()))
    assert 8 < sum(sides) < 32 and len(colors) > 4
    for epoch, seed, least, most in ((0, 0, 40, 40), (1, 0, 0, 16), (0, 1, 0, 16)):
        dataset.epoch, dataset.seed = epoch, seed
        images = [dataset[i][0] for i in reversed(range(40))][::-1]
        assert least <= sum(torch.equal(image, before) for image, (before, _) in zip(images, first)) <= most
        assert sum(torch.equal(image, before) for image, (before, _) in zip(images, first[1:])) <= 16


GRAY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "F", "I"])
def test_images_of_8_bits_are_read_and_of_more_are_refused(tmp_path, mode):
    kinds = {"I;16": np.uint16, "F": np.float32, "I": np.int32}
    stored = Image.fromarray(GRAY.astype(kinds.get(mode, np.uint8)))
    (stored if mode in kinds else stored.convert(mode)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match="image.tif.*8 bits") if mode in kinds else contextlib.nullcontext():
        for channel in train_toy.read_image(tmp_path / "image.tif", 4)[0]:
            assert np.abs(channel.numpy() - GRAY.astype(float)).max() <= 1


def test_photographs_are_upright_in_predict_not_in_training(tmp_path):
    turned = {1: GRAY, 2: GRAY[:, ::-1], 3: GRAY[::-1, ::-1], 4: GRAY[::-1], 5: GRAY.T, 6: GRAY[::-1].T,
              7: GRAY[::-1, ::-1].T, 8: GRAY[:, ::-1].T}       # the eight values of the EXIF tag
    for orientation, upright in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(GRAY).save(tmp_path / "image.png", exif=exif)
        for expected, how in ((upright, dict(upright=True)), (GRAY, {})):
            image, size = train_toy.read_image(tmp_path / "image.png", 4, **how)
            assert image[0].tolist() == expected.tolist() and size == expected.shape


def test_the_shorter_side_is_set_the_longer_limited_detail_kept(tmp_path):
    for size, expected in (((150, 120), (75, 60)), ((120, 150), (60, 75)), ((3000, 600), (100, 20)),
                           ((60, 300), (20, 100)), ((2000, 1), (100, 1)), ((1600, 1200), (80, 60))):
        fine = np.random.RandomState(0).randint(0, 255, (expected[1], expected[0], 3)).astype(np.uint8)
        original = Image.fromarray(fine).resize(size, Image.Resampling.NEAREST)
        original.save(tmp_path / "x.jpg", quality=100, subsampling=0)
        image, size_before = train_toy.read_image(tmp_path / "x.jpg", 60)
        assert image.shape[:0:-1] == expected and size_before == size[::-1]
        smooth = original.resize(expected, Image.Resampling.BILINEAR)           # either is right
        found = image.permute(1, 2, 0).numpy().astype(float)
        assert min(np.abs(found - each).mean() for each in (fine, np.asarray(smooth))) < 4


def test_batches_are_padded_masked_and_normalized_as_imagenet():
    for sizes in (((4, 6), (6, 5)), ((6, 6), (4, 5))):         # in the second one, an image fills the batch
        items = [(torch.full((3, h, w), 200, dtype=torch.uint8), {}) for h, w in sizes]
        images, mask, _ = train_toy.collate(items)
        for index, (height, width) in enumerate(sizes):
            assert mask[index].tolist() == [[y >= height or x >= width for x in range(6)] for y in range(6)]
        normalized, moved = train_toy.normalize(images, mask, CPU)
        for channel, average, deviation in ((0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)):   # RGB
            expected = torch.where(mask, 0.0, (200 / 255 - average) / deviation)
            assert_near(normalized[:, channel], expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(moved, mask) and train_toy.collate(items[:1] * 2)[1] is None


# ---- Section 5: model and optimizer --------------------------------------------------------------

@pytest.mark.parametrize("queries, columns, rows", [(5, 3, 2), (7, 3, 3), (6, 3, 2)])
def test_an_easier_start_looks_at_the_anchor_from_a_grid(queries, columns, rows):
    model = tiny_model(anchor_temperature=20, position_frequency=4, cell_centers=True, num_queries=queries)
    train_toy.initialize_for_toy(model)
    boxes = [[(i % columns + 0.5) / columns, (i // columns + 0.5) / rows, 0.3, 0.3] for i in range(queries)]
    assert_near(model.anchor_logits.weight.sigmoid(), boxes)
    places = torch.cartesian_prod(*[(torch.arange(6) + 0.5) / 6] * 2)           # (y, x) of 36 cells
    encoded = dn_detr.sine_encoding(places, 16, 20.0, 4.0)
    for layer in model.decoder.layers:
        query, key = layer.cross_query_sine(encoded), layer.cross_key_position(encoded)
        assert torch.equal((query @ key.T).argmax(-1), torch.arange(36))
        assert_near(key @ key.T, 4 * encoded @ encoded.T, atol=1e-3)             # a rotation, times 2
    for part in (model.encoder, model.decoder):
        assert torch.equal(part.position_scale(torch.randn(36, 32)), torch.ones(36, 32))


def test_pretrained_weights_are_loaded_frozen_and_learn_slowly(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **how: os.stat("offline"))

    def build(backbone):
        flags = [*SHAPES_RUN, "--pretrained-backbone", "--backbone", backbone]
        return train_toy.build_model(options_of(*flags), "abcdef")
    for backbone, message in (("resnet18", "resnet18.*FileNotFound"), ("small", "no ImageNet weights")):
        with pytest.raises(ValueError, match=message):
            build(backbone)
    url = train_toy.get_model_weights("resnet18")["IMAGENET1K_V1"].url
    file = tmp_path / "checkpoints" / url.rsplit("/", 1)[-1]
    file.write_bytes(b"cut")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/checkpoints/resnet18-*.pth")):
        build("resnet18")
    state = {name: torch.rand(tensor.shape) for name, tensor in get_model("resnet18").state_dict().items()}
    torch.save(state, file)
    pretrained = build("resnet18")
    for name, tensor in pretrained.backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    from_scratch = tiny_model(backbone="resnet18", frozen_norm=False)
    for model, factor in ((pretrained, 0.1), (tiny_model(), 1), (from_scratch, 1)):
        optimizer, _ = train_toy.build_optimizer(model, 0.01, 2000)
        rate_of = {p: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            expected = 0.01 * factor if name.startswith("backbone.") else 0.01
            is_frozen = model is pretrained and name.startswith(("backbone.conv1", "backbone.layer1"))
            assert rate_of.get(parameter) == (None if is_frozen else pytest.approx(expected)), name


@pytest.mark.parametrize("num_steps, scales", [
    (2000, {0: 0.01, 49: 0.5, 99: 0.9505, 500: 0.75, 1999: 0.0005, 2000: 0}), (30, {0: 0.25, 3: 0.9, 30: 0}),
    (1, {0: 1, 1: 0})])
def test_the_rate_warms_up_for_100_steps_and_ends_at_zero(num_steps, scales):
    _, schedule = train_toy.build_optimizer(tiny_model(), 0.01, num_steps)
    assert {step: schedule.lr_lambdas[-1](step) for step in scales} == pytest.approx(scales)


# ---- Section 6: evaluation -----------------------------------------------------------------------

def test_ap_and_distances_are_measured_in_pixels_of_the_file(tmp_path):
    objects = [(1, 3, [16, 8, 80, 40], {}), (2, 3, [8, 16, 40, 80], {}), (2, 7, [40, 80, 40, 80], {}),
               (2, 7, [68, 8, 8, 16], {})]
    dataset = dataset_of(tmp_path, coco({1: (160, 80), 2: (80, 160)}, objects))
    boxes = torch.tensor([[[0.35, 0.35, 0.5, 0.5], [0.9, 0.1, 0.1, 0.1]] * 2])      # a cat, a dog
    logits = torch.full((2, 1, 4, 2), -9.0)                    # 2 queries with 2 patterns
    logits[0, 0, 2, 0], logits[1, 0, 0, 0], logits[1, 0, 1, 1] = 5.0, 5.0, 2.0
    outputs = iter({"pred_logits": each, "pred_boxes": boxes} for each in logits)
    model = tiny_model(num_classes=2, num_queries=2, num_patterns=2)
    model.forward = lambda images, padding_mask: next(outputs)
    model.anchor_logits.weight.data = torch.tensor([[0.5, 0.4, 0.5, 0.5], [0.5, 0.5, 0.05, 0.9]]).logit()
    options = types.SimpleNamespace(batch_size=1, workers=0, amp=False)
    metrics, matched = train_toy.evaluate(model, dataset, CPU, options)
    half = 100 * 51 / 101                                      # one dog of two, at 51 of 101 recalls
    assert not model.training and metrics["AP_per_class"] == pytest.approx({3: 100, 7: half})
    found = [metrics[name] for name in ("AP", "AP75", "AR1")]
    assert found == pytest.approx([50 + half / 2, 50 + half / 2, 75])
    assert matched.tolist() == [[-1, -1, 0, -1], [0, 2, 1, -1]]
    # The mean over found objects: two cats with centers of (0.35, 0.35) in their images, and a dog.
    distance = pytest.approx((0.2 + 0.2 + 1.65) / 3, abs=1e-5)
    assert metrics["anchor_distance"] == distance
    table = train_toy.class_table(dataset, metrics)
    assert re.fullmatch("cat +AP 100.0, 2 objects\ndog +AP +50.5, 2 objects", table)
    for side, expected in ((0.8, distance), (0.7, None)):      # an IoU of 0.64 is enough, one of 0.49 is not
        smaller = boxes * torch.tensor([1, 1, side, side])
        outputs = iter({"pred_logits": each, "pred_boxes": smaller} for each in logits)
        assert train_toy.evaluate(model, dataset, CPU, options)[0]["anchor_distance"] == expected


def test_the_twelve_numbers_are_those_that_pycocotools_prints(tmp_path, capsys):
    random, objects = np.random.RandomState(0), [(1, 3, [5, 5, 700, 600], {}), (1, 7, [0, 0, 330, 330], {})]
    for index in range(40):
        (x, y), (w, h) = random.randint(0, 60, 2).tolist(), random.randint(8, 120, 2).tolist()
        objects.append((1 + index % 2, (3, 7)[index // 3 % 2], [x, y, w, h], {}))
    data = coco({1: (800, 700), 2: (200, 200)}, objects)
    dataset, detections = dataset_of(tmp_path, data), perfect_detections(data)
    for row in detections:
        row |= {"score": random.rand(), "bbox": (row["bbox"] + random.randint(-6, 7, 4)).tolist()}
    capsys.readouterr()
    metrics = train_toy.coco_metrics(dataset, detections, verbose=True)
    printed = [100 * float(x) for x in re.findall(r"\] = ([-.\d]+)", capsys.readouterr().out)]
    assert [metrics[name] for name in train_toy.AP_NAMES] == pytest.approx(printed, abs=0.06)
    assert metrics["AP"] == pytest.approx(np.mean([*metrics["AP_per_class"].values()]))
    fast = train_toy.coco_metrics(dataset, detections)
    assert capsys.readouterr().out == "" and fast["AP_small"] is None and fast["AP"] == metrics["AP"]


# ---- Section 7: pictures -------------------------------------------------------------------------

def test_boxes_and_names_are_drawn_where_they_belong(monkeypatch):
    texts, names = [], {3: "猫", 9: "Kätzchen Łoś"}
    spy(monkeypatch, train_toy.ImageDraw.ImageDraw, "text", lambda self, *args, **how: texts.append(args[:2]))
    boxes, labels = torch.tensor([[0.1, 0.5, 0.6, 0.9], [0.5, 0.1, 0.9, 0.4]]), torch.tensor([1, 0])
    image, scores = torch.zeros(3, 50, 100, dtype=torch.uint8), torch.tensor([0.876, 0.5])
    picture = train_toy.draw_boxes(image, boxes, labels, names, scores)
    assert picture.size == (400, 200)                          # enlarged
    assert [text for _, text in texts] == ["Kätzchen Łoś 0.88", "category 3 0.50"]
    for label, (place, _), (x0, y0, x1, y1) in zip((1, 0), texts, ((40, 100, 240, 180), (200, 20, 360, 80))):
        color = Image.new("RGB", (1, 1), train_toy.COLORS[label]).getpixel((0, 0))
        ys, xs = np.nonzero((np.asarray(picture) == color).all(2))
        assert (xs.min(), xs.max(), ys.max()) == pytest.approx((x0, x1, y1), abs=1)
        assert place == pytest.approx((x0, y0))


def test_curves_are_medians_in_bands_and_detections_below_the_truth(monkeypatch):
    runs = {name: [history_of(*each) for each in precisions] for name, precisions in (
        ("without", ((1, 5), (2, 9), (9, 10))), ("5 groups", ((3, 4), (5, 6), (40, 8))))}
    figure = train_toy.draw_curves(runs, ["loss", "AP"])
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[1].lines}
    assert lines == {"without": [2, 9], "5 groups": [5, 6]} and figure.axes[1].get_title() == "AP, %"
    bands = [band.get_paths()[0].vertices for band in figure.axes[1].collections]
    assert [{*band[:, 1]} for band in bands] == [{1, 5, 9, 10}, {3, 4, 40, 8}]
    drawn, dataset = [], train_toy.build_dataset(options_of("--val-size", 9), "val")
    dataset.labels[0], dataset.boxes[0] = dataset.labels[0][:0], dataset.boxes[0][:0]

    def draw(image, boxes, labels, names, scores=None):
        drawn.append((boxes, labels, scores))
        return Image.new("RGB", (20, 10), "blue" if scores is None else "red")
    monkeypatch.setattr(train_toy, "draw_boxes", draw)
    monkeypatch.setattr(train_toy, "detect", lambda *given: dict(boxes="b", labels="l", scores=given[3]))
    shown = [index for index, labels in enumerate(dataset.labels) if len(labels)]
    for count, width in ((3, 3), (99, len(shown))):            # more than there are, too
        drawn.clear()
        picture = train_toy.draw_detections(None, dataset, CPU, count)
        assert picture.size == (width * 28 + 8, 2 * 18 + 8) and picture.getpixel((75, 15))[2] == 255
        assert picture.getpixel((75, 33))[0] == 255 and drawn[1] == ("b", "l", 0.5)
    for (boxes, labels, _), index in zip(drawn[::2], shown, strict=True):
        assert torch.equal(labels, dataset.labels[index])
        assert_near(boxes, box_convert(dataset.boxes[index], "cxcywh", "xyxy"))


# ---- Section 8: training -------------------------------------------------------------------------

def test_training_is_adamw_with_clipping_and_decay(tmp_path, monkeypatch):
    batches, losses, norms, steps, collate = [], [], [], itertools.count(), train_toy.collate

    def shrunk(outputs, targets, config):                      # once to a gradient that is not clipped
        losses = training_loss(outputs, targets, config)
        return losses | {"loss": losses["loss"] * (1e-6 if next(steps) % 12 == 4 else 1)}
    monkeypatch.setattr(dn_detr, "training_loss", shrunk)
    monkeypatch.setattr(train_toy, "collate", lambda items: batches.append(collate(items)) or batches[-1])
    flags = *SHAPES_RUN, "--epochs", 4, "--lr", 0.01, "--output-dir", tmp_path
    history = train(*flags)
    torch.manual_seed(0)
    model = train_toy.build_model(options_of(*flags), train_toy.SHAPE_MASKS)
    model.backbone.to(memory_format=torch.channels_last)       # the same rounding
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), weight_decay=0.05, fused=True)
    for epoch in range(4):
        torch.manual_seed(train_toy.seed_of(0, epoch, 0))
        iter(train_toy.DataLoader([0]))                        # takes a random number
        for images, _, targets in batches[4 * epoch:][:3]:     # the fourth is for evaluation
            outputs = model.train()(train_toy.normalize(images, None, CPU)[0], None, targets)
            loss = shrunk(outputs, targets, model.config)["loss"]
            optimizer.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            step = len(losses)                                 # 2 of 12 steps are warm-up, then decay
            optimizer.param_groups[0]["lr"] = 0.01 * min((step + 1) / 2, 1 - step / 12)
            optimizer.step()
            losses.append(loss.item())
    assert min(norms) < 0.1 < 1 < sorted(norms)[1]
    for name, weights in torch.load(tmp_path / "last.pt")["model"].items():
        assert_close(weights, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in history] == pytest.approx(np.reshape(losses, (4, 3)).mean(1), rel=1e-4)
    assert [row["step"] for row in history] == [3, 6, 9, 12]
    assert [row["lr"] for row in history] == pytest.approx([0.0075, 0.005, 0.0025, 0], abs=1e-9)


def test_order_noise_and_weights_depend_on_the_seed_and_epoch(tmp_path, monkeypatch):
    orders, seeds, weights, epochs_of = [], [], [], []
    spy(monkeypatch, train_toy, "collate", lambda items: orders.append([each["index"] for _, each in items]))
    spy(monkeypatch, train_toy, "parallel", lambda model, _: weights.append(model.class_head.weight.tolist()))
    spy(monkeypatch, dn_detr, "training_loss", lambda *_: seeds.append(torch.initial_seed()))
    spy(monkeypatch, train_toy.DetectionDataset, "__getitem__", lambda self, _: epochs_of.append(self.epoch))
    for number, seed in enumerate((5, 5, 9)):
        train(*SHAPES_RUN, "--seed", seed, "--output-dir", tmp_path / str(number))
    epochs = [sum(orders[start:start + 3], []) for start in range(0, 24, 4)]     # then 4 held-out images
    assert all(sorted(order) == [*range(10)] != order for order in epochs)
    assert orders[3::4] == [[0, 1, 2, 3]] * 6
    assert epochs_of[:28] == [0] * 10 + [0] * 4 + [1] * 10 + [0] * 4, "as augmentation is drawn"
    assert epochs[:2] == epochs[2:4] and len({*map(tuple, epochs)}) == 4
    assert seeds[:6] == seeds[6:12] and len({*seeds}) == 4 and weights[0] == weights[1] != weights[2]


def test_a_run_does_what_it_should_epoch_by_epoch(tmp_path, monkeypatch, capsys):
    precisions, metrics, matchings = iter([30.0, 50.0, 40.0, 45.0]), train_toy.coco_metrics, []
    monkeypatch.setattr(train_toy, "coco_metrics", lambda *args: metrics(*args) | {"AP": next(precisions)})
    spy(monkeypatch, train_toy, "save", lambda run, parts, folder: matchings.append(run.get("matched")))
    written, folder = [], tmp_path / "run"
    spy(monkeypatch, os, "replace", lambda source, path: written.append(path.name))
    history = train_toy.train(options_of(*SHAPES_RUN, "--output-dir", folder, "--epochs", 4), CPU)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert torch.load(folder / "best.pt")["history"][-1]["epoch"] == 2, "best.pt is the best of all epochs"
    assert written[2:5] == ["best.pt", "last.pt", "metrics.jsonl"], "a killed run repeats the epoch"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == json.loads(json.dumps(history)) and 0 < rows[0]["cpu_seconds"] < rows[3]["cpu_seconds"]
    assert all(0 < row["loss_denoising"] < row["loss"] for row in rows)
    changes = [(old != new).sum().item() / 4 for old, new in itertools.pairwise(matchings[1:])]
    assert [row["instability"] for row in rows] == [None, *changes]
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in ("curves", "detections"))
    assert re.search(r"epoch  4/4 .*AP 45\.0", capsys.readouterr().out)


@pytest.mark.parametrize("what, bad_step", [("loss", 0), ("gradient", 0), ("prediction", 4)])
def test_a_step_that_is_not_finite_stops_and_is_named(tmp_path, monkeypatch, what, bad_step):
    steps = itertools.count()

    def poisoned(outputs, targets, config):
        kind = what if next(steps) == bad_step else ""
        if kind == "prediction":
            outputs["all_boxes"] = outputs["all_boxes"] * math.inf
        losses = training_loss(outputs, targets, config)
        losses["loss"] = losses["loss"] * (math.nan if kind == "loss" else 1)
        losses["loss"].register_hook(lambda gradient: gradient * (math.inf if kind == "gradient" else 1))
        return losses
    monkeypatch.setattr(dn_detr, "training_loss", poisoned)
    with pytest.raises(ValueError, match=rf"step {bad_step}, images \[\d, \d, \d, \d\].* not finite"):
        train(*SHAPES_RUN, "--output-dir", tmp_path)
    assert len(torch.load(tmp_path / "last.pt")["history"]) == bad_step // 3


def test_mixed_precision_is_bfloat16_and_off_by_default(tmp_path, monkeypatch):
    kinds = set()
    spy(monkeypatch, nn.Linear, "forward", lambda self, x: kinds.add(
        (self.training, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))))
    for flags, kind in (([], False), (["--amp"], torch.bfloat16)):
        kinds.clear()
        train(*SHAPES_RUN, "--epochs", 1, *flags, "--output-dir", tmp_path / str(kind))
        assert (True, kind) in kinds and (False, kind) in kinds


def test_overfit_trains_and_evaluates_on_the_same_plain_images(tmp_path, monkeypatch):
    images = set()
    spy(monkeypatch, train_toy, "normalize", lambda batch, *_: images.update(bytes(x.numpy()) for x in batch))
    flags = "--overfit", 3, "--epochs", 2, *SMALL_MODEL, "--batch-size", 101
    history = train(*flags, "--output-dir", tmp_path)
    assert images == {bytes(each["image"].numpy()) for each in train_toy.draw_shapes(3, 0, "train")["images"]}
    assert [row["step"] for row in history] == [2, 4] and history[-1]["lr"] == 0       # 67 times 3 images


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of two epochs that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(*SHAPES_RUN, "--output-dir", folder)
    return folder


@pytest.mark.parametrize("owner, name, moment", [
    *((os, "replace", moment) for moment in (0, 2, 3, 4, 6)), (torch.Tensor, "backward", 4)])
def test_a_run_stopped_at_any_moment_ends_as_if_never_stopped(
        tmp_path, monkeypatch, straight, owner, name, moment):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        spy(patched, owner, name, stop_at(moment))
        train(*SHAPES_RUN, "--output-dir", folder)
    torch.manual_seed(99)
    history = train(*["--resume", folder] if moment else [*SHAPES_RUN, "--output-dir", folder])
    seconds = [row["seconds"] for row in history]
    assert 0 < seconds[0] < seconds[1] and train("--resume", folder) == history        # finished
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(x / name) for x in (folder, straight))
        for row in ours["history"] + theirs["history"]:
            del row["seconds"], row["cpu_seconds"]
        for key in ("model", "optimizer", "schedule", "matched", "history"):
            assert_close(ours[key], theirs[key], rtol=0, atol=0)


def test_clocks_go_on_after_a_resume_and_workers_draw_every_epoch(tmp_path, straight):
    run = torch.load(straight / "last.pt")
    with_a_worker = train(*SHAPES_RUN, "--workers", 1, "--output-dir", tmp_path / "other")
    assert with_a_worker[1]["loss"] == pytest.approx(run["history"][1]["loss"], rel=1e-5)
    run["options"]["epochs"] = 3
    run["history"][1] |= dict(seconds=1000.0, cpu_seconds=5000.0)
    torch.save(run, tmp_path / "last.pt")
    last = train("--resume", tmp_path)[-1]
    assert last["epoch"] == 3 and 1000 < last["seconds"] < 1100 and 5000 < last["cpu_seconds"] < 5100


def test_other_runs_are_neither_overwritten_nor_continued(tmp_path, capsys, straight):
    before = (straight / "last.pt").read_bytes()
    assert "holds another run: --resume" in refused(capsys, *SHAPES_RUN, "--output-dir", straight)
    for path, message in ((tmp_path / "nowhere", "No such file"), (straight / "last.pt", "Not a directory")):
        assert f"last.pt can't be read: {message}" in refused(capsys, "--resume", path)
    torch.save(torch.load(straight / "last.pt")["model"], tmp_path / "last.pt")
    assert "is not from a run" in refused(capsys, "--resume", tmp_path)
    for flags in ("--seed 0", "--epochs 9", "--lr 1", "--dn-groups 2", "--output-dir x", "--amp"):
        name = flags.split()[0][2:].replace("-", "_")
        assert re.search(f"{name} has no effect with resume.*--init", refused(
            capsys, "--resume", straight, *flags.split()))
    assert "--coco-val belongs to" in refused(capsys, "--resume", straight, "--coco-val", "a", "b")
    assert (straight / "last.pt").read_bytes() == before


def test_data_may_move_but_not_change_when_a_run_is_resumed(tmp_path, capsys, monkeypatch):
    paths, folder = save_coco(tmp_path / "old", tiny_coco()), tmp_path / "run"
    flags = "--coco-train", *paths, "--coco-val", *paths, "--image-size", 64, "--epochs", 2, "--device", "cpu"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        spy(patched, train_toy, "save", stop_at(2))
        train(*flags, *SMALL_MODEL, "--output-dir", folder)
    assert options_of("--resume", folder).device == "", "another machine may have a GPU"
    (tmp_path / "old").rename(tmp_path / "new")
    assert "annotations.json: FileNotFound" in refused(capsys, "--resume", folder)
    images, path, other = str(tmp_path / "new/images"), tmp_path / "new/annotations.json", tmp_path / "other"
    fewer, renamed = tiny_coco(), tiny_coco()
    fewer["annotations"].pop(0)
    renamed["categories"][0]["name"] = "lion"
    for data, first, second, message in ((fewer, other, path, "3 objects.*2 obj"),
                                         (fewer, path, other, "3 objects.*2 obj"),
                                         (renamed, other, other, "lion")):
        other.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=f"trained on other data, .*{message}"):
            train("--resume", folder, "--coco-train", images, first, "--coco-val", images, second)
    history = train("--resume", folder, "--coco-train", images, path, "--coco-val", images, path)
    assert [row["epoch"] for row in history] == [1, 2] and history[-1]["lr"] == 0
    assert torch.load(folder / "last.pt")["options"]["coco_train"] == [images, str(path)]


def test_a_full_disk_leaves_the_old_checkpoint_and_a_message(tmp_path, monkeypatch, capsys, straight):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def full(content, path):
        path.write_bytes(b"the first half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", full)
    message = refused(capsys, "--resume", folder)
    assert re.search(rf"error: {folder}/(last|best).pt can't be written.*unexpected pos", message)
    assert {path: path.read_bytes() for path in before} == before


# ---- Sections 5, 8 and 9: checkpoints, evaluate, predict -----------------------------------------

@pytest.mark.parametrize("content, message", [
    (None, "No such file"), ("folder", "Is a directory"), (b"<html>Quota exceeded</html>", "is damaged"),
    ([1], "is damaged"), ({"args": Path("made by code")}, "is damaged"), ({1: 2}, "not a DN-DETR checkpoint"),
    ({"model": None}, "not a DN-DETR checkpoint"), ({"model": {"input_proj.bias": 3}}, "class_head.weight"),
    ({"model": {}, "args": 3}, "not a DN-DETR checkpoint"), ({"config": {"hidden_dim": 7}}, "does not fit"),
    ({"config": {"color": 1}}, "does not fit"), ("NaN", "not all weights are finite")], ids=range(12))
def test_foreign_checkpoints_are_refused_and_not_run(
        tmp_path, monkeypatch, capsys, straight, content, message):
    path = tmp_path / "some.pt"
    monkeypatch.chdir(tmp_path)
    if content == "NaN":
        content = torch.load(straight / "last.pt")
        content["model"]["class_head.weight"][2, 3] = math.nan
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        torch.save(content, path)
    for command in ("evaluate", path), ("predict", path, "x.png"), ("--init", path, *SHAPES_RUN[:4]):
        shown = refused(capsys, *command)
        assert message in shown and "some.pt" in shown
        assert not re.search("weights_only|Traceback|pickle", shown)


def test_a_checkpoint_of_other_classes_starts_only_those_anew(tmp_path, straight, capsys):
    saved = torch.load(straight / "last.pt")
    other = dict(enumerate("abcdef"))
    for names, flags in ((saved["names"], []), (other, []), ({3: "a"}, ["--dn-groups", 2])):
        model = train_toy.build_model(options_of("--init", straight / "last.pt", *flags), names)
        own = {"num_classes": len(names)} | ({"dn_groups": 2} if flags else {})
        assert dataclasses.asdict(model.config) == saved["config"] | own
        for name, tensor in model.state_dict().items():
            old = saved["model"][name]
            if names != saved["names"] and name.startswith(("class_head", "label_embedding")):
                # The last row of the label embedding is "unknown", which means the same.
                assert torch.equal(tensor[-1], old[-1]) == (name == "label_embedding.weight")
                assert not torch.equal(tensor[0], old[0]) or len(names) == 1
            else:
                assert torch.equal(tensor, old)
    shutil.copy(straight / "last.pt", tmp_path / "start.pt")
    train("--init", tmp_path / "start.pt", *SHAPES_RUN[:4], "--epochs", 1, "--output-dir", tmp_path)
    (tmp_path / "start.pt").unlink()                           # not needed to resume
    train("--resume", tmp_path)
    paths = save_coco(tmp_path, tiny_coco())
    coco_flags = "--init", straight / "last.pt", "--coco-train", *paths, "--overfit", 3
    assert options_of(*coco_flags).image_size == 64
    assert options_of(*coco_flags, "--image-size", 9).image_size == 9
    message = refused(capsys, *coco_flags, "--num-queries", 9, "--output-dir", tmp_path / "new")
    assert "last.pt does not fit" in message and "anchor_logits" in message


def test_evaluate_uses_the_held_out_images_of_the_run(tmp_path, capsys, monkeypatch, straight):
    objects = [(2, 3, [9, 9, 60, 60], {}), (4, 7, [9, 9, 40, 40], {}), (4, 3, [9, 9, 9, 9], {})]
    val = save_coco(tmp_path / "val", coco({4: (64, 96), 2: (64, 96)}, objects))
    training = save_coco(tmp_path / "train", tiny_coco())
    flags = "--coco-train", *training, "--image-size", 48, "--epochs", 1, *SMALL_MODEL
    train(*flags, "--coco-val", *val, "--output-dir", tmp_path / "run")
    assert re.search(r"cat +AP +\d+\.\d, 2 objects\ndog +AP +\d+\.\d, 1 obj", capsys.readouterr().out)
    train(*flags, "--overfit", 1, "--output-dir", tmp_path / "heart")
    sizes = []
    spy(monkeypatch, train_toy, "normalize", lambda images, *rest: sizes.append(tuple(images.shape[2:])))
    for folder, more, source, count, size in (
            (tmp_path / "run", [], val[1], 2, (72, 48)), (straight, [], "shapes (val)", 4, (64, 64)),
            (tmp_path / "run", ["--image-size", 96], val[1], 2, (144, 96)),
            (tmp_path / "run", ["--coco-val", *training, "--image-size", 96], training[1], 3, (120, 120)),
            (tmp_path / "heart", [], training[1], 1, (48, 60)),
            (tmp_path / "heart", ["--coco-val", *val], val[1], 2, (72, 48))):
        capsys.readouterr()
        main("evaluate", folder / "last.pt", *more)
        shown = capsys.readouterr().out
        assert re.match(rf"{re.escape(source)}: {count} images", shown)
        assert shown.count("Average Precision") == 6 and sizes[-1] == size and " objects\n" in shown
    assert "no effect on shapes" in refused(capsys, "evaluate", straight / "last.pt", "--image-size", 96)


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


def test_predictions_are_in_pixels_of_the_file_over_a_threshold(tmp_path, capsys, monkeypatch, detector):
    exif, folder, read = Image.Exif(), tmp_path / "in", []
    exif[0x0112] = 6
    folder.mkdir()
    Image.new("RGB", (200, 100)).save(folder / "A.JPG")
    Image.new("L", (200, 100)).save(folder / "turned.jpeg", exif=exif)
    for name in ("notes.txt", "._A.JPG"):                      # no image, and what macOS leaves
        (folder / name).write_text("")
    spy(monkeypatch, train_toy, "read_image", lambda path, size, **how: read.append(size))
    for threshold, count in ((0.74, 0), (0.0, 8), (0.72, 4)):
        flags = "--threshold", threshold, "--image-size", 32, "--output-dir", tmp_path
        main("predict", detector, folder, *flags)
        assert len(predictions(tmp_path)) == count and read[-1] == 32
    assert "4 detections" in capsys.readouterr().out
    main("predict", detector, folder, "--output-dir", tmp_path)
    rows, names = predictions(tmp_path), [str(folder / name) for name in ("A.JPG", "turned.jpeg")]
    found = [(row["image_id"], row["category_id"]) for row in rows]
    assert found == [(name, 18) for name in names for _ in "ab"]
    assert rows[0]["bbox"] == pytest.approx([20, 17.5, 100, 25], abs=0.2)
    assert rows[2]["bbox"] == pytest.approx([10, 35, 50, 50], abs=0.2)
    assert rows[0]["score"] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-4)
    assert re.search(r"^2 pictures.*\b4 detections.*\b0.3\b", capsys.readouterr().out.splitlines()[-1])
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(capsys, "predict", detector, tmp_path / "empty")


def test_predict_writes_over_nothing_and_survives_bad_images(tmp_path, capsys, monkeypatch, detector):
    for name in ("in/a.png", "in/b.PNG", "in/c.jpg", "in/c.bmp", "more/c.jpg", "more/C.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:60])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    folders, out = (tmp_path / "more/../in", tmp_path / "more"), tmp_path / "out"
    for images in (folders, [tmp_path / "in/c.jpg"]):          # c.png would be another file of the user
        message = refused(capsys, "predict", detector, *images, "--output-dir", tmp_path / "in")
        assert "holds images to predict: choose another" in message
    command = "predict", detector, "--output-dir", out
    assert "2 of 8 images failed" in refused(capsys, *command, *folders, tmp_path / "absent.png")
    assert {path: path.read_bytes() for path in before} == before
    written = [path.name.lower() for path in out.glob("*.png")]
    assert len({*written}) == len(written) == 6 and len(predictions(out)) == 12
    spy(monkeypatch, train_toy, "read_image", stop_at(2))
    assert "stopped" in refused(capsys, *command, *[tmp_path / "in/a.png"] * 4)
    assert len(predictions(out)) == 4
    monkeypatch.setattr(train_toy, "detect", lambda *arguments: 1 / 0)          # whatever goes wrong
    with pytest.raises(SystemExit, match="5 of 5 images failed"):
        main(*command, tmp_path / "in")
    assert "cut.png: " in capsys.readouterr().out


def test_the_authors_file_is_evaluated_and_is_a_start_at_its_size(tmp_path, capsys):
    weights, path = blank_weights(), tmp_path / "official.pth"
    weights["class_embed.bias"] = torch.full((91,), -9.0)      # every query finds the same dog
    weights["class_embed.bias"][18] = 5.0
    anchor = torch.tensor([28 / 160, 14 / 80, 40 / 160, 20 / 80]).logit()
    weights["refpoint_embed.weight"] = anchor.repeat(12, 1)
    torch.save({"model": weights, "args": argparse.Namespace(**R18_ARGS)}, path)
    data = save_coco(tmp_path, coco({1: (160, 80)}, [(1, 18, [8, 4, 40, 20], {})], [(18, "dog")]))
    evaluation = "evaluate", path, "--image-size", 64
    main(*evaluation, "--coco-val", *data)
    assert re.search(r"area= +all \| maxDets=100 \] = 1.000(?s:.*)dog +AP 100.0", capsys.readouterr().out)
    assert "knows no data: add --coco-val" in refused(capsys, *evaluation)
    started = train_toy.build_model(options_of("--init", path, "--dn-groups", 1), "abcdef")
    assert (started.config.num_queries, started.config.dn_groups, started.config.num_classes) == (12, 1, 6)
    assert_near(started.anchor_logits.weight, weights["refpoint_embed.weight"])
    fine_tuning = options_of("--init", path, "--coco-train", *data, "--overfit", 1)
    assert (fine_tuning.image_size, fine_tuning.lr, fine_tuning.epochs) == (800, 1e-4, 6)
    assert train_toy.load_detector(path)[1]["image_size"] == 800, "of evaluate and predict"


# ---- Several processes ---------------------------------------------------------------------------

def test_an_error_of_a_worker_is_one_line(tmp_path, capsys, monkeypatch):
    paths = save_coco(tmp_path, tiny_coco())
    flags = "--coco-train", *paths, "--coco-val", *paths, "--image-size", 64, *SMALL_MODEL, "--workers", 1
    (tmp_path / "images/8.png").write_bytes((tmp_path / "images/8.png").read_bytes()[:200])
    message = refused(capsys, *flags, "--output-dir", tmp_path / "run")
    assert re.fullmatch("train_toy.py: error: one of the --workers: image .*8.png can't be read.* ", message)
    monkeypatch.setattr(train_toy, "read_image", lambda *arguments: os._exit(1))           # killed
    message = refused(capsys, *flags, "--output-dir", tmp_path / "other")
    assert re.search("--workers: DataLoader worker.*exited unexpectedly", message)


def half_of_the_work(rank, folder):
    torch.set_num_threads(1)
    train_toy.RANK, train_toy.WORLD_SIZE = rank, 2
    join = functools.partial(train_toy.dist.init_process_group, init_method=f"file://{folder}/meet",
                             rank=rank, world_size=2)
    batches, found, losses = [], [], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_toy.dist, "init_process_group", join)
        device = train_toy.pick_device("cpu")
        # The statistics of its batch norm are frozen; live ones are not shared.
        model, part = tiny_model(backbone="resnet18", **NO_NOISE), slice(2 * rank, 2 * rank + 2)
        parallel = train_toy.parallel(model, device)           # gradients are not shared once it is gone
        images, targets = random_images(4, 64, 64)[part], random_targets(3, 1, 0, 2)[part]
        training_loss(parallel(images, None, targets), targets, model.config)["loss"].backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        spy(patched, train_toy, "normalize", lambda x, *_: batches.append((len(x), torch.initial_seed())))
        spy(patched, train_toy, "coco_metrics", lambda dataset, detections, _: found.append(
            [each["image_id"] for each in detections]))
        spy(patched, train_toy, "build_model", lambda *_: train_toy.time.sleep(rank))     # one is late
        spy(patched, torch.Tensor, "backward", lambda loss: losses.append(loss.item()))
        flags = *SHAPES_RUN, "--val-size", 5, "--num-decoder-layers", 1
        history = train(*flags, "--output-dir", folder / "run")
        with pytest.raises(ValueError, match="2 processes can't share --batch-size"):
            train(*SHAPES_RUN, "--batch-size", 3, "--output-dir", folder / "odd")
    torch.save((gradients, batches, found, losses, history), folder / f"{rank}.pt")
    train_toy.dist.destroy_process_group()


def test_two_processes_are_like_one_but_draw_their_own_copies(tmp_path):
    torch.multiprocessing.spawn(half_of_the_work, (tmp_path,), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    gradients, batches, found, losses, histories = zip(*parts)
    model = tiny_model(backbone="resnet18", **NO_NOISE)
    losses_of(model, random_images(4, 64, 64), random_targets(3, 1, 0, 2))["loss"].backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(gradients[0], expected, rtol=1e-3, atol=1e-4)
    for steps in batches:                                      # 2, 2, 1 images, and 3 or 2 held-out ones
        assert [size for size, _ in steps] in ([2, 2, 1, 2, 1] * 2, [2, 2, 1, 2] * 2)
    assert len({seed for steps in batches for _, seed in steps}) == 4, "processes and epochs differ in noise"
    # 6 queries and 6 classes in each of 5 images, from both processes.
    assert found[0] == found[1] == [sorted([*range(5)] * 36)] * 2 and histories[0][0]["AP"] is not None
    assert [row["step"] for row in histories[0]] == [3, 6] and histories[0][-1]["lr"] == 0
    logged = np.mean(losses, 0).reshape(2, 3).mean(1)          # of both processes, in each epoch
    assert [row["loss"] for row in histories[0]] == pytest.approx(logged, rel=1e-5)
    assert not (tmp_path / "odd").exists()


# ---- Section 10: experiments ---------------------------------------------------------------------

def history_of(*precisions, seconds=2.0):
    return [dict.fromkeys(train_toy.CURVES, 0.5) | {
        "epoch": epoch, "seconds": seconds * epoch, "cpu_seconds": 3 * seconds * epoch, "AP": ap}
        for epoch, ap in enumerate(precisions, 1)]


def test_arms_are_compared_with_the_baseline_of_the_same_seed():
    without = [history_of(5, 20, 30), history_of(5, 20, 40), history_of(1, 2, 3)]
    one = [history_of(9, 20, 31), history_of(9, 21, 41), history_of(9, 21, 42)]
    slower = [history_of(10, 40, 50, seconds=4), history_of(10, 30, 50, seconds=4), history_of(10, 20, 40)]
    table = train_toy.results_table({"without denoising": without, "1": one, "5": slower}, "seconds")
    cells = []
    # At equal time, 6 s: 25 against 30, 20 against 40, 40 against 3. Student's t of 3 seeds is 4.3027.
    for values in ((20, 10, 37), (-5, -20, 37), (19, 9, -2), (2, 3, 1)):
        half = 4.3027 * np.std(values, ddof=1) / math.sqrt(3)
        cells.append(f"{np.mean(values):.1f} ± {half:.1f}")
    assert f"| 5 | 50.0 (40.0 to 50.0) | {' | '.join(cells)} |" in table
    assert f"| without denoising | 30.0 (3.0 to 40.0) {'| 0.0 ± 0.0 ' * 3}| 3.0 ± 0.0 |" in table
    table = train_toy.results_table({"without": [history_of(9)], "5": [history_of(1)]}, "cpu_seconds")
    assert "| 1.0 (1.0 to 1.0) | -8.0 ± nan | -8.0 ± nan | -8.0 ± nan | not by all |" in table


def test_experiments_give_every_run_its_settings_and_continue_it(tmp_path, monkeypatch, capsys):
    asked, clocks, grid = [], [], {"without denoising": 0.4, "5 groups": 0.5}
    rates = {"normal": {"without denoising": 0.1, "1 group, no mask": 0.2, "5 groups": 0.3}, "grid": grid}
    monkeypatch.setattr(train_toy, "RATES", rates)
    monkeypatch.setattr(train_toy, "train", lambda options, device: (
        asked.append(options) or history_of(3.0, options.seed)))
    spy(monkeypatch, train_toy, "results_table", lambda runs, clock: clocks.append(clock))
    flags = "--epochs", 2, "--train-size", 8, "--batch-size", 2, "--output-dir", tmp_path
    main("ablate", "--seeds", 4, 9, *flags)
    expected = {  # dn_groups, label_noise, dn_mask, lr
        "without denoising": (0, 0.2, True, 0.1), "1 group, boxes only": (1, 0.0, True, 0.3),
        "1 group": (1, 0.2, True, 0.3), "1 group, no mask": (1, 0.2, False, 0.2),
        "2 groups": (2, 0.2, True, 0.3), "5 groups": (5, 0.2, True, 0.3), "10 groups": (10, 0.2, True, 0.3)}
    configs = [train_toy.build_model(each, "abcdef").config for each in asked]
    got = [(config.dn_groups, config.label_noise, config.dn_mask, each.lr, each.seed)
           for config, each in zip(configs, asked)]
    assert got == [(*values, seed) for seed in (4, 9) for values in expected.values()]
    assert {(each.anchors, each.epochs, each.train_size, each.val_size, each.batch_size, each.resume)
            for each in asked} == {("normal", 2, 8, 200, 2, "")}
    content = json.loads((tmp_path / "ablate-normal.json").read_text())
    assert list(content["runs"]) == list(expected) and (tmp_path / "ablate-normal.png").stat().st_size > 5000
    assert [history[-1]["AP"] for history in content["runs"]["2 groups"]] == [4.0, 9.0]
    assert "| 10 groups | 6.5 (4.0 to 9.0) |" in capsys.readouterr().out and clocks == ["cpu_seconds"]
    flags = "compare", "--seeds", 4, *flags, "--anchors", "grid"
    train_toy.experiment(options_of(*flags), torch.device("cuda"))
    assert [(each.dn_groups, each.lr) for each in asked[14:]] == [(0, 0.4), (5, 0.5)]
    assert {each.anchors for each in asked[14:]} == {"grid"} and clocks[1:] == ["seconds"]
    folders = [Path(each.output_dir) for each in asked]
    assert len({*folders}) == 16
    folders[15].mkdir(parents=True)                            # it was stopped
    torch.save({"options": vars(asked[15])}, folders[15] / "last.pt")
    main(*flags)
    assert [each.resume for each in asked[16:]] == ["", str(folders[15])]
    for more in ("--epochs", 3), ("--train-size", 9), ("--val-size", 9), ("--batch-size", 3):
        main(*flags, *more)
        assert Path(asked[-1].output_dir) not in folders and not asked[-1].resume


# ==== README and notebook =========================================================================

def readme():
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_commands_of_the_readme_are_accepted(monkeypatch):
    monkeypatch.setattr(train_toy, "read_checkpoint", lambda path: {"options": {"epochs": 1}})
    commands = re.findall(r"python train_toy\.py(?![^\n]*`[^`]*$)([^`\n]*)", readme() + train_toy.__doc__)
    assert len(commands) >= 10
    for command in commands:
        flags = re.split(r" {3,}|&|\.\.\.", command)[0]        # without the remark after it
        train_toy.parse_options(shlex.split(flags, comments=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_python_snippets_run(dtype):
    targets = [target | {"boxes": target["boxes"].to(dtype)} for target in random_targets(1, 3)]
    for snippet in re.findall(r"```python\n(.*?)```", readme(), re.DOTALL):
        given = {name: torch.cat([target[name] for target in targets]) for name in ("labels", "boxes")}
        given |= {"targets": targets, "num_classes": CLASSES, "num_queries": 7, "width": 32}
        names = vars(dn_detr) | given | {"label_embedding": nn.Embedding(CLASSES + 1, 32)}
        exec(snippet, names)
    assert torch.equal(names["blocked"], dn_detr.dn_attention_mask(5, 3, 7))
    slots, empty = names["slots"], names["empty"]
    assert torch.equal(empty[:, :15], ~slots.is_real) and empty.shape == (2, 22) and not empty[:, 15:].any()


def notebook_cells(kind):
    cells = json.loads((FOLDER / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def test_the_notebook_is_stored_as_executed_without_a_warning():
    cells = notebook_cells("code")
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)


def test_numbers_in_the_prose_of_the_notebook_are_those_of_its_cells():
    prose = " ".join("".join(cell["source"]) for cell in notebook_cells("markdown"))
    known = r"https?:\S+|arXiv \S+|CVPR \d+|Sec\. [\d.]+|\| Why .*|#\d+|24\.0 AP .* 43\.4 .* 42\.2 .*Table 4"
    prose = re.sub(known, "", prose)                           # the paper's
    shown = json.dumps([[cell["source"], [output.get("text", output.get("data", {}).get("text/markdown"))
                                          for output in cell["outputs"]]] for cell in notebook_cells("code")])
    numbers = {number.replace(",", "") for number in re.findall(r"\d+[.,]\d+|\d\d+", prose)}
    assert len(numbers) > 5 and numbers <= {*re.findall(r"\d+\.\d+|\d+", shown)}


def test_every_section_of_the_notebook_runs_alone_and_changes_no_asset(tmp_path, monkeypatch):
    import nbclient
    import nbformat
    for name in ("dn_detr.py", "train_toy.py"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copytree(FOLDER / "assets", tmp_path / "assets")
    notebook = nbformat.read(FOLDER / "walkthrough.ipynb", as_version=4)
    forget = "[globals().pop(name) for name in {*globals()} - kept if name[0] != '_']"
    sections = [number for number, cell in enumerate(notebook.cells) if cell.source.startswith("## ")]
    for number in reversed(sections):
        notebook.cells.insert(number, nbformat.v4.new_code_cell(forget))       # what other sections made
    notebook.cells.insert(3, nbformat.v4.new_code_cell("kept = {*globals(), 'kept'}"))     # the set-up's
    monkeypatch.setenv("DN_DETR_FAST", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for path in (FOLDER / "assets").iterdir():
        assert (tmp_path / "assets" / path.name).read_bytes() == path.read_bytes()
