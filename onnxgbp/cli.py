"""The commands. No logic here: each parses its options, calls one function, and prints what it returns."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from onnxgbp.convert import BUILDERS, GradientGraph, fixed_scale
from onnxgbp.errors import OnnxgbpError, printable
from onnxgbp.lower import PROFILES
from onnxgbp.methods import METHODS, parse_method, parse_methods, sampling_options
from onnxgbp.model import load
from onnxgbp.rules import RULES, parse_activations, parse_rule, parse_rules
from onnxgbp.scale import parse_seed_scale
from onnxgbp.seed import SEEDS
from onnxgbp.target import parse_channels, parse_class, parse_target, parse_unit
from onnxgbp.views import REDUCTIONS, VIEWS

__all__ = ["main"]


class _Group(click.Group):
    """Turns what cannot be used into one line on stderr and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxgbpError as error:
            raise click.ClickException(str(error)) from None
        except MemoryError:
            raise click.ClickException("this takes more memory than there is") from None
        except BrokenPipeError:
            raise  # click ends quietly when nobody reads on
        except OSError as error:  # a full disk behind stdout
            raise click.ClickException(f"cannot print: {error.strerror}") from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxgbp")
def main() -> None:
    """Attribution for trained networks, straight from their ONNX file."""


def _say(line: str, *, err: bool = False) -> None:
    """Prints one line, in which there may be names out of files."""
    click.echo(printable(line), err=err)


def _complain(line: str) -> None:
    _say(line, err=True)


def _parsed(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A click callback that reports a malformed value as a usage error."""

    def callback(_ctx: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        try:
            return parse(value)
        except OnnxgbpError as error:
            raise click.BadParameter(str(error)) from None

    return callback


def _checked(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """The same for a value that is passed on as it is."""

    def check(value: Any) -> Any:
        parse(value)
        return value

    return _parsed(check)


def _numbers(option: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Of a list of numbers, which only the code for pictures can read."""

    def check(value: Any) -> None:
        if value is not None:
            from onnxgbp.images import parse_floats  # Pillow: only here

            parse_floats(option, value)

    return _checked(check)


def _runtimes(texts: tuple[str, ...]) -> None:
    if texts:
        from onnxgbp.checks.deployment import parse_runtime  # the evaluators: only here

        for text in texts:
            parse_runtime(text)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_model = click.argument("model", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
_method = click.option(
    "--method",
    default="guided",
    show_default=True,
    metavar="RULE|METHOD[:RULE]",
    callback=_parsed(parse_method),
    help=f"The rule at every activation ({', '.join(RULES)}; rectgrad:95 sets its percentile), or what is made of its "
    f"map ({', '.join(filter(None, METHODS))}).",
)


def _rule_alone(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--method",
        default=default,
        show_default=True,
        metavar="|".join(RULES),
        callback=_parsed(parse_rule),
        help="The rule at every activation; rectgrad:95 sets its percentile.",
    )


_seed = click.option(
    "--seed",
    type=click.Choice(SEEDS),
    default="one",
    show_default=True,
    help="What is sent back from the target: 1, or its own activation.",
)
_rules = _options(
    click.option(
        "--rule",
        multiple=True,
        metavar="PATTERN=RULE",
        callback=_checked(lambda rules: parse_rules("guided", rules)),
        help="Another rule for some nodes, first match wins: 'layer4*=guided', 'type:Clip=gradient', 'depth:<5=...'.",
    ),
    click.option(
        "--activations",
        default="all",
        show_default=True,
        metavar="all|relu|NAME,...",
        callback=_checked(parse_activations),
        help="Which activations get the rule.",
    ),
)
_place = _options(
    click.option(
        "--output",
        metavar="TENSOR",
        help="The tensor, or node, to explain.  [default: the scores before a last softmax]",
    ),
    click.option(
        "--unit",
        metavar="I,J,...|max",
        callback=_parsed(parse_unit),
        help="Of an inner tensor: channel, or channel and position; a slice 3:6 for its sum, max for the strongest.",
    ),
    _seed,
    click.option(
        "--wrt",
        multiple=True,
        metavar="TENSOR",
        help="Attribute to this tensor.  [default: the float inputs; the lookup of ids; the floats of pixels]",
    ),
    _rules,
)
_what = _options(
    _method,
    _place,
    click.option(
        "--layer",
        metavar="TENSOR",
        help="The feature map of grad-cam and the like.  [default: the last before it is pooled or flattened]",
    ),
)
_pixels = _options(
    click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option("--size", type=click.IntRange(1), help="Resize the shorter side to this."),
    click.option("--crop", type=click.IntRange(1), help="Then cut this square out of the centre."),
    click.option("--mean", metavar="A,B,C", callback=_numbers("mean"), help="Subtract, per channel."),
    click.option("--std", metavar="A,B,C", callback=_numbers("std"), help="Then divide, per channel."),
    click.option("--scale", type=float, help="Multiply the pixel values 0 to 255 first."),
    click.option("--channels", type=click.Choice(["rgb", "bgr"]), help="The order in which the model takes colours."),
)
_prepare = _options(
    _pixels, click.option("--layout", type=click.Choice(["nchw", "nhwc"]), help="The order of the model's axes.")
)
_target = click.option(
    "--target",
    default="argmax",
    show_default=True,
    metavar="argmax|topK|input|inputK|seed|CLASS",
    callback=_parsed(parse_target),
    help="The class to explain, an index or a name; topK for the K best; input and seed are fed when the model runs.",
)
_class = click.option(
    "--target",
    default="argmax",
    show_default=True,
    metavar="argmax|CLASS",
    callback=_parsed(parse_class),
    help="The class to explain, an index or a name.",
)


def _seed_scale(default: float | str) -> Callable[[Any], Any]:
    return click.option(
        "--seed-scale",
        default=default,
        show_default=True,
        type=str,
        metavar="FLOAT|auto",
        callback=_parsed(lambda value: value if value == "auto" else parse_seed_scale(value)),
        help="A power of two that keeps a float16 gradient in range; auto tries.",
    )


_sampling = _options(
    click.option("--n-samples", type=click.IntRange(1), help="Points of smoothgrad and the like.  [default: 50]"),
    click.option(
        "--stdevs",
        metavar="SHARE%|FLOAT",
        callback=_checked(lambda stdevs: sampling_options("smoothgrad", {"stdevs": stdevs})),
        help="Width of the noise, a share of the image's range, or absolute.  [default: 15%]",
    ),
    click.option("--n-steps", type=click.IntRange(1), help="Points of integrated-gradients.  [default: 50]"),
    click.option(
        "--baseline",
        metavar="FLOAT|FILE|FOLDER",
        help="Where integrated-gradients starts: a number, a photo or a .npy; several for expected-gradients.  "
        "[default: 0]",
    ),
    click.option("--random-seed", type=click.IntRange(0), help="Of the noise and the draws.  [default: 0]"),
    click.option(
        "--internal-batch-size", type=click.IntRange(1), help="How many such points run at once.  [default: 8]"
    ),
)


@main.command()
@_model
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@_what
@_target
@click.option(
    "--methods",
    metavar="METHOD,...",
    default=None,
    callback=_parsed(lambda names: parse_methods("guided", names) if names else ()),
    help="Several methods, one output attribution_METHOD each, over one forward pass.",
)
@click.option(
    "--profile",
    type=click.Choice(PROFILES),
    default="ort",
    show_default=True,
    help="Fastest in ONNX Runtime, or right in every runtime.",
)
@click.option(
    "--builder",
    type=click.Choice(list(BUILDERS)),
    default="onnxgbp",
    show_default=True,
    help="What differentiates: ours, or onnxruntime-training as a second opinion.",
)
@_seed_scale(1.0)
@click.option(
    "--view", type=click.Choice(VIEWS), default="signed", show_default=True, help="Add such a view as output."
)
@click.option(
    "--reduce", type=click.Choice(REDUCTIONS), default="none", show_default=True, help="Of the view's channels."
)
@click.option("--heatmap", is_flag=True, help="Add the view as uint8, scaled to the largest of each sample.")
def convert(model: Path, out: Path, **options: Any) -> None:
    """Writes MODEL together with its attribution as one plain ONNX file."""
    aim = {name: options.pop(name) for name in ("target", "output", "unit", "seed", "wrt", "layer", "builder")}
    aim["methods"] = options["methods"] or (options["method"],)
    source, scale = load(model), options.pop("seed_scale")
    graph = GradientGraph.build(source, **aim, seed_scale=fixed_scale(source, scale, aim, options))
    _say(f"{out}: {graph.save(out, **options)}")


def _forget_defaults(options: dict[str, Any]) -> None:
    """A converted file says these itself; only what was asked for can contradict it."""
    context = click.get_current_context()
    for name in ("method", "activations", "seed"):
        if context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            options[name] = None


@main.command()
@click.argument("paths", nargs=-1, required=True, metavar="[MODEL] IMAGE...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder for pictures, arrays and manifest.json.",
)
@_what
@click.option(
    "--methods",
    metavar="METHOD,...",
    callback=_parsed(lambda names: tuple(parse_method(name) for name in names.split(",")) if names else ()),
    help="Several methods in the place of --method, side by side in grid.png.",
)
@_class
@_seed_scale("auto")
@_sampling
@_prepare
@click.option("--vocab", type=click.Path(path_type=Path), help="Of tokens: vocab.txt, vocab.json or tokenizer.json.")
@click.option(
    "--reduce", type=click.Choice(["sum", "l2"]), help="Of a token's attribution over its embedding.  [default: sum]"
)
@click.option(
    "--features", type=click.Path(path_type=Path), help="Names of features or channels: one a line, or a JSON list."
)
@click.option(
    "--draw",
    type=click.Choice(["signal", "table"]),
    help="How rows of numbers are drawn.  [default: a table, a signal from 101 numbers without names]",
)
def explain(paths: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Explains photos and arrays: pictures, arrays and a manifest in a folder.

    MODEL is an .onnx file; without it a clone's own SqueezeNet is used (tools/demo builds it). How an image is
    prepared stands in the model's metadata; the options override it. IMAGE may be a folder of photos too, a .npy with
    samples along its first axis, or a .npz with an array for each input: signals, token ids and tables are drawn as
    such. These and --methods need the extra `plots`.
    """
    from onnxgbp.explain import explain_images  # Pillow and onnxruntime: only here

    _forget_defaults(options)
    failed = explain_images(paths, out, echo=_say, **options)
    if failed:
        raise click.ClickException(f"{len(failed)} of the inputs could not be explained; the others are done")


@main.command()
@_model
@click.argument("data", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder for the data set.")
@_what
@_class
@_seed_scale("auto")
@_sampling
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Samples in one run.")
@click.option("--part-size", type=click.IntRange(1), default=1000, show_default=True, help="Rows in one file.")
@click.option(
    "--attribution",
    type=click.Choice(["float16", "float32", "png", "none"]),
    default="float16",
    show_default=True,
    help="How maps are written: as tensors, as pictures, or not.",
)
@click.option("--column", metavar="NAME", help="The images in Parquet.  [default: image, or the only bytes]")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes, or actors of Ray Data.  [default: on the CPU one for each core, 8 at most; else 1]",
)
@click.option("--threads", type=click.IntRange(1), help="Of each worker.  [default: this machine's cores shared out]")
@click.option("--address", help="Of a Ray cluster, to which INPUT, MODEL and the folder are there too.")
@click.option("--num-gpus", type=click.FloatRange(0), help="Of each actor of Ray.")
@click.option("--max-errors", type=click.IntRange(0), help="Stop when more rows than this have errors.")
@_prepare
def batch(model: Path, data: Path, out: Path, **options: Any) -> None:
    """Explains a data set of any size, and writes it as Parquet; started again, it goes on where it stopped.

    INPUT is a folder of photos (and folders of them), a .txt file with a path on each line, Parquet with a column of
    images, or a .npy or .npz. Exit status 0: every row is good; 3: all is done, but some rows have errors; 1: refused
    or stopped; 130: interrupted.
    """
    from onnxgbp.batch import explain_batch  # pyarrow: only here

    _forget_defaults(options)
    explainer = ["method", "output", "unit", "seed", "wrt", "layer", "rule", "activations", "seed_scale", "provider"]
    explainer += ["n_samples", "stdevs", "n_steps", "baseline", "random_seed", "internal_batch_size"]
    try:
        counts = explain_batch(
            model,
            data,
            out,
            echo=_complain,
            options={name: options.pop(name) for name in explainer},
            **options,
        )
    except KeyboardInterrupt:
        _complain(f"Interrupted: what is in {out} stays, and the same command goes on")
        raise click.exceptions.Exit(130) from None
    _say(f"{out}: {counts.rows} rows, {counts.errors} with an error, {counts.blank} with a blank map")
    if counts.errors:
        raise click.exceptions.Exit(3)


@main.command()
@_model
@click.option("--layer", required=True, metavar="TENSOR", help="The feature map [N, C, H, W], by tensor or node name.")
@click.option(
    "--channel",
    multiple=True,
    required=True,
    metavar="C|strongest:K",
    callback=_parsed(parse_channels),
    help="A channel; may be given again. strongest:16 for the 16 whose best images excite them most.",
)
@click.option("--images", required=True, type=click.Path(path_type=Path), help="The folder of photos to look through.")
@click.option("--top", type=click.IntRange(1), default=9, show_default=True, help="How many images of each channel.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder for what is written.")
@click.option("--whole", is_flag=True, help="Send back the channel's whole map, not the strongest unit alone.")
@_rule_alone("guided")
@_seed
@_rules
@_prepare
def neurons(model: Path, out: Path, **options: Any) -> None:
    """Pictures channels of a feature map: the images that excite them most, and what in these does.

    On the left of a channel's picture are reconstructions from its strongest unit, each scaled to its own contrast, on
    the right the parts of the photos that this unit sees.
    """
    from onnxgbp.neurons import picture_neurons  # Pillow and onnxruntime: only here

    failed = picture_neurons(model, out, echo=_say, complain=_complain, **options)
    if failed:
        raise click.ClickException(f"{len(failed)} of the images could not be used; the others are done")


@main.command()
@_model
@_what
@_target
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    help="A folder of photos, a .npy or .npz: measure what each gate removes of the gradient.",
)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Use this much of --data.")
@_json
def inspect(model: Path, as_json: bool, **options: Any) -> None:
    """Says what would be explained, every activation and what the method does to it, and what is missing."""
    from onnxgbp.inspection import inspect_model

    report = inspect_model(model, **options)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_text())


@main.command()
@_model
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder of photos, a .npy, or a .npz with an array for each input.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder for plots and health.json.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Use this much of --data.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Below this share of an activation's largest slope a place is saturated.",
)
@_rule_alone("gradient")
@_place
@click.option(
    "--target",
    default="argmax",
    show_default=True,
    metavar="argmax|CLASS",
    callback=_parsed(parse_class),
    help="The class whose score's gradient is followed, an index or a name.",
)
@_json
def health(model: Path, as_json: bool, **options: Any) -> None:
    """Measures MODEL over data: dead and saturated units, activations, gradients that vanish or explode."""
    from onnxgbp.health import model_health  # onnxruntime and, with --out, matplotlib: only here

    report = model_health(model, **options)
    click.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False) if as_json else report.to_text())


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="The model that OUT was made from.")
@click.option(
    "--for",
    "runtimes",
    multiple=True,
    metavar="RUNTIME",
    callback=_checked(_runtimes),
    help="Say what stands in its way: onnxruntime==1.17, openvino, opencv, web, triton, portable.",
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the file is run for comparison.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=2e-2,
    show_default=True,
    help="Of that comparison: the most that 1 - cosine may be.",
)
@_json
def verify(out: Path, source: Path | None, as_json: bool, **options: Any) -> None:
    """Checks a converted file: outputs unchanged, attribution against finite differences, standard operators only.

    Exit status 1 where a check fails: a gate before a deployment. Rows and keys of --json keep their names.
    """
    from onnxgbp.verify import verify_model

    report = verify_model(out, source, **options)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_text())
    if not report.passed:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="A folder of photos or one photo; a .npy or .npz laid out as A takes it.",
)
@click.option("--limit", type=click.IntRange(1), help="Use this many samples of --data.  [default: all]")
@click.option(
    "--method",
    metavar="RULE|METHOD[:RULE]",
    callback=_parsed(lambda name: name and parse_method(name)),
    help="As for explain.  [default: guided, or what a converted file has]",
)
@click.option(
    "--target",
    default="argmax",
    show_default=True,
    metavar="argmax|CLASS",
    callback=_parsed(parse_class),
    help="The class that both explain: A's strongest, an index, or A's name of one.",
)
@click.option("--min-cosine", type=float, help="Fail where the maps of a sample are less alike.")
@click.option("--max-relative-error", type=float, help="Fail where the median relative error of a map is larger.")
@click.option("--min-agreement", type=float, help="Fail if a smaller share of samples has the same strongest class.")
@click.option("--max-score-difference", type=float, help="Fail where a score differs by more.")
@click.option("--layout-b", type=click.Choice(["nchw", "nhwc"]), help="Transpose arrays for B, which has these axes.")
@_pixels
@_json
def diff(
    a: Path,
    b: Path,
    as_json: bool,
    min_cosine: float | None,
    max_relative_error: float | None,
    min_agreement: float | None,
    max_score_difference: float | None,
    **options: Any,
) -> None:
    """Says how far model B agrees with model A on data: predictions, and attributions of the same class.

    A and B are classifiers or converted files. With a threshold, exit status 1 says that it is missed.
    """
    from onnxgbp.diff import Thresholds, diff_models

    asked = Thresholds(min_cosine, min_agreement, max_score_difference, max_relative_error)
    found = diff_models(a, b, thresholds=asked, **options)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
    for line in found.missed:
        _complain(f"FAIL: {line}")
    if not found.passed:
        raise click.exceptions.Exit(1)


_evaluated = _options(
    _model,
    click.option("--images", required=True, type=click.Path(path_type=Path), help="A folder of photos; a .npy."),
    click.option(
        "--methods",
        default="gradient,deconvnet,guided",
        show_default=True,
        metavar="METHOD,...",
        help="What is tested: any method that explain takes.",
    ),
    click.option("-o", "--out", type=click.Path(path_type=Path), help="A folder for pictures and figures."),
    click.option("--output", metavar="TENSOR", help="The tensor to explain.  [default: the scores]"),
    click.option("--limit", type=click.IntRange(1), help="Use this many samples.  [default: all]"),
    click.option("--random-seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn."),
    _prepare,
    _json,
)


@main.command()
@_evaluated
@click.option("--zero-mean", is_flag=True, help="Draw the weights around 0, not around each one's own mean.")
def sanity(model: Path, as_json: bool, **options: Any) -> None:
    """Says whether maps depend on what MODEL learned: layers made random, other classes (Adebayo et al. 2018).

    For each method, how alike its maps stay when the layers' weights become random from the scores downwards, or when
    another class is explained. A map that hardly changes shows the picture, not the model.
    """
    from onnxgbp.sanity import check_sanity  # Pillow and onnxruntime: only here

    report = check_sanity(model, progress=_complain, **options)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_text())


@main.command()
@_evaluated
@click.option("--boxes", type=click.Path(path_type=Path), help="JSON: file name -> [x0, y0, x1, y1] in photo pixels.")
@click.option("--baseline", default="blur", show_default=True, metavar="blur|mean", help="What replaces a pixel.")
@click.option("--steps", type=click.IntRange(1), default=32, show_default=True, help="In which pixels go.")
@click.option("--noise-samples", type=click.IntRange(0), default=5, show_default=True, help="For max-sensitivity.")
@click.option("--radius", type=float, default=0.02, show_default=True, help="Of the noise, of the sample's range.")
def faithfulness(model: Path, as_json: bool, **options: Any) -> None:
    """Says how far maps point at what MODEL uses, against a random map and an edge detector.

    Deletion and insertion curves (Petsiuk et al. 2018), the pointing game where there are boxes (Zhang et al. 2016),
    max-sensitivity (Yeh et al. 2019).
    """
    from onnxgbp.faithfulness import check_faithfulness  # Pillow and onnxruntime: only here

    report = check_faithfulness(model, progress=_complain, **options)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_text())


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Steps on stderr where someone watches, from the first on: what is refused before leaves one line alone."""
    with contextlib.ExitStack() as stack:
        drawn: list[Any] = []

        def step(done: int, count: int, what: str) -> None:
            if sys.stderr.isatty() and not drawn:
                look: dict[str, Any] = {"show_pos": True, "show_eta": False, "item_show_func": lambda item: item}
                bar = click.progressbar(length=count, label=label, file=sys.stderr, **look)
                drawn.append(stack.enter_context(bar))
            for bar in drawn:
                bar.update(done - bar.pos, what)

        yield step


@main.command()
@_model
@click.option("--images", required=True, type=click.Path(path_type=Path), help="A folder of photos, or a photo.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The HTML file to write.")
@click.option("--methods", metavar="METHOD,...", help="What is shown: any that explain takes.  [default: eight]")
@_class
@click.option("--output", metavar="TENSOR", help="The tensor to explain.  [default: the scores]")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Show this many photos.")
@click.option(
    "--evaluate",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Photos that sanity checks and faithfulness look at; 0 for neither.",
)
@click.option("--random-seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
@_prepare
def report(model: Path, images: Path, out: Path, **options: Any) -> None:
    """Writes one HTML file on MODEL: its audit, photos with their maps, sanity, faithfulness and health.

    The file needs no network and no other file. Started again after it was stopped, the command goes on: what is done
    is kept in OUT.parts until the file is there.
    """
    from onnxgbp.report import write_report  # Pillow, onnxruntime and jinja2: only here

    held: list[str] = []  # lines would break the bar
    try:
        with _bar("report") as progress:
            failed = write_report(model, images, out, progress=progress, complain=held.append, **options)
    except KeyboardInterrupt:
        click.echo(f"Interrupted: what is done stays in {out}.parts, and the same command goes on", err=True)
        raise click.exceptions.Exit(130) from None
    finally:
        for line in held:
            click.echo(f"Error: {line}", err=True)
    click.echo(str(out))
    if failed:
        raise click.ClickException(f"{len(failed)} of the photos could not be explained; the report is done")


@main.command()
@_json
def ops(as_json: bool) -> None:
    """Lists the operators: what is differentiated, which are activations, whose gradient is zero."""
    from onnxgbp.operators import operator_table, operator_text

    click.echo(json.dumps(operator_table(), indent=2) if as_json else operator_text())


@main.command("export-triton")
@click.argument("out", metavar="OUT.onnx", type=click.Path(path_type=Path))
@click.option("-o", "--repository", required=True, type=click.Path(path_type=Path), help="The folder of models.")
@click.option("--name", help="Of the model in the repository.  [default: the file's]")
@click.option("--max-batch", type=click.IntRange(0), help="Samples at once; 0 for no batches.  [default: 8]")
def export_triton_command(out: Path, **options: Any) -> None:
    """Writes a converted file as an entry of a Triton model repository."""
    from onnxgbp.triton import export_triton

    _say(export_triton(out, **options))


@main.command()
@_json
def doctor(as_json: bool) -> None:
    """Says what is installed, which providers really work, what is wrong, and what to do about it."""
    from onnxgbp.doctor import diagnose

    found = diagnose()
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
    if not found.passed:
        raise click.exceptions.Exit(1)
