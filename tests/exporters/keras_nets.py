"""Keras 3 on TensorFlow, exported by Keras itself and by tf2onnx: NHWC throughout."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
import tf2onnx
from common import CLASSES, image, main, targets, weights
from keras import Layer, Model, layers

Rule = Callable[[Layer], Layer]


def plain(activation: Layer) -> Layer:
    return activation


class Guided(Layer):
    """An activation layer whose gradient is R = dx where dy > 0, else 0."""

    def __init__(self, activation: Layer) -> None:
        super().__init__()
        self.activation = activation

    def call(self, x: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def gate(y: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            return tf.identity(y), tf.nn.relu

        return gate(self.activation(x))


def relu(x: tf.Tensor, act: Rule) -> tf.Tensor:
    """SAME pads on an even size at stride 2 (more at the end than at the start), both pools, logits."""
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, strides=2, padding="same")(x))
    x = layers.MaxPooling2D(3, 2, padding="same")(act(layers.ReLU())(x))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x))
    x = layers.AveragePooling2D(2, 1, padding="same")(act(layers.ReLU())(x))
    x = act(layers.Activation("relu"))(layers.Dense(16)(layers.Flatten()(x)))
    return layers.Dense(CLASSES)(x)


def mobile(x: tf.Tensor, act: Rule) -> tf.Tensor:
    """ReLU6, depthwise and separable convolutions, explicit zero padding, a residual."""
    x = layers.Conv2D(8, 3, strides=2)(layers.ZeroPadding2D(((0, 1), (0, 1)))(x))
    x = act(layers.ReLU(max_value=6.0))(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(3, padding="same")(x)
    y = act(layers.Activation("relu6"))(layers.BatchNormalization()(y))
    y = act(layers.Activation("hard_swish"))(layers.SeparableConv2D(8, 3, padding="same")(y))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x + y))


def leaky(x: tf.Tensor, act: Rule) -> tf.Tensor:
    """LeakyReLU, PReLU with a slope per channel, ELU, dilated and transposed convolutions, upsampling."""
    x = act(layers.LeakyReLU(negative_slope=0.2))(layers.BatchNormalization()(layers.Conv2D(8, 3)(x)))
    x = act(layers.PReLU(shared_axes=[1, 2]))(layers.Conv2D(8, 3, dilation_rate=2)(x))
    x = layers.Conv2DTranspose(6, 3, strides=2, padding="same")(x)
    x = act(layers.ELU())(layers.Conv2D(8, 3, strides=2)(layers.UpSampling2D(2)(x)))
    return layers.Dense(CLASSES)(layers.GlobalMaxPooling2D()(x))


def silu_gate(x: tf.Tensor, act: Rule) -> tf.Tensor:
    """SiLU, and squeeze-and-excitation: its sigmoid is a gate, so that no rule applies to it."""
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, strides=2, padding="same")(x))
    x = act(layers.Activation("silu"))(x)
    squeezed = layers.GlobalAveragePooling2D(keepdims=True)(x)
    squeezed = act(layers.Activation("silu"))(layers.Conv2D(4, 1)(squeezed))
    x = layers.Multiply()([x, layers.Conv2D(8, 1, activation="sigmoid")(squeezed)])
    x = act(layers.Activation("mish"))(layers.Conv2D(8, 3)(x))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))


def transformer(x: tf.Tensor, act: Rule) -> tf.Tensor:
    """Patches, attention, LayerNorm, GELU by tanh."""
    x = layers.Reshape((-1, 16))(layers.Conv2D(16, 4, strides=4)(x))
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    x = x + layers.MultiHeadAttention(2, 8)(y, y)
    y = layers.Dense(32)(layers.LayerNormalization(epsilon=1e-6)(x))
    x = x + layers.Dense(16)(act(layers.Activation(functools.partial(keras.activations.gelu, approximate=True)))(y))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x))


def gelu(x: tf.Tensor, act: Rule) -> tf.Tensor:
    """GELU by erf, Keras' default."""
    x = act(layers.Activation("gelu"))(layers.Conv2D(8, 3, strides=2)(x))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))


def perceptron(x: tf.Tensor, act: Rule) -> tf.Tensor:
    """ReLU, tanh, softplus, SELU, scaled inputs; the caller adds a softmax."""
    x = layers.Rescaling(0.5, offset=0.1)(x)
    for name in ("relu", "tanh", "softplus", "selu"):
        x = act(layers.Activation(name))(layers.Dense(16)(x))
    return layers.Dense(CLASSES)(x)


def recurrent(x: tf.Tensor, act: Rule) -> tf.Tensor:
    """An LSTM over a sequence; its gates are no activations."""
    return layers.Dense(CLASSES)(act(layers.ReLU())(layers.Dense(8)(layers.LSTM(8)(x))))


KINDS = {
    "gamma": "scale",
    "moving_variance": "variance",
    "alpha": "slope",
    "beta": "shift",
    "bias": "shift",
    "moving_mean": "shift",
}


def build(make: Callable, shape: tuple[int, ...], rule: Rule, softmax: bool) -> Model:
    x = keras.Input(shape, name="img")
    y = make(x, rule)
    net = Model(x, layers.Softmax()(y) if softmax else y)
    for index, variable in enumerate(net.weights):
        kind = KINDS.get(variable.name, "kernel")
        fan_in = int(np.prod(variable.shape[:2] if "depthwise" in variable.name else variable.shape[:-1]))
        # By place, not by path: two nets that differ in the rule alone number their layers differently.
        variable.assign(weights(f"{make.__name__} {index}", tuple(variable.shape), kind, fan_in))
    return net


def export(make: Callable, shape: tuple[int, ...], opset: int | None, softmax: bool, path: Path) -> dict:
    """opset None: by Keras itself, at the opset of its choice; else by tf2onnx."""
    x, target = image(make.__name__, *shape), targets()
    net = build(make, shape, plain, softmax)
    arrays = {"x": x, "target": target, "output": net(x).numpy()}
    for name, rule in (("gradient", plain), ("guided", Guided)):
        logits = build(make, shape, rule, softmax=False)
        with tf.GradientTape() as tape:
            fed = tf.constant(x)
            tape.watch(fed)
            picked = tf.reduce_sum(tf.gather(logits(fed), target, axis=1, batch_dims=1))
        arrays[name] = tape.gradient(picked, fed).numpy()
    if opset is None:
        net.export(str(path), format="onnx", verbose=False)
    else:
        signature = (tf.TensorSpec([None, *shape], tf.float32, name="img"),)
        tf2onnx.convert.from_keras(net, input_signature=signature, opset=opset, output_path=str(path))
    return arrays


# Net, input shape, opset of tf2onnx (None: Keras' own export), a softmax at the end.
NETS = {
    "relu_keras": (relu, (16, 16, 3), None, False),
    "relu_tf2onnx11": (relu, (16, 16, 3), 11, False),
    "relu_tf2onnx18": (relu, (16, 16, 3), 18, True),
    "mobile_keras": (mobile, (16, 16, 3), None, True),
    "mobile_tf2onnx13": (mobile, (16, 16, 3), 13, False),
    "leaky_keras": (leaky, (12, 12, 3), None, False),
    "leaky_tf2onnx15": (leaky, (12, 12, 3), 15, False),
    "silu_gate_keras": (silu_gate, (16, 16, 3), None, False),
    "silu_gate_tf2onnx17": (silu_gate, (16, 16, 3), 17, True),
    "transformer_keras": (transformer, (16, 16, 3), None, False),
    "transformer_tf2onnx18": (transformer, (16, 16, 3), 18, False),
    "gelu_keras": (gelu, (16, 16, 3), None, False),
    "perceptron_keras": (perceptron, (20,), None, True),
    "perceptron_tf2onnx13": (perceptron, (20,), 13, True),
    "recurrent_keras": (recurrent, (7, 6), None, False),
    "recurrent_tf2onnx15": (recurrent, (7, 6), 15, False),
}

if __name__ == "__main__":
    main({name: functools.partial(export, *arguments) for name, arguments in NETS.items()})
