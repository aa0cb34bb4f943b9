// Arrays -> pictures; the twin of `signed_picture` in onnxgbp/render.py.
#pragma once

#include <optional>
#include <string>

#include "image.hpp"
#include "preprocessing.hpp"
#include "runtime.hpp"

namespace onnxgbp {

/// clip: the |value| shown in full colour; warning: what a reader has to know, or "".
struct Picture {
    Image image;
    double clip;
    std::string warning;
};

constexpr double kPercentile = 99.5;  // of |value|: a few outliers would leave the rest of a map invisible

/// The attribution [C, H, W] (or [H, W, C] for nhwc) as a picture of its own size. Three colour channels are each drawn
/// for itself: mid-grey (128) is zero. Of any other number, or where `layout` is nothing, the sum is drawn: blue,
/// white, red.
Picture signed_picture(const Tensor &attribution, std::optional<Layout> layout, Channels channels);

}  // namespace onnxgbp
