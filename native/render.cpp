#include "render.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "error.hpp"

namespace onnxgbp {
namespace {

constexpr double kMidGrey = 128;

// Blue (negative) over near-white (zero) to red (positive), evenly spaced; the same anchors as in render.py.
constexpr std::array<Colour, 11> kSigned{{{5, 48, 97},
                                          {33, 102, 172},
                                          {67, 147, 195},
                                          {146, 197, 222},
                                          {209, 229, 240},
                                          {247, 247, 247},
                                          {253, 219, 199},
                                          {244, 165, 130},
                                          {214, 96, 77},
                                          {178, 24, 43},
                                          {103, 0, 31}}};

/// Between two neighbours in order of size, as numpy.percentile interpolates.
double percentile(std::vector<double> values, double percent) {
    if (values.empty()) return 0;
    const double place = static_cast<double>(values.size() - 1) * (percent / 100);
    const auto below = static_cast<std::size_t>(place);
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(below);
    std::nth_element(values.begin(), middle, values.end());
    if (below + 1 == values.size()) return *middle;
    const double low = *middle, high = *std::min_element(middle + 1, values.end()), t = place - std::floor(place);
    return t < 0.5 ? low + (high - low) * t : high - (high - low) * (1 - t);
}

/// The percentile of |value|; of the values that are not zero, where most are.
double clip_of(const std::vector<double> &values) {
    std::vector<double> magnitudes;
    for (const double value : values) magnitudes.push_back(std::abs(value));
    const double clip = percentile(magnitudes, kPercentile);
    if (clip != 0) return clip;
    magnitudes.erase(std::remove(magnitudes.begin(), magnitudes.end(), 0.0), magnitudes.end());
    return percentile(std::move(magnitudes), kPercentile);
}

double scaled(double value, double clip) { return clip == 0 ? 0 : std::clamp(value / clip, -1.0, 1.0); }

std::uint8_t rounded(double value) { return static_cast<std::uint8_t>(std::nearbyint(value)); }

/// A value from -1 to 1 in blue, white and red.
Colour diverging(double value) {
    const double place = (value + 1) / 2, step = 0.1;
    const auto below = static_cast<std::size_t>(std::min(std::floor(place * 10), 9.0));
    Colour colour;
    for (std::size_t c = 0; c < 3; ++c) {
        const double low = kSigned[below][c], high = kSigned[below + 1][c];
        colour[c] = rounded(low + (high - low) / step * (place - static_cast<double>(below) * step));
    }
    return colour;
}

}  // namespace

Picture signed_picture(const Tensor &attribution, std::optional<Layout> layout, Channels channels) {
    if (attribution.shape.size() != 3) throw Error("the attribution is no picture: it has not three axes");
    const bool last = layout == Layout::nhwc;
    const auto size = [&](std::size_t axis) { return static_cast<std::size_t>(attribution.shape[axis]); };
    const std::size_t count = size(last ? 2 : 0), height = size(last ? 0 : 1), width = size(last ? 1 : 2);
    std::vector<double> values = attribution.values();
    std::size_t broken = 0;
    for (double &value : values)
        if (!std::isfinite(value)) {
            value = 0;
            ++broken;
        }
    const std::size_t area = width * height;
    const auto at = [&](std::size_t pixel, std::size_t channel) {
        return values[last ? pixel * count + channel : channel * area + pixel];
    };
    Picture picture{{width, height, std::vector<Colour>(area)}, 0, ""};
    if (layout && count == 3 && channels != Channels::grey) {
        picture.clip = clip_of(values);
        for (std::size_t i = 0; i < area; ++i)
            for (std::size_t c = 0; c < 3; ++c)
                picture.image.pixels[i][c] =
                    rounded(kMidGrey + 127 * scaled(at(i, channels == Channels::bgr ? 2 - c : c), picture.clip));
    } else {
        std::vector<double> sums(area);
        for (std::size_t i = 0; i < area; ++i)
            for (std::size_t c = 0; c < count; ++c) sums[i] += at(i, c);
        picture.clip = clip_of(sums);
        for (std::size_t i = 0; i < area; ++i) picture.image.pixels[i] = diverging(scaled(sums[i], picture.clip));
    }
    if (broken > 0)
        picture.warning = std::to_string(broken) + " of " + std::to_string(values.size()) +
                          " values are not finite, drawn as zero: the model overflows or divides by zero here";
    else if (picture.clip == 0)
        picture.warning =
            "the attribution is zero everywhere: no path from the input to the target is active; likely the target is "
            "an "
            "inactive unit behind a ReLU, or the rules let nothing through";
    return picture;
}

}  // namespace onnxgbp
