"""Paddle, exported by paddle2onnx."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from common import CLASSES, image, main, targets, weights
from paddle import Tensor, nn

Function = Callable[[Tensor], Tensor]


class Net(nn.Layer):
    """A net whose activations all go through `act`; `logits` says to leave out a last softmax."""

    guided = logits = False

    def act(self, activation: Function, x: Tensor) -> Tensor:
        y = activation(x)
        if self.guided:  # R = dx where dy > 0, else 0: what arrives is gated, then the activation's own gradient acts
            y.register_hook(F.relu)
        return y


class Relu(Net):
    """Both pools with a last window that overhangs (ceil_mode), SAME pads, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2D(3, 8, 3, stride=2, padding="SAME"), nn.BatchNorm2D(8)
        self.max = nn.MaxPool2D(3, stride=2, ceil_mode=True)
        self.body, self.norm2 = nn.Conv2D(8, 8, 3, padding=1, bias_attr=False), nn.BatchNorm2D(8)
        self.mean = nn.AvgPool2D(3, stride=2, padding=1, ceil_mode=True)
        self.hidden, self.head = nn.Linear(72, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max(self.act(F.relu, self.norm1(self.stem(x))))
        x = self.mean(self.act(F.relu, self.norm2(self.body(x))))
        return self.head(self.act(F.relu, self.hidden(paddle.flatten(x, 1))))


class Mobile(Net):
    """ReLU6, a depthwise convolution, hard swish, a gate by hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2D(3, 8, 3, stride=2, padding=1), nn.BatchNorm2D(8)
        self.deep, self.norm2 = nn.Conv2D(8, 8, 3, padding=1, groups=8), nn.BatchNorm2D(8)
        self.squeeze, self.excite = nn.Conv2D(8, 4, 1), nn.Conv2D(4, 8, 1)
        self.last, self.head = nn.Conv2D(8, 12, 1), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(F.relu6, self.norm1(self.stem(x)))
        y = self.act(F.hardswish, self.norm2(self.deep(x)))
        gate = F.hardsigmoid(self.excite(self.act(F.relu, self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = self.act(F.hardswish, self.last(x + y * gate))
        return self.head(paddle.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Slopes(Net):
    """PReLU with a slope per channel, ELU, mish, dilated and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2D(3, 8, 3), nn.BatchNorm2D(8)
        self.wide, self.prelu = nn.Conv2D(8, 8, 3, dilation=2), nn.PReLU(8)
        self.up = nn.Conv2DTranspose(8, 6, 3, stride=2, padding=1)
        self.last, self.head = nn.Conv2D(6, 8, 3, stride=2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.prelu, self.norm(self.stem(x)))
        x = self.act(F.mish, self.last(self.act(F.elu, self.up(self.wide(x)))))
        return self.head(x.max(axis=[2, 3]))


class Leaky(Net):
    """LeakyReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2D(3, 8, 3, stride=2), nn.BatchNorm2D(8)
        self.last, self.head = nn.Conv2D(8, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(functools.partial(F.leaky_relu, negative_slope=0.2), self.norm(self.stem(x)))
        return self.head(self.act(F.leaky_relu, self.last(x)).mean([2, 3]))


class SiluGate(Net):
    """SiLU, and squeeze-and-excitation: its sigmoid is a gate, so that no rule applies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2D(3, 8, 3, stride=2, padding=1), nn.BatchNorm2D(8)
        self.squeeze, self.excite = nn.Conv2D(8, 4, 1), nn.Conv2D(4, 8, 1)
        self.last, self.head = nn.Conv2D(8, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(F.silu, self.norm(self.stem(x)))
        gate = F.sigmoid(self.excite(self.act(F.silu, self.squeeze(x.mean([2, 3], keepdim=True)))))
        return self.head(self.act(F.swish, self.last(x * gate)).mean([2, 3]))


class Transformer(Net):
    """Patches, attention, LayerNorm, GELU by erf (its tanh form is exported as erf)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2D(3, 16, 4, stride=4)
        self.norm1, self.attention = nn.LayerNorm(16), nn.MultiHeadAttention(16, 2)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose([0, 2, 1])
        x = x + self.attention(self.norm1(x))
        x = x + self.down(self.act(F.gelu, self.up(self.norm2(x))))
        return self.head(self.act(F.gelu, self.hidden(x.mean(1))))


class Perceptron(Net):
    """ReLU, tanh, sigmoid, a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(F.tanh, self.second(self.act(F.relu, self.first(x))))
        x = self.head(self.act(F.sigmoid, self.third(x)))
        return x if self.logits else F.softmax(x)


class Recurrent(Net):
    """An LSTM over a sequence; its gates are no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.hidden, self.head = nn.LSTM(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        return self.head(self.act(F.relu, self.hidden(x[:, -1])))


def reseed(net: Net) -> None:
    """Our own values in place of Paddle's random ones."""
    for name, value in net.state_dict().items():
        shape, last = tuple(value.shape), name.rpartition(".")[2]
        if name.startswith("prelu"):
            kind = "slope"
        elif last == "_variance":
            kind = "variance"
        elif len(shape) > 1:
            kind = "kernel"
        else:
            kind = "scale" if last == "weight" else "shift"
        fan_in = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
        value.set_value(weights(name, shape, kind, fan_in))


def export(make: type[Net], shape: tuple[int, ...], opset: int, path: Path) -> dict:
    net = make()
    reseed(net)
    net.eval()
    x, target = image(make.__name__, *shape), targets()
    arrays = {"x": x, "target": target, "output": net(paddle.to_tensor(x)).numpy()}
    net.logits = True
    if make is Recurrent:
        net.train()  # Paddle keeps what an LSTM's gradient needs in training mode alone, and nothing here drops out
    for name in ("gradient", "guided"):
        net.guided = name == "guided"
        fed = paddle.to_tensor(x, stop_gradient=False)
        picked = (net(fed) * F.one_hot(paddle.to_tensor(target), CLASSES)).sum()
        picked.backward()  # paddle.grad, which would leave out the weights, fails for an LSTM
        arrays[name] = fed.grad.numpy()
    net.guided = net.logits = False
    net.eval()
    spec = [paddle.static.InputSpec([None, *shape], "float32", "x")]
    paddle.onnx.export(net, str(path.with_suffix("")), input_spec=spec, opset_version=opset)
    if not path.exists():
        raise RuntimeError("paddle2onnx wrote no file")
    return arrays


NETS = {
    "relu": (Relu, (3, 19, 19), 13),
    "relu_opset11": (Relu, (3, 19, 19), 11),
    "mobile": (Mobile, (3, 16, 16), 14),
    "slopes": (Slopes, (3, 12, 12), 16),
    "silu_gate": (SiluGate, (3, 16, 16), 15),
    "transformer": (Transformer, (3, 16, 16), 17),
    "perceptron": (Perceptron, (20,), 13),
    "recurrent": (Recurrent, (7, 6), 14),
}

if paddle.__version__.startswith("2."):
    # paddle2onnx 2.1 for Paddle 3 writes uninitialised memory as the slope, another one each time.
    NETS["leaky"] = (Leaky, (3, 16, 16), 15)

if __name__ == "__main__":
    main({name: functools.partial(export, *arguments) for name, arguments in NETS.items()})
