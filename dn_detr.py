r"""DN-DETR in one file: "Accelerate DETR Training by Introducing Query DeNoising"
(Li et al., CVPR 2022). Section, equation and table numbers are those of arXiv 2203.01305.

The problem. A DETR turns N learned queries into N boxes, and Hungarian matching decides anew at
every step which query owns which object. Early in training that choice keeps changing, so a query
is pulled to one object now and to another a moment later.

The idea. Feed the decoder a second set of queries too: ground-truth boxes and labels with noise
on them. Who owns those is known, so they need no matching; the same decoder learns to undo the
noise while it learns to detect. At inference they are simply not there.

One training step:

    objects     = ground-truth labels and boxes                                    (K objects)
    noisy       = P copies of every object: boxes jittered, some labels redrawn     sections 3, 4
    queries     = noisy copies + N learned anchors                      denoising first, Q = P*M + N
    mask        = learned anchors may not see the copies (they hold the answer),       section 5
                  nor one group another (averaged, copies of one object give it away)
    boxes, logits = decoder(queries, image, mask)           every layer refines boxes  sections 6-10
    pairs_match = Hungarian(predictions of the N anchors, objects)         searched      section 11
    pairs_dn    = copy k of object k                                       known         section 4
    loss        = set_loss(pairs_match) + set_loss(pairs_dn)               one loss      section 12

Shapes, the same letters everywhere:

    B images         K objects in the batch       M objects in its fullest image (one group)
    P groups         N matching queries           Q = P*M + N queries of the decoder
    D hidden width   S image tokens               C classes            L decoder layers
    boxes are (cx, cy, w, h) in [0, 1] relative to their image; masks are True where blocked

What differs from the authors' code (github.com/IDEA-Research/DN-DETR, model dn_dab_detr). Files as
their code saves them load (section 14), and on the same weights outputs, losses and gradients
agree (test_dn_detr.py), so this is all:

    D1 an empty slot (an image with fewer objects than M) is seen by nobody. In the authors' code
       it can be attended to, and an image's loss depends on the other images of its batch
    D2 centre and size noise have a knob each, lambda_1 and lambda_2; they share one, the paper has two
    D3 dn_max_queries (off) lowers the number of groups in crowded batches
    D4 the denoising normaliser is averaged over processes, as the matching one is; theirs is not
    D5 backbone="small" or frozen_norm=False (not the defaults) can learn from random weights
    D6 anchor_start, anchor_temperature, position_frequency, cell_centers, local_start (off): an
       easier start for small images
    D7 not here: segmentation, deformable attention, Swin backbones

Lines that denoising adds to DAB-DETR outside its own sections 3-5 end in [DN]: delete them and
what runs is DAB-DETR. Ten minutes? Read sections 3 to 5: they are the paper.
"""
import argparse
import dataclasses
import math
import os
import re
from collections import OrderedDict
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models import get_model, resnet
from torchvision.ops import box_convert, sigmoid_focal_loss

# ---------------------------------------------------------------------------------------------
# 1. Configuration
# ---------------------------------------------------------------------------------------------

ACTIVATIONS = {"prelu": nn.PReLU, "relu": nn.ReLU, "gelu": nn.GELU}


@dataclasses.dataclass(frozen=True)
class DNDETRConfig:
    """Everything there is to choose. The defaults are the paper's R50 model on COCO.

    Raises ValueError, naming the value, where a choice is impossible.
    """
    num_classes: int = 91           # C; labels are 0..C-1, no class for "nothing". COCO's raw ids end at 90
    num_queries: int = 300          # N
    hidden_dim: int = 256           # D
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6     # L
    dim_feedforward: int = 2048
    dropout: float = 0.0
    activation: str = "prelu"       # "prelu" (one learned slope a layer), "relu" or "gelu"
    num_patterns: int = 0           # > 0: every anchor is used once per learned pattern (Anchor DETR)

    backbone: str = "resnet50"      # a torchvision ResNet, or "small"
    dilation: bool = False          # True: DC5, the last stage keeps its resolution (stride 16, not 32)
    frozen_norm: bool = True        # ResNets: batch norm fixed, stem and layer1 too (pretrained weights)
    small_widths: tuple = (32, 64, 128)  # "small": one stage each, every stage halves the resolution

    dn_groups: int = 5              # P       Sec. 4.4; 0 is DAB-DETR
    label_noise: float = 0.2        # gamma   chance that a label is redrawn
    center_noise: float = 0.4       # lambda_1  the centre moves by at most this times half the side
    size_noise: float = 0.4         # lambda_2  a side is scaled by something in 1 +- this
    dn_max_queries: int = 0         # > 0: as many groups as fit into this many queries, at least 1
    dn_size_multiple: int = 1       # M is rounded up to a multiple: fewer shapes for torch.compile

    image_temperature: float = 20.0      # of the sine encoding of pixels; DAB-DETR wants 20 for both,
    anchor_temperature: float = 10000.0  # the authors' code has 10000 here, which their weights expect
    position_frequency: float = 1.0      # multiplies both encodings' angles; > 1 for coarse feature maps
    cell_centers: bool = False           # True: a feature cell is where its centre is, not its far corner
    anchor_start: str = "normal"         # anchors start as N(0, 1) before the sigmoid, or on a "grid"
    local_start: bool = False            # True: cross-attention looks near the anchor from step 0

    cost_class: float = 2.0         # matching costs
    cost_box: float = 5.0
    cost_giou: float = 2.0
    loss_class: float = 1.0         # loss weights, the same for matching and denoising
    loss_box: float = 5.0
    loss_giou: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self):
        def require(condition, message):
            if not condition:
                raise ValueError(message)

        for name in ("num_classes", "num_queries", "hidden_dim", "num_heads", "num_decoder_layers",
                     "dim_feedforward", "dn_size_multiple"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("num_encoder_layers", "num_patterns", "dn_groups", "dn_max_queries"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, it must not be negative")
        for name in ("label_noise", "center_noise", "size_noise"):
            check_noise(name, getattr(self, name))
        for name in ("image_temperature", "anchor_temperature", "position_frequency"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, it must be positive")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}, it must be in [0, 1)")
        require(self.small_widths, "small_widths is empty, it needs a width for each stage")
        require(self.hidden_dim % self.num_heads == 0 and self.hidden_dim % 4 == 0,
                f"hidden_dim {self.hidden_dim} must be divisible by num_heads {self.num_heads}, and "
                "by 4 (sine and cosine, x and y)")
        backbones = ("small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
        for name, allowed in (("activation", ACTIVATIONS), ("anchor_start", ("normal", "grid")),
                              ("backbone", backbones)):
            require(getattr(self, name) in allowed,
                    f"{name} is {getattr(self, name)!r}, choose one of {', '.join(allowed)}")
        require(not (self.dilation and self.backbone in ("small", "resnet18", "resnet34")),
                f"dilation (DC5) needs resnet50 or a larger ResNet, not {self.backbone!r}")
        require(not self.local_start or self.anchor_temperature == self.image_temperature,
                f"local_start compares anchors with pixels: anchor_temperature {self.anchor_temperature} "
                f"must be image_temperature {self.image_temperature}")


# ---------------------------------------------------------------------------------------------
# 2. Boxes
# ---------------------------------------------------------------------------------------------


def inverse_sigmoid(x, eps=1e-3):
    """Logit of x in [0, 1]. A box is refined by adding to its logits, so that its centre stays in the
    image and its sides between 0 and 1.

    eps keeps the logit within +-6.9 and is part of the trained model: the weights expect 1e-3.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def generalized_iou(boxes, others, eps=1e-6):
    """Generalised IoU in (-1, 1] of cxcywh boxes [..., 4] and [..., 4] -> [...], with broadcasting.

    torchvision's is pairwise, or has an eps of 1e-7. The authors' 1e-6 is more than rounding on a box
    of 5 pixels, and numbers should agree with theirs.
    """
    ax0, ay0, ax1, ay1 = box_convert(boxes, "cxcywh", "xyxy").unbind(-1)
    bx0, by0, bx1, by1 = box_convert(others, "cxcywh", "xyxy").unbind(-1)
    intersection = ((torch.min(ax1, bx1) - torch.max(ax0, bx0)).clamp(min=0)
                    * (torch.min(ay1, by1) - torch.max(ay0, by0)).clamp(min=0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    hull = (torch.max(ax1, bx1) - torch.min(ax0, bx0)) * (torch.max(ay1, by1) - torch.min(ay0, by0))
    return intersection / (union + eps) - (hull - union) / (hull + eps)


# ---------------------------------------------------------------------------------------------
# 3. Noise (Sec. 4.3): everything from here to section 5 is the paper's contribution
# ---------------------------------------------------------------------------------------------


def check_noise(name, value):
    """Raise ValueError unless a noise knob is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, it must be in [0, 1]: 0 is no noise, and above 1 a centre "
                         "leaves its box, a size turns negative, a chance exceeds certainty")


def noise_labels(labels, num_classes, label_noise, generator=None):
    """Labels [K] (long, 0..C-1) with each one redrawn with probability gamma = `label_noise`.

    The new label is drawn from all C classes, so it may be the old one again: the rate at which
    labels really change is gamma * (1 - 1/C). Never draws the "unknown" row C of the embedding.
    Inputs are left alone. Raises ValueError for a gamma outside [0, 1].
    Sec. 4.3; in the authors' prepare_for_dn.
    """
    check_noise("label_noise", label_noise)
    redrawn = torch.rand(labels.shape, generator=generator, device=labels.device) < label_noise
    drawn = torch.randint(num_classes, labels.shape, generator=generator, device=labels.device)
    return torch.where(redrawn, drawn, labels)


def noise_boxes(boxes, center_noise, size_noise, generator=None):
    """Boxes [K, 4] (cxcywh in [0, 1]), each with its own uniform shift and scale, clamped to [0, 1] as
    cx, cy, w, h: a corner may leave the image, as in the authors' code.

    While lambda_1 = `center_noise` < 1 the noised centre stays inside the true box: the copy can
    still tell which object it was. Inputs are left alone. Raises ValueError for a lambda outside
    [0, 1]. Sec. 4.3; in the authors' prepare_for_dn.
    """
    check_noise("center_noise", center_noise)
    check_noise("size_noise", size_noise)
    uniform = torch.rand(boxes.shape, generator=generator, device=boxes.device, dtype=boxes.dtype) * 2 - 1
    center, size = boxes.split(2, dim=-1)                            # [K, 2] each
    # |dx| < lambda_1 w / 2  and  |dy| < lambda_1 h / 2
    noised_center = center + uniform[:, :2] * center_noise * size / 2
    # a new side in [(1 - lambda_2) w, (1 + lambda_2) w], and the same for h
    noised_size = size + uniform[:, 2:] * size_noise * size
    return torch.cat([noised_center, noised_size], dim=-1).clamp(0, 1)


# ---------------------------------------------------------------------------------------------
# 4. Groups (Sec. 4.4): P copies of the objects, laid out in slots
# ---------------------------------------------------------------------------------------------


class DenoisingSlots(NamedTuple):
    """Who came from whom: entry i says that decoder query `slot[i]` of image `image[i]` is a noised
    copy of object `source[i]`. Objects count through the whole batch, image after image.

    Two images with 1 and 3 objects, a | b c d, in P = 2 groups of M = 3 slots (- is empty):

        image 0    a - -  a - -        image  0 1 1 1  0 1 1 1
        image 1    b c d  b c d        slot   0 0 1 2  3 3 4 5
                   g 0    g 1          source 0 1 2 3  0 1 2 3
    """
    num_groups: int   # P
    group_size: int   # M
    image: Tensor     # [P*K] long
    slot: Tensor      # [P*K] long, 0 .. P*M-1
    source: Tensor    # [P*K] long, 0 .. K-1
    is_real: Tensor   # [B, P*M] bool, False = empty slot


def assign_slots(counts, num_groups, max_queries=0, size_multiple=1, device=None):
    """DenoisingSlots for images that hold `counts` objects (list of int).

    `max_queries` > 0 lowers P until P*M fits, but not below 1. `size_multiple` rounds M up.
    Raises ValueError for negative numbers or no images. Sec. 4.4; authors: prepare_for_dn.
    """
    if not counts or min(num_groups, max_queries, *counts) < 0 or size_multiple < 1:
        raise ValueError(f"num_groups {num_groups}, max_queries {max_queries} and counts {list(counts)} must "
                         f"not be negative, counts not empty, size_multiple {size_multiple} at least 1")
    group_size = math.ceil(max(counts) / size_multiple) * size_multiple              # M
    if max_queries and group_size:
        num_groups = min(num_groups, max(1, max_queries // group_size))              # P
    # Index arithmetic happens on the CPU: an accelerator would have to tell us sizes, and wait.
    counts = torch.tensor(counts)
    image = torch.arange(len(counts)).repeat_interleave(counts)          # [K]  counts 1, 3 -> 0 1 1 1
    first_of_image = counts.cumsum(0) - counts                                       # [B]  0 1
    within_image = torch.arange(len(image)) - first_of_image[image]                  # [K]  0 0 1 2
    first_slot = torch.arange(num_groups)[:, None] * group_size                      # [P, 1]
    slot = (first_slot + within_image).flatten()                                     # [P*K]
    image = image.repeat(num_groups)                                                 # [P*K]
    source = torch.arange(len(within_image)).repeat(num_groups)                      # [P*K]
    is_real = torch.zeros(len(counts), num_groups * group_size, dtype=torch.bool)    # [B, P*M]
    is_real[image, slot] = True
    tensors = (tensor.to(device, non_blocking=True) for tensor in (image, slot, source, is_real))
    return DenoisingSlots(num_groups, group_size, *tensors)


# ---------------------------------------------------------------------------------------------
# 5. Attention mask (Eq. 7)
# ---------------------------------------------------------------------------------------------


def dn_attention_mask(num_groups, group_size, num_queries, device=None):
    """bool [Q, Q], Q = P*M + N, denoising queries first; True = this row may not look at that column.

    P = 2 groups (0, 1) of M = 2, N = 3 matching queries (m):

              0 0 1 1 m m m
            0 . . x x . . .       a copy sees its own group and the matching queries,
            0 . . x x . . .       which know nothing that it may not know
            1 x x . . . . .       another group would show it the same object with other noise:
            1 x x . . . . .       the average of the two is nearly the answer
            m x x x x . . .       matching queries would read the answer off the copies, and
            m x x x x . . .       fail at inference, when there are none
            m x x x x . . .

    Queries meet in self-attention only, so the mask is needed there and nowhere else. Eq. 7 with
    a_ij = 1 as True, which is also the meaning in torch.nn.MultiheadAttention (but the opposite of
    scaled_dot_product_attention). Raises ValueError for negative sizes. Authors: prepare_for_dn.
    """
    if min(num_groups, group_size, num_queries) < 0:
        raise ValueError(f"num_groups {num_groups}, group_size {group_size} and num_queries {num_queries} "
                         "must not be negative")
    num_denoising = num_groups * group_size
    query = torch.arange(num_denoising + num_queries, device=device)
    is_denoising = query < num_denoising
    # Matching queries get a number that is no denoising query's group. (M is 0 in an empty batch.)
    group = torch.where(is_denoising, query // max(group_size, 1), num_groups)
    return is_denoising[None, :] & (group[:, None] != group[None, :])                # [Q, Q]


# ---------------------------------------------------------------------------------------------
# 6. Positions
# ---------------------------------------------------------------------------------------------


def sine_encoding(coordinates, width, temperature, frequency=1.0):
    """[..., n] numbers in [0, 1] -> [..., n * width], sines and cosines interleaved.
    Authors: gen_sineembed_for_position."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=coordinates.device) / width
    angle = coordinates[..., None] * (2 * math.pi * frequency) / temperature ** exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


def pixel_coordinates(padding, cell_centers=False):
    """Padding [B, H, W] (True = padding) -> (y, x) of every cell in (0, 1], [B, H, W, 2]; meaningless
    where padded, which nobody looks at. Authors: position_encoding.py.

    Counts valid cells only, so that 1 is the image's own last row and column, whatever the padding.
    The authors take a cell's far corner; on an 8x8 map its centre is a sixteenth of the image away.
    """
    valid = (~padding).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    shift = 0.5 if cell_centers else 0.0
    return torch.stack([(y - shift) / (y[:, -1:, :] + 1e-6), (x - shift) / (x[:, :, -1:] + 1e-6)], dim=-1)


# ---------------------------------------------------------------------------------------------
# 7. Backbone and encoder: image -> tokens
# ---------------------------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """torchvision.ops.FrozenBatchNorm2d, [B, C, H, W] -> the same, that works in place and in its
    input's dtype: under autocast theirs turns bfloat16 into float32, for twice the memory."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((num_features,), float(value)))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x.mul_(scale[:, None, None].to(x.dtype)).add_(shift[:, None, None].to(x.dtype))


def build_backbone(config):
    """Image [B, 3, H, W] -> features [B, channels, H/stride, W/stride]; returns (module, channels), with
    random weights: pretrained ones are loaded by the caller."""
    if config.backbone == "small":
        return small_backbone(config.small_widths), config.small_widths[-1]
    norm = FrozenBatchNorm if config.frozen_norm else nn.BatchNorm2d
    network = get_model(config.backbone, weights=None, norm_layer=norm,
                        replace_stride_with_dilation=[False, False, config.dilation])
    channels = network.fc.in_features
    if config.frozen_norm:
        # Frozen statistics promise pretrained weights, whose first stages are good as they are (DETR).
        for stage in (network.conv1, network.layer1):
            stage.requires_grad_(False)
    stages = OrderedDict(network.named_children())
    del stages["avgpool"], stages["fc"]
    return nn.Sequential(stages), channels


def small_backbone(widths):
    """[B, 3, H, W] -> [B, widths[-1], *, *], half the resolution after every width. A convolution and
    residual blocks with live batch norm: learns from random weights in minutes."""
    layers = [nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    for narrow, wide in pairwise(widths):
        shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, 2, bias=False), nn.BatchNorm2d(wide))
        layers.append(resnet.BasicBlock(narrow, wide, stride=2, downsample=shortcut))
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """Linear layers with ReLU between them: MLP(D, D, 4) has two, [..., D] -> [..., 4]."""

    def __init__(self, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*ends) for ends in pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The second half of every layer, each token by itself: [B, *, D] -> [B, *, D]."""

    def __init__(self, config):
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_dim, config.dim_feedforward)
        self.activation = ACTIVATIONS[config.activation]()
        self.linear2 = nn.Linear(config.dim_feedforward, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class EncoderLayer(nn.Module):
    """Image tokens attend to each other; positions go into queries and keys, not into values.
    x and positions [B, S, D], padding bool [B, S] or None -> [B, S, D]."""

    def __init__(self, config):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(config.hidden_dim, config.num_heads,
                                                    dropout=config.dropout, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = FeedForward(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_dim), nn.LayerNorm(config.hidden_dim)

    def forward(self, x, positions, padding):
        placed = x + positions
        attended, _ = self.self_attention(placed, placed, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.feed_forward(x))


class Encoder(nn.Module):
    """[B, S, D] tokens -> [B, S, D]. Before every layer the positions are rescaled by what the token
    sees now, feature by feature."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        if self.layers:
            self.position_scale = MLP(config.hidden_dim, config.hidden_dim, config.hidden_dim)

    def forward(self, x, positions, padding):
        for layer in self.layers:
            x = layer(x, positions * self.position_scale(x), padding)
        return x


# ---------------------------------------------------------------------------------------------
# 8. Decoder layer
# ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention over projected inputs. Keys may be wider than values (cross-attention)."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, query, key, value, blocked=None):
        """[B, Q, E], [B, S, E], [B, S, D], blocked broadcastable to [B, 1, Q, S] -> [B, Q, D]."""
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)   # [B, heads, *, *]
                             for x in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=None if blocked is None else ~blocked,      # SDPA: True = look
            dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Queries talk to each other, then look at the image (conditional cross-attention), then think."""

    def __init__(self, config, is_first):
        super().__init__()
        width = config.hidden_dim
        self.num_heads = config.num_heads
        # Content ("what") and position ("where") have projections of their own.
        self.self_query_content, self.self_query_position = nn.Linear(width, width), nn.Linear(width, width)
        self.self_key_content, self.self_key_position = nn.Linear(width, width), nn.Linear(width, width)
        self.self_value = nn.Linear(width, width)
        self.self_attention = Attention(config)

        self.cross_query_content, self.cross_query_sine = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_key_content, self.cross_key_position = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_value = nn.Linear(width, width)
        self.cross_attention = Attention(config)
        # In the first layer the content says nothing yet, so position is added to it.
        self.cross_query_position = nn.Linear(width, width) if is_first else None

        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, query_position, query_sine, memory, memory_position, blocked, padding):
        """x, query_position, query_sine [B, Q, D]; memory, memory_position [B, S, D];
        blocked [B, 1, Q, Q] or None: who may not see whom; padding [B, 1, 1, S] or None."""
        # Self-attention, masked (section 5).
        query = self.self_query_content(x) + self.self_query_position(query_position)
        key = self.self_key_content(x) + self.self_key_position(query_position)
        x = self.norm1(x + self.dropout(self.self_attention(query, key, self.self_value(x), blocked)))

        # Cross-attention: content and sine halves stay apart in every head, so that their products
        # add up to "looks right" + "is in the right place".
        query, key = self.cross_query_content(x), self.cross_key_content(memory)
        key_position = self.cross_key_position(memory_position)
        if self.cross_query_position is not None:
            query, key = query + self.cross_query_position(query_position), key + key_position
        query = self.join_heads(query, self.cross_query_sine(query_sine))            # [B, Q, 2D]
        key = self.join_heads(key, key_position)                                     # [B, S, 2D]
        attended = self.cross_attention(query, key, self.cross_value(memory), padding)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))

    def join_heads(self, content, position):
        """Two [B, *, D] -> [B, *, 2D] in which each head holds its content, then its position."""
        heads = (x.unflatten(-1, (self.num_heads, -1)) for x in (content, position))
        return torch.cat(list(heads), dim=-1).flatten(-2)


# ---------------------------------------------------------------------------------------------
# 9. Decoder: anchors, refined layer by layer (DAB-DETR)
# ---------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A query is an anchor box (where to look) and a content vector (what was found there)."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_dim
        self.layers = nn.ModuleList(
            DecoderLayer(config, is_first=index == 0) for index in range(config.num_decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.anchor_mlp = MLP(2 * width, width, width)      # sine of a whole anchor -> its position query
        self.position_scale = MLP(width, width, width)      # content decides which frequencies matter
        self.reference_size = MLP(width, width, 2)          # content decides how wide and high to look

    def forward(self, x, anchor_logits, memory, memory_position, blocked, padding, box_head):
        """x [B, Q, D], anchor_logits [B, Q, 4], memory, memory_position, blocked and padding as in
        DecoderLayer -> normed outputs [L, B, Q, D] and, for each layer, the anchors it started from
        [L, B, Q, 4] (cxcywh in [0, 1])."""
        anchors = anchor_logits.float().sigmoid()
        outputs, starts = [], [anchors]
        for index, layer in enumerate(self.layers):
            query_position, query_sine = self.encode_anchors(anchors, x, is_first=index == 0)
            x = layer(x, query_position, query_sine, memory, memory_position, blocked, padding)
            outputs.append(self.norm(x))
            if index < len(self.layers) - 1:
                refined = (box_head(x).float() + inverse_sigmoid(anchors)).sigmoid()
                # As in the authors' code, the head sees x here and norm(x) in DNDETR.forward: the next
                # layer starts near, not exactly at, the box that this layer predicts. It looks from a
                # detached copy, so that its attention can't steer this layer, but its box is this
                # start plus an offset, and through `starts` its loss does reach this layer.
                anchors = refined.detach()
                starts.append(refined)
        return torch.stack(outputs), torch.stack(starts)

    def encode_anchors(self, anchors, x, is_first):
        """Anchors [B, Q, 4], content x [B, Q, D] -> position queries for self- and cross-attention,
        [B, Q, D] each."""
        config = self.config
        sine = sine_encoding(anchors[..., [1, 0, 2, 3]], config.hidden_dim // 2,     # y, x, w, h
                             config.anchor_temperature, config.position_frequency)   # [B, Q, 2D]
        center_sine = sine[..., :config.hidden_dim]                                  # y, x  [B, Q, D]
        if not is_first:
            center_sine = center_sine * self.position_scale(x)
        # Width- and height-modulated attention (DAB-DETR Sec. 4.4): dividing by the anchor's width
        # flattens the attention along x, so that wide anchors look wide.
        looked_for = self.reference_size(x).float().sigmoid()                        # w, h  [B, Q, 2]
        modulation = (looked_for / anchors[..., 2:]).flip(-1)       # h, w: the sine has y before x
        center_sine = center_sine * modulation.repeat_interleave(config.hidden_dim // 2, dim=-1)
        return self.anchor_mlp(sine), center_sine


# ---------------------------------------------------------------------------------------------
# 10. The model
# ---------------------------------------------------------------------------------------------


class DNDETR(nn.Module):
    """images [B, 3, H, W] (float, normalised), padding_mask bool [B, H, W] (True = padding) and, in
    training, targets -> dict of predictions.

    targets: one dict per image, {"labels": long [n] in 0..C-1, "boxes": float [n, 4] cxcywh in
    [0, 1]}; n may be 0; they may stay on the CPU. Denoising runs exactly when targets are given, the
    model is in training mode (which also makes live batch norm use batch statistics) and dn_groups > 0.

    Returns pred_logits [B, N, C] and pred_boxes [B, N, 4] (cxcywh in [0, 1]) of the last layer's
    matching queries, all_logits and all_boxes [L, B, N, ...] of every layer; with denoising also
    dn_logits [L, B, P*M, C], dn_boxes [L, B, P*M, 4] and dn_slots (DenoisingSlots).
    With num_patterns > 0, N is num_queries * num_patterns.

    Raises ValueError for images, masks and (where denoising runs) targets of the wrong shape or type;
    their values are checked as long as they are on the CPU. Sec. 4; authors: DABDETR.
    """

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_dim
        self.backbone, channels = build_backbone(config)
        self.input_projection = nn.Conv2d(channels, width, kernel_size=1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.class_head = nn.Linear(width, config.num_classes)
        self.box_head = MLP(width, width, width, 4)
        self.anchors = nn.Embedding(config.num_queries, 4)                           # before the sigmoid
        # One row per class for noised labels, and row C, "unknown", for the matching queries. One
        # column is left free for the indicator (Sec. 4.5): 1 in a denoising query, 0 in a matching one.
        self.label_embedding = nn.Embedding(config.num_classes + 1, width - 1)                   # [DN]
        if config.num_patterns:
            self.patterns = nn.Embedding(config.num_patterns, width)
        self.reset_parameters()

    def reset_parameters(self):
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_head.bias, -math.log(99))    # every class starts at probability 0.01
        nn.init.zeros_(self.box_head.layers[-1].weight)           # every box starts at its anchor
        nn.init.zeros_(self.box_head.layers[-1].bias)
        if self.config.anchor_start == "grid":
            with torch.no_grad():
                self.anchors.weight.copy_(inverse_sigmoid(grid_anchors(self.config.num_queries)))
        if self.config.local_start:
            self.start_local()

    @torch.no_grad()
    def start_local(self):
        """Sine parts of query and key start as one rotation (times 2: a sharper peak) and the scales of
        positions as 1, so that scores, summed over the heads, are those of the encodings themselves:
        largest at the anchor."""
        for layer in self.decoder.layers:
            nn.init.orthogonal_(layer.cross_key_position.weight, gain=2)
            nn.init.zeros_(layer.cross_key_position.bias)
            layer.cross_query_sine.load_state_dict(layer.cross_key_position.state_dict())
        scales = [self.decoder.position_scale]
        if self.encoder.layers:
            scales.append(self.encoder.position_scale)
        for scale in scales:
            nn.init.zeros_(scale.layers[-1].weight)
            nn.init.ones_(scale.layers[-1].bias)

    def forward(self, images, padding_mask=None, targets=None):
        check_images(images, padding_mask, self.input_projection.weight.dtype)
        memory, memory_position, padding = self.encode_image(images, padding_mask)
        content, anchors = self.matching_queries(len(images))          # [B, N, D], [B, N, 4]
        slots, blocked = None, None
        if self.training and targets is not None and self.config.dn_groups:                      # [DN]
            check_targets(targets, len(images), self.config.num_classes)                         # [DN]
            slots, dn_content, dn_anchors = self.denoising_queries(targets, images.device)       # [DN]
            blocked = self.blocked_queries(slots, content.shape[1])    # [B, 1, Q, Q]            # [DN]
            content = torch.cat([dn_content, content], dim=1)          # [B, Q, D]               # [DN]
            anchors = torch.cat([dn_anchors, anchors], dim=1)          # [B, Q, 4]               # [DN]
        hidden, starts = self.decoder(content, anchors, memory, memory_position, blocked, padding,
                                      self.box_head)
        logits = self.class_head(hidden).float()                                     # [L, B, Q, C]
        boxes = (self.box_head(hidden).float() + inverse_sigmoid(starts)).sigmoid()  # [L, B, Q, 4]
        outputs = {}
        if slots is not None:                                                                    # [DN]
            num_denoising = slots.num_groups * slots.group_size        # P*M                     # [DN]
            outputs["dn_logits"], logits = split_queries(logits, num_denoising)                  # [DN]
            outputs["dn_boxes"], boxes = split_queries(boxes, num_denoising)                     # [DN]
            outputs["dn_slots"] = slots                                                          # [DN]
        return outputs | {"pred_logits": logits[-1], "pred_boxes": boxes[-1],
                          "all_logits": logits, "all_boxes": boxes}

    def encode_image(self, images, padding_mask):
        """-> tokens [B, S, D], their positions [B, S, D], padding [B, 1, 1, S] (None: there is none)."""
        features = self.input_projection(self.backbone(images))                      # [B, D, h, w]
        if padding_mask is None:
            padding = features.new_zeros(features[:, 0].shape, dtype=torch.bool)
        else:
            # nearest pixel; [None] because interpolate wants channels, and the batch will do
            padding = F.interpolate(padding_mask[None].float(), features.shape[-2:])[0].bool()
        config = self.config
        positions = sine_encoding(pixel_coordinates(padding, config.cell_centers), config.hidden_dim // 2,
                                  config.image_temperature, config.position_frequency)
        positions = positions.flatten(1, 2)                                          # [B, S, D]
        padding = None if padding_mask is None else padding.flatten(1)               # [B, S]
        memory = self.encoder(features.flatten(2).transpose(1, 2), positions, padding)
        return memory, positions, None if padding is None else padding[:, None, None]

    def matching_queries(self, batch_size):
        """What DAB-DETR starts from, the same for every image: content [B, N, D], anchors [B, N, 4]
        (before the sigmoid). DAB-DETR's content is zero, DN-DETR's is the word "unknown"."""
        content = self.anchors.weight.new_zeros(self.config.hidden_dim)              # [D]
        unknown = self.label_embedding.weight[self.config.num_classes]               # [D - 1]   # [DN]
        content = F.pad(unknown, (0, 1), value=0.0)            # the indicator: 0    # [D]       # [DN]
        content = content.expand(self.config.num_queries, -1)                        # [N, D]
        anchors = self.anchors.weight                                                # [N, 4]
        if self.config.num_patterns:
            # all anchors with the first pattern, then all with the second ...
            content = (content + self.patterns.weight[:, None]).flatten(0, 1)
            anchors = anchors.repeat(self.config.num_patterns, 1)
        return content.expand(batch_size, -1, -1), anchors.expand(batch_size, -1, -1)

    def denoising_queries(self, targets, device):                                                # [DN]
        """-> slots, content [B, P*M, D], anchor logits [B, P*M, 4] of the noised objects."""
        config = self.config                                                                     # [DN]
        labels, boxes = concatenate_targets(targets, device)           # [K], [K, 4]             # [DN]
        slots = assign_slots([len(target["labels"]) for target in targets], config.dn_groups,    # [DN]
                             config.dn_max_queries, config.dn_size_multiple, device)             # [DN]
        # Every copy draws noise of its own. [P*K], [P*K, 4]                                     # [DN]
        labels = noise_labels(labels[slots.source], config.num_classes, config.label_noise)      # [DN]
        boxes = noise_boxes(boxes[slots.source], config.center_noise, config.size_noise)         # [DN]
        embedded = F.pad(self.label_embedding(labels), (0, 1), value=1.0)  # the indicator: 1    # [DN]
        content = embedded.new_zeros(*slots.is_real.shape, config.hidden_dim)                    # [DN]
        anchors = boxes.new_zeros(*slots.is_real.shape, 4)                                       # [DN]
        where = (slots.image, slots.slot)                                                        # [DN]
        return (slots, content.index_put(where, embedded),                                       # [DN]
                anchors.index_put(where, inverse_sigmoid(boxes)))                                # [DN]

    def blocked_queries(self, slots, num_queries):                                               # [DN]
        """[B, 1, Q, Q]: the paper's mask, and empty slots hidden from everybody (D1)."""
        blocked = dn_attention_mask(slots.num_groups, slots.group_size, num_queries,             # [DN]
                                    device=slots.is_real.device)                                 # [DN]
        is_empty = F.pad(~slots.is_real, (0, num_queries))             # [B, Q]                  # [DN]
        return (blocked | is_empty[:, None])[:, None]                                            # [DN]

    @classmethod
    def from_official(cls, checkpoint, **overrides):
        """A DNDETR with the authors' weights, on the CPU. Section 14.

        `checkpoint`: the path of a file as they release it, its dict, or a bare state dict. What its
        shapes can't tell comes from `overrides` (fields of DNDETRConfig), else from the file's own
        args, else is the paper's. Raises ValueError for a file that can't be read or isn't theirs, and
        one that lists every tensor without a partner.
        """
        return load_official(cls, checkpoint, overrides)


def grid_anchors(num_queries, size=0.3):
    """[N, 4] boxes of one size on a regular grid over the image (the last row may be incomplete)."""
    columns = math.ceil(math.sqrt(num_queries))
    rows = math.ceil(num_queries / columns)
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns,
                          indexing="ij")
    centers = torch.stack([x, y], dim=-1).flatten(0, 1)[:num_queries]
    return F.pad(centers, (0, 2), value=size)


def split_queries(x, num_denoising):                                                             # [DN]
    """[L, B, Q, *] -> the denoising part [L, B, P*M, *] and the matching part [L, B, N, *]."""
    return x[:, :, :num_denoising], x[:, :, num_denoising:]                                      # [DN]


def concatenate_targets(targets, device):
    """-> labels [K] and boxes [K, 4] of all objects of the batch, image after image, on `device`."""
    return tuple(torch.cat([target[name] for target in targets]).to(device, non_blocking=True)
                 for name in ("labels", "boxes"))


def check_images(images, padding_mask, dtype=torch.float32):
    """Raise ValueError unless images [B, 3, H, W] and mask [B, H, W] are what DNDETR wants. That an image
    is all padding is noticed on the CPU only."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError("images must be float [B, 3, H, W], normalised as the backbone expects, "
                         f"not {images.dtype} {list(images.shape)}")
    if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
        raise ValueError(f"images are {images.dtype} and the weights {dtype}: convert one of them")
    if padding_mask is None:
        return
    expected = (images.shape[0], *images.shape[2:])
    if padding_mask.shape != expected or padding_mask.dtype != torch.bool:
        raise ValueError(f"padding_mask must be bool {list(expected)} for these images, "
                         f"not {padding_mask.dtype} {list(padding_mask.shape)}")
    if padding_mask.device.type == "cpu" and padding_mask.flatten(1).all(1).any():
        index = int(padding_mask.flatten(1).all(1).nonzero()[0])
        raise ValueError(f"padding_mask[{index}] is all padding. True means padding: is it inverted?")


def check_targets(targets, num_images, num_classes):
    """Raise ValueError for ground truth that would train nonsense. See DNDETR for the format.

    Values are looked at only on the CPU: reading them from an accelerator would stall it. Targets
    may stay on the CPU, the model moves them.
    """
    if len(targets) != num_images:
        raise ValueError(f"{len(targets)} targets for a batch of {num_images} images")
    for index, target in enumerate(targets):
        if not isinstance(target, dict) or not all(isinstance(target.get(name), Tensor)
                                                   for name in ("labels", "boxes")):
            raise ValueError(f"targets[{index}] must be a dict with tensors 'labels' and 'boxes', "
                             f"not {str(target)[:80]}")
        labels, boxes = target["labels"], target["boxes"]
        if labels.dtype != torch.long or labels.ndim != 1:
            raise ValueError(f"targets[{index}]['labels'] must be long of shape [n], "
                             f"not {labels.dtype} of shape {list(labels.shape)}")
        if boxes.shape != (len(labels), 4) or not boxes.is_floating_point():
            raise ValueError(f"targets[{index}]['boxes'] must be float of shape [{len(labels)}, 4] for its "
                             f"{len(labels)} labels, not {boxes.dtype} of shape {list(boxes.shape)}")
    if all(target["boxes"].device.type == target["labels"].device.type == "cpu" for target in targets):
        check_target_values(targets, num_classes)


def check_target_values(targets, num_classes):
    """Raise ValueError unless labels are classes and boxes are cxcywh in [0, 1] with an area."""
    labels, boxes = concatenate_targets(targets, "cpu")
    corners = box_convert(boxes, "cxcywh", "xyxy")
    slack = 1e-3  # rounding of the annotations
    if (labels >= 0).all() and (labels < num_classes).all() and (boxes[:, 2:] > 0).all() and \
            (corners >= -slack).all() and (corners <= 1 + slack).all():     # false for NaN and infinity
        return
    for index, (labels, boxes) in enumerate((target["labels"], target["boxes"]) for target in targets):
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(f"targets[{index}] has label {wrong[0]}, labels run from 0 to num_classes - 1 = "
                             f"{num_classes - 1}")
        corners = box_convert(boxes, "cxcywh", "xyxy")
        sticks_out = ((corners < -slack) | (corners > 1 + slack)).any(1)
        # In (x0, y0, x1, y1) the last two are the larger ones. A box may stick out, not look like this.
        looks_xyxy = (boxes[:, 2:] > boxes[:, :2]).all()
        for bad, problem in (
                (~boxes.isfinite().all(1), "is not finite"),
                (((boxes < -slack) | (boxes > 1 + slack)).any(1),
                 "is outside [0, 1]: boxes are relative to the image; are these pixels?"),
                ((boxes[:, 2:] <= 0).any(1), "has no area: drop such objects"),
                (sticks_out & looks_xyxy, "reaches out of the image: boxes are (cx, cy, w, h); is this "
                                          "(x0, y0, x1, y1)?")):
            if bad.any():
                box = [round(number, 4) for number in boxes[bad][0].tolist()]
                raise ValueError(f"targets[{index}]['boxes'] holds {box}, which {problem}")


# ---------------------------------------------------------------------------------------------
# 11. Matching: who owns whom, searched for
# ---------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Predictions and the objects they answer for, layer by layer; R pairs in each of L layers:
    query `query` of image `image` answers for object `source`.
    The first dimension is 1 where all layers share the same pairs (denoising)."""
    image: Tensor     # [L, R] long
    query: Tensor     # [L, R] long
    source: Tensor    # [L, R] long: object, counted through the batch


@torch.no_grad()
def match(logits, boxes, targets, config):
    """Hungarian matching of logits [L, B, N, C] and boxes [L, B, N, 4] with the targets -> Pairs, with
    min(N, n) pairs for an image of n objects.

    All layers and images are costed at once and cross to the CPU in one transfer, the only
    host-device sync of a training step. Raises FloatingPointError if a cost is not finite.
    DETR Sec. 3.1; authors: HungarianMatcher.
    """
    counts = [len(target["labels"]) for target in targets]
    labels, truth = (pad_sequence([target[name].to(boxes.device, non_blocking=True) for target in targets],
                                  batch_first=True) for name in ("labels", "boxes"))   # [B, M], [B, M, 4]
    cost = matching_cost(logits, boxes, labels, truth, config).cpu()                 # [L, B, N, M]
    if not cost.isfinite().all():
        raise FloatingPointError("the matching cost is not finite: predictions are NaN or infinite. Look for "
                                 "NaN in images or boxes, a fully padded image, or a learning rate too high")
    cost, images, queries, sources = cost.numpy(), [], [], []
    offsets = [0, *accumulate(counts)]
    for layer_cost in cost:
        solved = [linear_sum_assignment(image_cost[:, :n]) for image_cost, n in zip(layer_cost, counts)]
        images.append(torch.cat([torch.full((len(rows),), index) for index, (rows, _) in enumerate(solved)]))
        queries.append(torch.cat([torch.from_numpy(rows) for rows, _ in solved]))
        sources.append(torch.cat([torch.from_numpy(columns) + offset
                                  for (_, columns), offset in zip(solved, offsets)]))
    indices = torch.stack([torch.stack(x) for x in (images, queries, sources)])      # [3, L, R]
    return Pairs(*indices.to(boxes.device, non_blocking=True))


def matching_cost(logits, boxes, labels, truth, config):
    """What it would cost if query n answered for object m: [L, B, N, M] from labels [B, M] (padded)."""
    # Images with fewer objects are padded with class 0 and an empty box; `match` cuts that off.
    labels = labels[None, :, None].expand(*logits.shape[:3], -1)                     # [L, B, N, M]
    probability = logits.gather(-1, labels).sigmoid()           # only of the classes that are there
    alpha, gamma = config.focal_alpha, config.focal_gamma
    as_object = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    as_background = (1 - alpha) * probability ** gamma * -(1 - probability + 1e-8).log()
    boxes, truth = boxes[:, :, :, None], truth[None, :, None]   # [L, B, N, 1, 4], [1, B, 1, M, 4]
    return (config.cost_class * (as_object - as_background)
            + config.cost_box * (boxes - truth).abs().sum(-1)
            - config.cost_giou * generalized_iou(boxes, truth))


def matched_objects(outputs, targets, config):
    """For every query of the last layer the object it is matched with, counted within its image, or -1:
    long [B, N] on the CPU. The V of Eq. 1."""
    pairs = match(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets, config)
    image, query, source = (x[0].cpu() for x in pairs)
    counts = torch.tensor([len(target["labels"]) for target in targets])
    first_of_image = counts.cumsum(0) - counts
    matched = torch.full(outputs["pred_logits"].shape[:2], -1)
    matched[image, query] = source - first_of_image[image]
    return matched


def matching_instability(previous, current):
    """IS of one image (Sec. 3.1, Eq. 2): how many queries changed their match between two epochs.

    `previous` and `current` [N] hold the index of each query's object, -1 for none. An object that
    moves to a query which had none counts twice: one query lost it, one won it. Hence 0 <= IS <= 2 n
    for n objects. Raises ValueError for different lengths.
    """
    previous, current = torch.as_tensor(previous), torch.as_tensor(current)
    if previous.shape != current.shape:
        raise ValueError(f"the two matchings have different lengths: {list(previous.shape)} "
                         f"and {list(current.shape)}; IS compares the same queries")
    return int((previous != current).sum())


# ---------------------------------------------------------------------------------------------
# 12. Loss: one loss, two assignments
# ---------------------------------------------------------------------------------------------


class DNDETRCriterion(nn.Module):
    """Outputs and targets of DNDETR (see there) -> dict of scalars: "loss", the weighted total to
    back-propagate, and unweighted terms "loss_ce", "loss_bbox", "loss_giou" of the last layer,
    "loss_ce_0" ... of the layers before; denoising terms begin with "dn_".

    Raises ValueError for impossible targets, FloatingPointError for predictions that are not finite.
    Sec. 4.3; authors: SetCriterion and compute_dn_loss.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weights = {"loss_ce": config.loss_class, "loss_bbox": config.loss_box,
                        "loss_giou": config.loss_giou}

    def forward(self, outputs, targets):
        logits, boxes = outputs["all_logits"], outputs["all_boxes"]
        check_targets(targets, logits.shape[1], self.config.num_classes)
        truth = concatenate_targets(targets, logits.device)                          # [K], [K, 4]
        num_objects = len(truth[0])
        pairs = match(logits, boxes, targets, self.config)
        per_layer = self.set_loss(logits, boxes, pairs, truth, num_objects)
        slots = outputs.get("dn_slots")                                                          # [DN]
        if slots is not None:                                                                    # [DN]
            # No search: the slots say who is a copy of whom, in every layer. The normaliser     # [DN]
            # grows with the groups, so more groups do not mean a larger loss.                   # [DN]
            pairs = Pairs(slots.image[None], slots.slot[None], slots.source[None])               # [DN]
            dn_per_layer = self.set_loss(outputs["dn_logits"], outputs["dn_boxes"], pairs, truth,  # [DN]
                                         num_objects * slots.num_groups, slots.is_real)          # [DN]
            per_layer |= {f"dn_{name}": value for name, value in dn_per_layer.items()}           # [DN]

        losses = {"loss": sum(self.weights[name.removeprefix("dn_")] * value.sum()
                              for name, value in per_layer.items())}
        for name, value in per_layer.items():
            for layer, term in enumerate(value):
                losses[name if layer == len(value) - 1 else f"{name}_{layer}"] = term
        return losses

    def set_loss(self, logits, boxes, pairs, truth, num_pairs, is_real=None):
        """logits [L, B, Q, C], boxes [L, B, Q, 4] -> {"loss_ce", "loss_bbox", "loss_giou"}, each [L].

        A paired query should say its object's class and box, any other query that it is no class at
        all; a slot that is not real [B, Q] says nothing.
        """
        labels, truth_boxes = truth
        # [L, 1] against pairs [L, R] or, where all layers share them, [1, R]
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        wanted = torch.zeros_like(logits)
        wanted[layer, pairs.image, pairs.query, labels[pairs.source]] = 1
        focal = sigmoid_focal_loss(logits, wanted, self.config.focal_alpha, self.config.focal_gamma)
        if is_real is not None:                                                                  # [DN]
            focal = focal * is_real[..., None]                                                   # [DN]
        paired, truth_boxes = boxes[layer, pairs.image, pairs.query], truth_boxes[pairs.source]  # [L, R, 4]
        sums = {"loss_ce": focal.sum((1, 2, 3)),
                "loss_bbox": (paired - truth_boxes).abs().sum((1, 2)),
                "loss_giou": (1 - generalized_iou(paired, truth_boxes)).sum(1)}
        normalizer = mean_over_processes(num_pairs, logits.device).clamp(min=1)
        return {name: value / normalizer for name, value in sums.items()}


def mean_over_processes(number, device):
    """The mean of `number` over all training processes, so that a loss does not depend on how a batch
    was split among them (their gradients are averaged). D4."""
    number = torch.full((), float(number), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(number)
        number /= torch.distributed.get_world_size()
    return number


# ---------------------------------------------------------------------------------------------
# 13. Predictions
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def postprocess(outputs, image_sizes, num_select=300):
    """Predictions -> one {"scores" [k], "labels" [k], "boxes" [k, 4] xyxy in pixels} per image, best
    first. `image_sizes`: (height, width) of each image, without its padding. k = min(num_select, N*C).

    A query may be listed once for each class: every class is a yes or no of its own (focal loss).
    No box is suppressed: the queries have sorted that out in self-attention. Raises ValueError unless
    every image has its size. Authors: PostProcess.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    sizes = torch.as_tensor(image_sizes, device=boxes.device)
    if sizes.shape != (len(logits), 2):
        raise ValueError(f"image_sizes must hold a (height, width) for each of the {len(logits)} images, "
                         f"its shape is {list(sizes.shape)}")
    scores, index = logits.sigmoid().flatten(1).topk(min(num_select, logits[0].numel()))    # [B, k]
    query, labels = index // logits.shape[2], index % logits.shape[2]
    boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query[..., None].expand(-1, -1, 4))
    boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]                                      # w, h, w, h
    return [{"scores": score, "labels": label, "boxes": box}
            for score, label, box in zip(scores, labels, boxes)]


# ---------------------------------------------------------------------------------------------
# 14. The authors' released weights
# ---------------------------------------------------------------------------------------------

OFFICIAL_NAMES = {  # a part of a name in their file: the same here
    "class_embed": "class_head", "bbox_embed": "box_head", "refpoint_embed": "anchors",
    "query_scale": "position_scale", "label_enc": "label_embedding", "input_proj": "input_projection",
    "ref_point_head": "anchor_mlp", "ref_anchor_head": "reference_size",
    "activation": "feed_forward.activation", "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2", "self_attn": "self_attention", "sa_v_proj": "self_value",
    "sa_qcontent_proj": "self_query_content", "sa_kcontent_proj": "self_key_content",
    "sa_qpos_proj": "self_query_position", "sa_kpos_proj": "self_key_position",
    "ca_kpos_proj": "cross_key_position", "cross_attn": "cross_attention", "ca_v_proj": "cross_value",
    "ca_qcontent_proj": "cross_query_content", "ca_qpos_proj": "cross_query_position",
    "ca_kcontent_proj": "cross_key_content", "ca_qpos_sine_proj": "cross_query_sine"}
OFFICIAL_ARGS = (("nheads", "num_heads"), ("dropout", "dropout"), ("transformer_activation", "activation"),
                 ("dilation", "dilation"), ("scalar", "dn_groups"), ("label_noise_scale", "label_noise"),
                 ("box_noise_scale", "center_noise"), ("box_noise_scale", "size_noise"))
RESNETS = {((2, 2, 2, 2), 2): "resnet18", ((3, 4, 6, 3), 2): "resnet34",    # blocks of each stage,
           ((3, 4, 6, 3), 3): "resnet50", ((3, 4, 23, 3), 3): "resnet101"}  # convolutions of a block


def read_checkpoint(path):
    """A checkpoint's dict, opened so that it can't run code. Raises ValueError for a broken file."""
    torch.serialization.add_safe_globals([argparse.Namespace])     # the authors' command line is in theirs
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{path} can't be read as a checkpoint; absent or truncated? {error}") from error


def load_official(model_class, checkpoint, overrides):
    """Documented at DNDETR.from_official."""
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = read_checkpoint(checkpoint)
    state = {}          # the box head comes twice, they keep it under two names
    for name, tensor in checkpoint.get("model", checkpoint).items():
        name = re.sub(r"^(module\.)?(transformer\.)?(decoder\.(?=bbox_embed))?", "", name)
        parts = name.replace("backbone.0.body.", "backbone.").split(".")
        state[".".join(OFFICIAL_NAMES.get(part, part) for part in parts)] = tensor
    args = vars(checkpoint["args"]) if "args" in checkpoint else {}
    chosen = {"activation": "relu"} | {ours: args[theirs] for theirs, ours in OFFICIAL_ARGS if theirs in args}
    try:
        model = model_class(DNDETRConfig(**(chosen | official_sizes(state) | overrides)))
    except KeyError as error:
        raise ValueError(f"this is no DN-DETR checkpoint of the authors: it lacks {error}") from error
    file, wanted = ({k: list(v.shape) for k, v in x.items()} for x in (state, model.state_dict()))
    problems = [f"{name}: {file.get(name, 'missing')} in the file, {wanted.get(name, 'missing')} in the model"
                for name in sorted(file | wanted) if file.get(name) != wanted.get(name)]
    if problems:
        raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict(state)
    return model


def official_sizes(state):
    """What the shapes of renamed weights tell about the configuration."""
    def count(pattern):
        return len({found.group() for name in state if (found := re.match(pattern, name))})

    stages = tuple(count(rf"backbone\.layer{stage}\.\d+\.") for stage in (1, 2, 3, 4))
    sizes = {"num_classes": len(state["class_head.weight"]), "hidden_dim": len(state["decoder.norm.bias"]),
             "num_encoder_layers": count(r"encoder\.layers\.\d+\."),
             "num_decoder_layers": count(r"decoder\.layers\.\d+\."),
             "dim_feedforward": len(state["decoder.layers.0.feed_forward.linear1.weight"]),
             "num_queries": len(state["anchors.weight"]),
             "num_patterns": len(state.get("patterns.weight", ())),
             "backbone": RESNETS[stages, count(r"backbone\.layer1\.0\.conv\d")]}
    has_slopes = "decoder.layers.0.feed_forward.activation.weight" in state
    return sizes | ({"activation": "prelu"} if has_slopes else {})


# ---------------------------------------------------------------------------------------------
# 15. python dn_detr.py: a tour
# ---------------------------------------------------------------------------------------------


def draw_mask(mask):
    """Mask [Q, Q] as text: x blocked, . visible."""
    return "\n".join("    " + " ".join("x" if blocked else "." for blocked in row) for row in mask.tolist())


def tour():
    """Noise, mask, shapes and a few steps on two made-up images."""
    torch.manual_seed(0)
    config = DNDETRConfig(num_classes=3, num_queries=6, hidden_dim=32, num_heads=4, num_encoder_layers=1,
                          num_decoder_layers=2, dim_feedforward=64, backbone="small", dn_groups=2)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]])},
               {"labels": torch.tensor([0, 2]),
                "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.4, 0.5]])}]
    box = targets[0]["boxes"]
    print("1. An object (cx cy w h) and five noised copies of it:")
    for name, row in [("truth", box), *(("copy", noise_boxes(box, 0.4, 0.4)) for _ in range(5))]:
        print(f"    {name:5} " + " ".join(f"{number:.3f}" for number in row[0].tolist()))
    print("2. Who may look at whom, 2 groups of 2 copies, then 6 matching queries (x = may not):")
    print(draw_mask(dn_attention_mask(2, 2, 6)))

    model, criterion = DNDETR(config), DNDETRCriterion(config)
    images = torch.randn(2, 3, 64, 64)
    outputs = model(images, targets=targets)
    print("3. What comes out:")
    for name in ("pred_logits", "pred_boxes", "dn_logits", "dn_boxes"):
        print(f"    {name:12} {list(outputs[name].shape)}")
    print(f"    empty slots  {(~outputs['dn_slots'].is_real).sum()} of {outputs['dn_slots'].is_real.numel()}")
    print("4. Twenty steps on these two images:")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(21):
        losses = criterion(model(images, targets=targets), targets)
        if step % 10 == 0:
            dn = sum(value for name, value in losses.items() if name.startswith("dn_") and name[-1].isalpha())
            print(f"    step {step:2}   loss {losses['loss']:6.2f}   denoising, last layer {dn:5.2f}")
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    print("5. At inference there is no denoising part:")
    print(f"    {', '.join(model.eval()(images))}")


if __name__ == "__main__":
    tour()
