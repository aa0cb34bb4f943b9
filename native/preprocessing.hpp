// Photos -> what the model takes; the twin of onnxgbp/images.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "image.hpp"

namespace onnxgbp {

enum class Channels { rgb, bgr, grey };
enum class Layout { nchw, nhwc };

/// How a photo becomes the model's input: the fields, their order and their defaults are those of images.py.
struct Preprocessing {
    std::optional<std::int64_t> size;                           // the shorter side is resized to it
    std::optional<std::pair<std::int64_t, std::int64_t>> crop;  // height and width, cut out of the centre
    Channels channels = Channels::rgb;
    double scale = 1.0 / 255;
    std::vector<double> mean{0.0}, std{1.0};
    Layout layout = Layout::nchw;
    std::vector<std::string> assumed;  // the names of what the metadata does not say

    /// From the model's metadata `onnxgbp.preprocessing` (a JSON object, or nothing) and its input's shape (sizes; what
    /// is not above 0 is free). Throws Error: malformed, or for another shape.
    static Preprocessing of(const std::optional<std::string> &metadata, const std::string &input,
                            const std::vector<std::int64_t> &shape);

    /// All of it in one line.
    std::string text() const;

    /// The model's input for one photo, float [1, C, H, W] or [1, H, W, C], and its shape.
    /// Throws Error where the photo is smaller than the crop.
    std::pair<std::vector<float>, std::vector<std::int64_t>> prepare(const Image &image) const;
};

/// width x height pixels by Pillow's bilinear filter, a triangle as wide as a pixel of the smaller of the two pictures.
/// Its fixed-point steps are followed, so that not one pixel differs.
Image resized(const Image &image, std::size_t width, std::size_t height);

}  // namespace onnxgbp
