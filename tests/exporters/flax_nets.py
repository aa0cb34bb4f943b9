"""flax, linen and nnx, exported by jax2onnx: NHWC inside, NHWC or NCHW outside."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import BATCH, CLASSES, image, main, targets, weights
from flax import linen, nnx
from jax2onnx import to_onnx

Function = Callable[..., jax.Array]
Rule = Callable[[Function], Function]


def plain(activation: Function) -> Function:
    return activation


def guided(activation: Function) -> Function:
    """f(x, *parameters) whose gradient to x is R = dx where dy > 0, else 0."""

    def backward(pullback: Function, dy: jax.Array) -> tuple[jax.Array, ...]:
        dx, *others = pullback(dy)
        return jnp.where(dy > 0, dx, 0), *others

    ruled = jax.custom_vjp(activation)
    ruled.defvjp(functools.partial(jax.vjp, activation), backward)
    return ruled


def norm(x: jax.Array) -> jax.Array:
    return linen.BatchNorm(use_running_average=True)(x)


class Relu(linen.Module):
    """SAME pads on an even size at stride 2 (more at the end than at the start), both pools, logits."""

    rule: Rule

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        relu = self.rule(linen.relu)
        x = relu(norm(linen.Conv(8, (3, 3), strides=(2, 2))(x)))
        x = linen.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="SAME")
        x = relu(norm(linen.Conv(8, (3, 3), use_bias=False)(x)))
        x = linen.avg_pool(x, window_shape=(2, 2), strides=(1, 1), padding="SAME", count_include_pad=False)
        x = x.reshape((x.shape[0], -1))
        return linen.Dense(CLASSES)(relu(linen.Dense(16)(x)))


class Relu6(linen.Module):
    """An inverted residual with a depthwise convolution, a global mean."""

    rule: Rule

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        relu6 = self.rule(linen.relu6)
        x = relu6(norm(linen.Conv(8, (3, 3), strides=(2, 2))(x)))
        y = relu6(norm(linen.Conv(16, (1, 1))(x)))
        y = relu6(norm(linen.Conv(16, (3, 3), feature_group_count=16)(y)))
        x = x + norm(linen.Conv(8, (1, 1))(y))
        return linen.Dense(CLASSES)(x.mean(axis=(1, 2)))


class Leaky(linen.Module):
    """LeakyReLU, PReLU as flax writes it, ELU, a dilated convolution."""

    rule: Rule
    slopes: tuple[int, ...] = ()

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = norm(linen.Conv(8, (3, 3))(x))
        x = linen.Conv(8, (3, 3), kernel_dilation=(2, 2))(self.rule(linen.leaky_relu)(x))
        slope = self.param("slope", linen.initializers.ones, self.slopes)
        x = self.rule(lambda z, a: jnp.where(z >= 0, z, a * z))(x, slope)
        x = self.rule(linen.elu)(linen.Conv(8, (3, 3), strides=(2, 2), padding="VALID")(x))
        return linen.Dense(CLASSES)(x.max(axis=(1, 2)))


class LeakyChannels(Leaky):
    """A slope for each channel, as the paper has it."""

    slopes: tuple[int, ...] = (8,)


class SiluGate(linen.Module):
    """SiLU, and squeeze-and-excitation: its sigmoid is a gate, so that no rule applies to it."""

    rule: Rule

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.rule(linen.silu)(norm(linen.Conv(8, (3, 3), strides=(2, 2))(x)))
        squeezed = x.mean(axis=(1, 2), keepdims=True)
        gate = linen.sigmoid(linen.Conv(8, (1, 1))(self.rule(linen.silu)(linen.Conv(4, (1, 1))(squeezed))))
        x = self.rule(linen.hard_swish)(linen.Conv(8, (3, 3))(x * gate))
        return linen.Dense(CLASSES)(x.mean(axis=(1, 2)))


class Transformer(linen.Module):
    """Patches, position weights, attention, LayerNorm, GELU in flax's default, the tanh form."""

    rule: Rule

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(16, (4, 4), strides=(4, 4), padding="VALID")(x)
        x = x.reshape((x.shape[0], -1, 16))
        x = x + self.param("bias", linen.initializers.zeros, (1, x.shape[1], 16))
        x = x + linen.MultiHeadDotProductAttention(num_heads=2)(linen.LayerNorm()(x))
        y = self.rule(linen.gelu)(linen.Dense(32)(linen.LayerNorm()(x)))
        x = x + linen.Dense(16)(y)
        return linen.Dense(CLASSES)(linen.LayerNorm()(x).mean(axis=1))


class Perceptron(linen.Module):
    """ReLU, tanh, softplus, a softmax at the end."""

    rule: Rule
    softmax: bool = True

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for activation in (linen.relu, jnp.tanh, linen.softplus):
            x = self.rule(activation)(linen.Dense(16)(x))
        x = linen.Dense(CLASSES)(x)
        return linen.softmax(x) if self.softmax else x


class NnxGelu(nnx.Module):
    """The newer interface: convolutions, BatchNorm, GELU by erf."""

    def __init__(self, rule: Rule) -> None:
        random = nnx.Rngs(0)
        self.gelu = rule(functools.partial(nnx.gelu, approximate=False))
        self.stem = nnx.Conv(3, 8, (3, 3), strides=(2, 2), rngs=random)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=random)
        self.body = nnx.Conv(8, 8, (3, 3), padding="VALID", rngs=random)
        self.head = nnx.Linear(8, CLASSES, rngs=random)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.gelu(self.body(self.gelu(self.norm(self.stem(x)))))
        return self.head(x.mean(axis=(1, 2)))


KINDS = {"kernel": "kernel", "scale": "scale", "var": "variance", "bias": "shift", "mean": "shift", "slope": "slope"}


def reseeded(tree: Any) -> Any:
    """The same tree of weights with our own values."""

    def leaf(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        kind = next(KINDS[name] for name in reversed(names) if name in KINDS)
        return jnp.asarray(weights("/".join(names), value.shape, kind, int(np.prod(value.shape[:-1]))))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def functions(net: Any, x: np.ndarray, **options: Any) -> list[Function]:
    """The net with plain and with guided activations, closed over the same weights."""
    if issubclass(net, nnx.Module):
        made = []
        for rule in (plain, guided):
            module = net(rule)
            nnx.update(module, reseeded(nnx.state(module, (nnx.Param, nnx.BatchStat))))
            made.append(module)
        return made
    variables = reseeded(net(plain).init(jax.random.key(0), x))
    return [functools.partial(net(rule, **options).apply, variables) for rule in (plain, guided)]


def export(net: Any, shape: tuple[int, ...], opset: int, batch: str | int, nchw: bool, path: Path) -> dict:
    x, target = image(net.__name__, *shape), targets()
    whole, _ = functions(net, x)
    layout = {"inputs_as_nchw": [0]} if nchw else {}
    to_onnx(whole, [(batch, *shape)], opset=opset, return_mode="file", output_path=str(path), **layout)
    arrays = {"x": x, "target": target, "output": np.asarray(whole(x))}
    options = {"softmax": False} if net is Perceptron else {}
    for name, function in zip(("gradient", "guided"), functions(net, x, **options)):
        arrays[name] = np.asarray(jax.grad(lambda x, f=function: f(x)[np.arange(BATCH), target].sum())(x))
    if nchw:
        arrays |= {name: np.moveaxis(arrays[name], -1, 1) for name in ("x", "gradient", "guided")}
    return arrays


# Net, input shape, opset, batch, NCHW outside.
NETS = {
    "relu": (Relu, (16, 16, 3), 23, "B", False),
    "relu_nchw": (Relu, (16, 16, 3), 21, "B", True),
    "relu_static": (Relu, (18, 18, 3), 23, BATCH, False),
    "relu6": (Relu6, (16, 16, 3), 21, "B", False),
    "leaky": (Leaky, (12, 12, 3), 21, "B", False),
    "leaky_channels": (LeakyChannels, (12, 12, 3), 21, "B", False),
    "silu_gate": (SiluGate, (16, 16, 3), 21, "B", False),
    "transformer": (Transformer, (16, 16, 3), 23, "B", False),
    "perceptron": (Perceptron, (20,), 21, "B", False),
    "nnx_gelu": (NnxGelu, (16, 16, 3), 23, "B", False),
}

if __name__ == "__main__":
    main({name: functools.partial(export, *arguments) for name, arguments in NETS.items()})
