"""The benchmark's networks at full size, of the blocks in `tests/nets.py`: untrained, their numbers kept in bounds.

Speed does not depend on the weights, agreement between two runtimes does: a ReLU that is dead or always open hides
what a mask costs and whether it is right. So each layer has He weights and the statistics of BatchNormalization near 1.
"""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from nets import (
    Apply,
    ConvNorm,
    DenseLayer,
    FusedAttention,
    Parallel,
    Plus,
    SqueezeExcite,
    bottleneck,
    inverted,
    residual_net,
)
from torch import Tensor, nn

CLASSES = 1000

Module: TypeAlias = Any  # the blocks come without types


def _head(width: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def resnet50() -> nn.Module:
    body = residual_net(bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), expand=4)
    assert isinstance(body, nn.Sequential)
    return nn.Sequential(*list(body)[:-1], _head(2048))


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for count, outputs in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.ReLU()]
            width = outputs
        layers.append(nn.MaxPool2d(2, 2))
    hidden = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, CLASSES)]
    return nn.Sequential(*layers, nn.Flatten(), *hidden)


def mobilenet_v2() -> nn.Module:
    act = nn.ReLU6
    layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2, act=act)]
    width = 32
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, outputs, count, stride in rows:
        for index in range(count):
            first = stride if index == 0 else 1
            layers.append(inverted(width, outputs, expand, 3, first, act, None, nn.Sigmoid))
            width = outputs
    return nn.Sequential(*layers, ConvNorm(320, 1280, 1, act=act), _head(1280))


def densenet121() -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for stage, count in enumerate((6, 12, 24, 16)):
        layers += [DenseLayer(width + 32 * index, 32) for index in range(count)]
        width += 32 * count
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if stage < 3:
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2, 2)]
            width //= 2
    return nn.Sequential(*layers, _head(width))


def inception_v3() -> Module:
    conv, line = ConvNorm, nn.Sequential
    tall, wide = (7, 1), (1, 7)
    half = partial(ConvNorm, kernel=3, stride=2, pad=0)

    def average(inputs: int, outputs: int) -> Module:
        return line(nn.AvgPool2d(3, 1, 1), conv(inputs, outputs, 1))

    def a(inputs: int, pooled: int) -> Module:
        five = line(conv(inputs, 48, 1), conv(48, 64, 5))
        three = line(conv(inputs, 64, 1), conv(64, 96), conv(96, 96))
        return Parallel(conv(inputs, 64, 1), five, three, average(inputs, pooled))

    def c(inner: int) -> Module:
        once = line(conv(768, inner, 1), conv(inner, inner, wide), conv(inner, 192, tall))
        twice = (conv(inner, inner, tall), conv(inner, inner, wide), conv(inner, inner, tall), conv(inner, 192, wide))
        return Parallel(conv(768, 192, 1), once, line(conv(768, inner, 1), *twice), average(768, 192))

    def e(inputs: int) -> Module:
        def split() -> Module:
            return Parallel(conv(384, 384, (1, 3)), conv(384, 384, (3, 1)))

        three = line(conv(inputs, 448, 1), conv(448, 384), split())
        return Parallel(conv(inputs, 320, 1), line(conv(inputs, 384, 1), split()), three, average(inputs, 192))

    return line(
        *(half(3, 32), conv(32, 32, 3, pad=0), conv(32, 64), nn.MaxPool2d(3, 2)),
        *(conv(64, 80, 1), conv(80, 192, 3, pad=0), nn.MaxPool2d(3, 2), a(192, 32), a(256, 64), a(288, 64)),
        Parallel(half(288, 384), line(conv(288, 64, 1), conv(64, 96), half(96, 96)), nn.MaxPool2d(3, 2)),
        *(c(128), c(160), c(160), c(192)),
        Parallel(
            line(conv(768, 192, 1), half(192, 320)),
            line(conv(768, 192, 1), conv(192, 192, wide), conv(192, 192, tall), half(192, 192)),
            nn.MaxPool2d(3, 2),
        ),
        *(e(1280), e(2048), _head(2048)),
    )


def squeezenet() -> nn.Module:
    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)

    def fire(inputs: int, squeeze: int, expand: int) -> nn.Module:
        sides = [nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)]
        both = Parallel(*[nn.Sequential(side, nn.ReLU()) for side in sides])
        return nn.Sequential(nn.Conv2d(inputs, squeeze, 1), nn.ReLU(), both)

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), fire(64, 16, 64), fire(128, 16, 64), pool()),
        *(fire(128, 32, 128), fire(256, 32, 128), pool(), fire(256, 48, 192), fire(384, 48, 192)),
        *(fire(384, 64, 256), fire(512, 64, 256), nn.Conv2d(512, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


class _Tokens(nn.Module):
    """One learnt token before the patches, and a learnt position for each."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, count + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions


def vision_transformer(width: int) -> nn.Module:
    """ViT-tiny is 192 wide, ViT-B 768."""

    def block() -> nn.Module:
        mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        attention = Plus(nn.LayerNorm(width, 1e-6), FusedAttention(width, width // 64))
        return nn.Sequential(attention, Plus(nn.LayerNorm(width, 1e-6), mlp))

    patches = Apply(lambda x: x.flatten(2).transpose(1, 2))
    blocks = [block() for _ in range(12)]
    first = Apply(lambda x: x[:, 0])
    return nn.Sequential(
        *(nn.Conv2d(3, width, 16, 16), patches, _Tokens(196, width), *blocks, nn.LayerNorm(width, 1e-6), first),
        nn.Linear(width, CLASSES),
    )


def efficientnet_b0() -> nn.Module:
    act = nn.SiLU
    layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2, act=act)]
    width = 32
    rows = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
    for expand, outputs, count, stride, kernel in (*rows, (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)):
        for index in range(count):
            first = stride if index == 0 else 1
            layers.append(inverted(width, outputs, expand, kernel, first, act, act, nn.Sigmoid))
            width = outputs
    return nn.Sequential(*layers, ConvNorm(320, 1280, 1, act=act), _head(1280))


@dataclasses.dataclass(frozen=True)
class Network:
    """make: the network; size: of its square input."""

    make: Callable[[], nn.Module]
    size: int = 224


NETWORKS: dict[str, Network] = {
    "resnet50": Network(resnet50),
    "vgg16": Network(vgg16),
    "mobilenet_v2": Network(mobilenet_v2),
    "densenet121": Network(densenet121),
    "inception_v3": Network(inception_v3, 299),
    "squeezenet": Network(squeezenet),
    "vit_tiny": Network(partial(vision_transformer, 192)),
    "vit_b": Network(partial(vision_transformer, 768)),
    "efficientnet_b0": Network(efficientnet_b0),
}


def build(name: str) -> nn.Module:
    """One of NETWORKS in inference mode, the same at every call."""
    torch.manual_seed(zlib.crc32(name.encode()))
    net = NETWORKS[name].make()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.8, 1.25)
        if isinstance(module, Plus | SqueezeExcite):
            _damp(module)
    return net.eval().requires_grad_(False)


def _damp(module: nn.Module) -> None:
    """Sixteen sums of branches at full strength would let the numbers grow without bound."""
    last: Any = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.Linear)]
    if last:
        last[-1].weight.data.mul_(0.3)


def export(name: str, path: str, size: int | None = None) -> None:
    """Writes one of NETWORKS as ONNX with a free batch; size: of the image, where it is not the usual one."""
    side = size or NETWORKS[name].size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations within torch
        torch.onnx.export(
            build(name),
            (torch.randn(1, 3, side, side),),
            path,
            dynamo=False,
            input_names=["x"],
            output_names=["scores"],
            opset_version=17,
            dynamic_axes={"x": {0: "N"}, "scores": {0: "N"}},
        )
