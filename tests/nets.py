"""The usual architectures, written by hand in torch: their own operators, but few channels, few blocks, small inputs.

`build(name)` gives a network whose weights and BatchNorm statistics depend on its name alone, in inference mode. An
activation is a module where the original has a module, and a function where it has a function.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Make = Callable[[], nn.Module]

CLASSES = 10
VOCABULARY = 50


# --- blocks ---------------------------------------------------------------------------------------


class Apply(nn.Module):
    """A function among modules."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Parallel(nn.ModuleList):
    """Branches on one input, side by side along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


class Plus(nn.Sequential):
    """x + body(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvNorm(nn.Sequential):
    """Conv without bias, BatchNorm, and an activation or none; pads keep the size unless they are given."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        pad: int | None = None,
        groups: int = 1,
        act: Make | None = nn.ReLU,
    ) -> None:
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = (high // 2, wide // 2) if pad is None else (pad, pad)
        conv = nn.Conv2d(inputs, outputs, (high, wide), stride, pads, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, inner: int, act: Make, gate: Make) -> None:
        super().__init__()
        down, up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.weight = nn.Sequential(nn.AdaptiveAvgPool2d(1), down, act(), up, gate())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight(x)


def head(width: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(width, CLASSES))


def mean_head(width: int, *axes: int) -> nn.Module:
    return nn.Sequential(Apply(lambda x: x.mean(axes)), nn.Linear(width, CLASSES))


# --- convolutional nets ---------------------------------------------------------------------------


def alexnet() -> nn.Module:
    """With the groups and the local response normalisation of the paper."""
    norm = partial(nn.LocalResponseNorm, 5, alpha=0.1)  # at the paper's 1e-4 a missing term would not show
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 11, 4, 2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(16, 32, 5, padding=2, groups=2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(48, 48, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(48, 32, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Dropout(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU()),
        nn.Linear(64, CLASSES),
    )


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for count, outputs in ((2, 8), (2, 16), (3, 32), (3, 64), (3, 64)):
        for _ in range(count):
            layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.ReLU()]
            width = outputs
        layers.append(nn.MaxPool2d(2, 2))
    hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *hidden, nn.Linear(64, CLASSES))


class Residual(nn.Module):
    """ReLU of body(x) + x; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, *body: nn.Module) -> None:
        super().__init__()
        self.body, self.relu = nn.Sequential(*body), nn.ReLU()
        changes = stride != 1 or inputs != outputs
        self.short = ConvNorm(inputs, outputs, 1, stride, act=None) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.short(x))


def basic(inputs: int, width: int, stride: int) -> nn.Module:
    return Residual(inputs, width, stride, ConvNorm(inputs, width, 3, stride), ConvNorm(width, width, act=None))


def bottleneck(
    inputs: int, width: int, stride: int, expand: int = 4, group: int | None = None, excite: bool = False
) -> nn.Module:
    """group: how many channels each group has."""
    body: list[nn.Module] = [ConvNorm(inputs, width, 1)]
    body.append(ConvNorm(width, width, 3, stride, groups=width // group if group else 1))
    if excite:
        body.append(SqueezeExcite(width, max(inputs // 4, 2), nn.ReLU, nn.Sigmoid))
    return Residual(inputs, width * expand, stride, *body, ConvNorm(width, width * expand, 1, act=None))


def residual_net(
    block: Callable[..., nn.Module], depths: Sequence[int], widths: Sequence[int], expand: int = 1
) -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, widths[0], 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = widths[0]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for index in range(depth):
            layers.append(block(inputs, width, 2 if stage and not index else 1))
            inputs = width * expand
    return nn.Sequential(*layers, head(inputs))


resnet18 = partial(residual_net, basic, (2, 2, 2, 2), (8, 16, 24, 32))
resnet50 = partial(residual_net, bottleneck, (1, 2, 1, 1), (4, 8, 12, 16), expand=4)
resnext = partial(residual_net, partial(bottleneck, expand=2, group=4), (1, 2, 1), (8, 16, 24), expand=2)
regnet_y = partial(residual_net, partial(bottleneck, expand=1, group=8, excite=True), (1, 2, 2), (8, 16, 32))


class DenseLayer(nn.Sequential):
    """x, and beside it what a bottleneck makes of it."""

    def __init__(self, inputs: int, growth: int = 8) -> None:
        inner, relu = 4 * growth, partial(F.relu, inplace=True)
        super().__init__(
            *(nn.BatchNorm2d(inputs), Apply(relu), nn.Conv2d(inputs, inner, 1, bias=False)),
            *(nn.BatchNorm2d(inner), Apply(relu), nn.Conv2d(inner, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


def densenet() -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 16
    for last in (False, False, True):
        layers += [DenseLayer(width + 8 * index) for index in range(2)]
        width += 16
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        if not last:
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2, 2)]
            width //= 2
    return nn.Sequential(*layers, head(width))


functional = partial(ConvNorm, act=lambda: Apply(partial(F.relu, inplace=True)))  # no nn.ReLU tells of it


def googlenet() -> nn.Module:
    conv, line, pool = functional, nn.Sequential, partial(nn.MaxPool2d, ceil_mode=True)

    def inception(inputs: int, a: int, b: int, c: int, d: int) -> nn.Module:
        sides = [line(conv(inputs, width, 1), conv(width, width, 3)) for width in (b, c)]
        return Parallel(conv(inputs, a, 1), *sides, line(pool(3, 1, 1), conv(inputs, d, 1)))

    return line(
        *(conv(3, 12, 7, 2), pool(3, 2), conv(12, 12, 1), conv(12, 16, 3), pool(3, 2)),
        *(inception(16, 8, 12, 4, 4), inception(28, 8, 16, 8, 8), pool(3, 2)),
        *(inception(40, 16, 16, 8, 8), pool(2, 2), head(48)),
    )


def inception_v3() -> nn.Module:
    """One of each of its five blocks."""
    conv, line, tall, wide = functional, nn.Sequential, (7, 1), (1, 7)
    half = partial(functional, kernel=3, stride=2, pad=0)

    def pool() -> nn.Module:
        return nn.AvgPool2d(3, 1, 1)

    def split() -> nn.Module:
        return Parallel(conv(16, 16, (1, 3)), conv(16, 16, (3, 1)))

    seven = (conv(8, 8, tall), conv(8, 8, wide), conv(8, 8, tall), conv(8, 12, wide))
    return line(
        *(half(3, 8), conv(8, 8, 3, pad=0), conv(8, 12, 3), nn.MaxPool2d(3, 2)),
        *(conv(12, 12, 1), conv(12, 16, 3, pad=0), nn.MaxPool2d(3, 2)),
        Parallel(
            *(conv(16, 8, 1), line(conv(16, 6, 1), conv(6, 8, 5))),
            *(line(conv(16, 8, 1), conv(8, 12, 3), conv(12, 12, 3)), line(pool(), conv(16, 4, 1))),
        ),
        Parallel(half(32, 16), line(conv(32, 8, 1), conv(8, 12, 3), half(12, 12)), nn.MaxPool2d(3, 2)),
        Parallel(
            *(conv(60, 12, 1), line(conv(60, 8, 1), conv(8, 8, wide), conv(8, 12, tall))),
            *(line(conv(60, 8, 1), *seven), line(pool(), conv(60, 12, 1))),
        ),
        Parallel(
            *(line(conv(48, 12, 1), half(12, 16)), nn.MaxPool2d(3, 2)),
            line(conv(48, 12, 1), conv(12, 12, wide), conv(12, 12, tall), half(12, 12)),
        ),
        Parallel(
            *(conv(76, 16, 1), line(conv(76, 16, 1), split())),
            *(line(conv(76, 16, 1), conv(16, 16, 3), split()), line(pool(), conv(76, 8, 1))),
        ),
        head(88),
    )


def squeezenet() -> nn.Module:
    relu, pool = partial(nn.ReLU, inplace=True), partial(nn.MaxPool2d, 3, 2, ceil_mode=True)

    def fire(inputs: int, squeeze: int, expand: int) -> nn.Module:
        sides = [nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)]
        both = Parallel(*[nn.Sequential(side, relu()) for side in sides])
        return nn.Sequential(nn.Conv2d(inputs, squeeze, 1), relu(), both)

    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2), relu(), pool(), fire(16, 4, 12), fire(24, 4, 12), pool()),
        *(fire(24, 8, 16), fire(32, 8, 16), pool(), fire(32, 8, 24), nn.Dropout()),
        *(nn.Conv2d(48, CLASSES, 1), relu(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def inverted(
    inputs: int, outputs: int, expand: int, kernel: int, stride: int, act: Make, excite: Make | None, gate: Make
) -> nn.Module:
    """Wide, depthwise, squeeze-and-excitation, narrow: the block of MobileNetV2, V3 and EfficientNet."""
    width = inputs * expand
    parts: list[nn.Module] = [ConvNorm(inputs, width, 1, act=act)] if expand > 1 else []
    parts.append(ConvNorm(width, width, kernel, stride, groups=width, act=act))
    if excite:
        parts.append(SqueezeExcite(width, max(inputs // 4, 2), excite, gate))
    parts.append(ConvNorm(width, outputs, 1, act=None))
    return Plus(*parts) if stride == 1 and inputs == outputs else nn.Sequential(*parts)


def mobilenet_v2() -> nn.Module:
    act = nn.ReLU6
    block = partial(inverted, act=act, excite=None, gate=nn.Sigmoid)
    return nn.Sequential(
        *(ConvNorm(3, 8, 3, 2, act=act), block(8, 8, 1, 3, 1), block(8, 12, 6, 3, 2), block(12, 12, 6, 3, 1)),
        *(block(12, 16, 6, 3, 2), block(16, 16, 6, 3, 1), ConvNorm(16, 64, 1, act=act), head(64)),
    )


def mobilenet_v3() -> nn.Module:
    relu, swish = nn.ReLU, nn.Hardswish
    block = partial(inverted, gate=nn.Hardsigmoid)
    return nn.Sequential(
        *(ConvNorm(3, 8, 3, 2, act=swish), block(8, 8, 1, 3, 2, relu, relu), block(8, 12, 4, 3, 2, relu, None)),
        *(block(12, 12, 4, 3, 1, relu, None), block(12, 16, 4, 5, 2, swish, relu), block(16, 16, 4, 5, 1, swish, relu)),
        *(ConvNorm(16, 48, 1, act=swish), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(48, 64), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(64, CLASSES)),
    )


def efficientnet_b0() -> nn.Module:
    act = nn.SiLU
    block = partial(inverted, act=act, excite=act, gate=nn.Sigmoid)
    return nn.Sequential(
        *(ConvNorm(3, 8, 3, 2, act=act), block(8, 8, 1, 3, 1), block(8, 12, 6, 3, 2), block(12, 12, 6, 5, 1)),
        *(block(12, 16, 6, 5, 2), ConvNorm(16, 64, 1, act=act), head(64)),
    )


class Shuffle(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass (or both are halved in size), then the halves are shuffled."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, self.splits = outputs // 2, stride == 1
        inputs = inputs // 2 if self.splits else inputs
        depthwise = ConvNorm(half, half, 3, stride, groups=half, act=None)
        self.right = nn.Sequential(ConvNorm(inputs, half, 1), depthwise, ConvNorm(half, half, 1))
        down = [ConvNorm(inputs, inputs, 3, stride, groups=inputs, act=None), ConvNorm(inputs, half, 1)]
        self.left = nn.Identity() if self.splits else nn.Sequential(*down)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.splits else (x, x)
        y = torch.cat([self.left(left), self.right(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shufflenet_v2() -> nn.Module:
    units = (Shuffle(8, 16, 2), Shuffle(16, 16, 1), Shuffle(16, 16, 1), Shuffle(16, 32, 2), Shuffle(32, 32, 1))
    return nn.Sequential(
        *(ConvNorm(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1), *units, ConvNorm(32, 48, 1), mean_head(48, 2, 3))
    )


class Scale(nn.Module):
    """One learnt factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


def convnext() -> nn.Module:
    def last(*layers: nn.Module) -> tuple[nn.Module, ...]:
        return Apply(lambda x: x.permute(0, 2, 3, 1)), *layers, Apply(lambda x: x.permute(0, 3, 1, 2))

    def norm(width: int) -> nn.Module:
        return nn.LayerNorm(width, 1e-6)

    def block(width: int) -> nn.Module:
        conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        return Plus(conv, *last(norm(width), mlp(width, 4 * width)), Scale(width))

    return nn.Sequential(
        *(nn.Conv2d(3, 8, 4, 4), *last(norm(8)), block(8)),
        *(*last(norm(8)), nn.Conv2d(8, 16, 2, 2), block(16), block(16)),
        *(nn.AdaptiveAvgPool2d(1), *last(norm(16)), nn.Flatten(), nn.Linear(16, CLASSES)),
    )


# --- transformers and mixers ----------------------------------------------------------------------


def mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, width))


def patches(width: int) -> nn.Module:
    """[N, 3, 32, 32] to [N, 16, width]."""
    return nn.Sequential(nn.Conv2d(3, width, 8, 8), Apply(lambda x: x.flatten(2).transpose(1, 2)))


def block(width: int, attention: nn.Module) -> nn.Module:
    """Norm first, attention, norm, MLP."""
    norm1, norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
    return nn.Sequential(Plus(norm1, attention), Plus(norm2, mlp(width, 2 * width)))


class ModuleAttention(nn.MultiheadAttention):
    """torch's own module, as in torchvision's ViT."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class FusedAttention(nn.Module):
    """One matrix for queries, keys and values; torch's own scaled dot product, as in timm's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, t, c))


class Transformer(nn.Module):
    """ViT with one extra token; DeiT with two, each with a head of its own, averaged."""

    def __init__(self, attention: Callable[[int, int], nn.Module], extra: int, width: int = 24) -> None:
        super().__init__()
        self.patches, self.norm = patches(width), nn.LayerNorm(width, 1e-6)
        self.tokens = nn.Parameter(torch.randn(1, extra, width))
        self.positions = nn.Parameter(torch.randn(1, 16 + extra, width))
        self.blocks = nn.Sequential(*[block(width, attention(width, 3)) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(width, CLASSES) for _ in range(extra)])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.tokens.expand(x.shape[0], -1, -1), self.patches(x)], 1) + self.positions
        y = self.norm(self.blocks(y))
        return torch.stack([head(y[:, i]) for i, head in enumerate(self.heads)]).mean(0)


class WindowAttention(nn.Module):
    """Swin: attention within windows, shifted by half of one in each second block; a bias per relative position."""

    index: Tensor
    mask: Tensor

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = at[:, None] - at + window - 1
        self.register_buffer("index", (apart[..., 0] * (2 * window - 1) + apart[..., 1]).flatten())
        # What the shift brings into one window from opposite edges must not meet.
        region = (torch.arange(size) >= size - window).long() + (torch.arange(size) >= size - shift)
        area = self.split((region[:, None] * 3 + region)[None, :, :, None]).squeeze(-1)
        self.register_buffer("mask", (area[:, None, :] != area[:, :, None]).float() * -100.0)

    def split(self, x: Tensor) -> Tensor:
        """[N, H, W, C] to [N windows, window^2, C]."""
        (n, h, w, c), m = x.shape, self.window
        return x.view(n, h // m, m, w // m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, m * m, c)

    def forward(self, x: Tensor) -> Tensor:
        (n, h, w, c), m = x.shape, self.window
        y = self.split(torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x)
        q, k, v = self.qkv(y).reshape(-1, m * m, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index].view(m * m, m * m, -1).permute(2, 0, 1).contiguous()
        if self.shift:
            scores = scores.view(n, -1, self.heads, m * m, m * m) + self.mask[:, None]
            scores = scores.view(-1, self.heads, m * m, m * m)
        y = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, m * m, c))
        y = y.view(n, h // m, w // m, m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y


def swin(width: int = 16) -> nn.Module:
    merge = Apply(lambda x: torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1))
    return nn.Sequential(
        *(nn.Conv2d(3, width, 4, 4), Apply(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(width)),
        *(block(width, WindowAttention(width, 2, 8, 4, shift)) for shift in (0, 2)),
        *(merge, nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)),
        block(2 * width, WindowAttention(2 * width, 4, 4, 4, 0)),
        *(nn.LayerNorm(2 * width), mean_head(2 * width, 1, 2)),
    )


def mixer(width: int = 16) -> nn.Module:
    def turn() -> nn.Module:
        return Apply(lambda x: x.transpose(1, 2))

    blocks: list[nn.Module] = []
    for _ in range(2):
        blocks.append(Plus(nn.LayerNorm(width), turn(), mlp(16, 32), turn()))
        blocks.append(Plus(nn.LayerNorm(width), mlp(width, 4 * width)))
    return nn.Sequential(patches(width), *blocks, nn.LayerNorm(width), mean_head(width, 1))


class BertLayer(nn.Module):
    """Attention, norm, MLP, norm; the mask is added to the scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)
        self.mlp = mlp(width, 2 * width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, t, c)
        x = self.norm1(x + self.out(y))
        return self.norm2(x + self.mlp(x))


class Bert(nn.Module):
    def __init__(self, width: int = 24, longest: int = 16) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(longest, width)
        self.types, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, 1e-12)
        self.layers = nn.ModuleList([BertLayer(width, 3) for _ in range(2)])
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = ids.shape[1]
        at = torch.arange(length, device=ids.device).unsqueeze(0)
        y = self.norm(self.words(ids) + self.types(torch.zeros_like(ids)) + self.positions(at))
        mask = (1.0 - attention_mask[:, None, None, :].to(y.dtype)) * torch.finfo(y.dtype).min
        mask = mask.expand(-1, -1, length, -1)
        for layer in self.layers:
            y = layer(y, mask)
        return self.classifier(torch.tanh(self.pooler(y[:, 0])))


# --- sequences ------------------------------------------------------------------------------------


def cnn_1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(4, 12, 7, 2, 3, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.MaxPool1d(3, 2, 1)),
        *(nn.Conv1d(12, 16, 3, padding=2, dilation=2, groups=2), nn.LeakyReLU(0.1), nn.AvgPool1d(2)),
        *(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(16, 16, 3), nn.BatchNorm1d(16), nn.ELU()),
        *(nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES)),
    )


class Recurrent(nn.Module):
    """The last step and the mean of all steps of what the cell gives."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], layers: int, bidirectional: bool) -> None:
        super().__init__()
        self.cell = cell(6, 12, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(12 * (1 + bidirectional), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(x)
        return self.head(y[:, -1] + y.mean(1))


# --- the registry ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """make: the network; shape: of one sample, or None for token ids; activations: their kinds, but for gates."""

    make: Make
    shape: tuple[int, ...] | None = (3, 32, 32)
    activations: tuple[str, ...] = ("Relu",)

    @property
    def smooth(self) -> bool:
        return not set(self.activations) & {"Relu", "Relu6", "HardSwish", "LeakyRelu"}

    def feeds(self, batch: int) -> dict[str, Tensor]:
        """Inputs by name, in the order of the network's arguments; the same at every call."""
        draw = torch.Generator().manual_seed(batch)
        if self.shape is not None:
            return {"x": torch.randn(batch, *self.shape, generator=draw)}
        lengths = torch.randint(5, 13, (batch, 1), generator=draw)
        ids = torch.randint(0, VOCABULARY, (batch, 12), generator=draw)
        return {"ids": ids, "attention_mask": (torch.arange(12) < lengths).long()}


NETS: dict[str, Net] = {
    "AlexNet": Net(alexnet, (3, 96, 96)),
    "VGG-16": Net(vgg16),
    "ResNet-18": Net(resnet18, (3, 64, 64)),
    "ResNet-50": Net(resnet50, (3, 64, 64)),
    "ResNeXt": Net(resnext, (3, 64, 64)),
    "DenseNet": Net(densenet, (3, 64, 64)),
    "GoogLeNet": Net(googlenet, (3, 64, 64)),
    "Inception-v3": Net(inception_v3, (3, 80, 80)),
    "SqueezeNet": Net(squeezenet, (3, 64, 64)),
    "MobileNetV2": Net(mobilenet_v2, activations=("Relu6",)),
    "MobileNetV3": Net(mobilenet_v3, activations=("Relu", "HardSwish")),
    "EfficientNet-B0": Net(efficientnet_b0, activations=("Swish",)),
    "ShuffleNetV2": Net(shufflenet_v2, (3, 64, 64)),
    "RegNet": Net(regnet_y, (3, 64, 64)),
    "ConvNeXt": Net(convnext, activations=("Gelu",)),
    "ViT": Net(lambda: Transformer(partial(ModuleAttention, batch_first=True), 1), activations=("Gelu",)),
    "DeiT": Net(lambda: Transformer(FusedAttention, 2), activations=("Gelu",)),
    "Swin": Net(swin, activations=("Gelu",)),
    "MLP-Mixer": Net(mixer, activations=("Gelu",)),
    "CNN-1D": Net(cnn_1d, (4, 50), ("Relu", "LeakyRelu", "Elu")),
    "LSTM": Net(lambda: Recurrent(nn.LSTM, 2, True), (9, 6), ()),
    "GRU": Net(lambda: Recurrent(nn.GRU, 1, False), (9, 6), ()),
    "BERT": Net(Bert, None, ("Gelu", "Tanh")),
}


def build(name: str) -> nn.Module:
    """One of NETS in inference mode: He weights, BatchNorm and LayerNorm with something to do."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        net = NETS[name].make()
        for module in net.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.1)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                nn.init.normal_(module.weight, 1.0, 0.1)
                nn.init.normal_(module.bias, std=0.1)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval().requires_grad_(False)
