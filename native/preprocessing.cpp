#include "preprocessing.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#include "error.hpp"
#include "json.hpp"

namespace onnxgbp {
namespace {

constexpr std::int64_t kWidest =
    8;  // a longer side of more than this many shorter ones is trimmed before it is resized
const char *const kFields[] = {"size", "crop", "channels", "scale", "mean", "std", "layout"};
const char *const kChannels[] = {"rgb", "bgr", "grey"};  // in the order of their enum, as the layouts
const char *const kLayouts[] = {"nchw", "nhwc"};
const char *const kKey = "the model's metadata 'onnxgbp.preprocessing'";

[[noreturn]] void malformed(const std::string &what) { throw Error(std::string(kKey) + " " + what); }

std::int64_t integer(const std::string &name, const json::Value &value) {
    const auto *number = value.get<json::Number>();
    if (!number || !number->integer || std::abs(number->value) > 1e9)
        malformed("has a " + name + " that is no integer");
    return static_cast<std::int64_t>(number->value);
}

/// The number that a text holds, and nothing else.
double number_in(const std::string &name, const std::string &text) {
    char *end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0') malformed("has a " + name + " that is no number");
    return value;
}

double number(const std::string &name, const json::Value &value) {
    if (const auto *given = value.get<json::Number>()) return given->value;
    if (const auto *text = value.get<std::string>()) return number_in(name, *text);
    malformed("has a " + name + " that is no number");
}

/// Numbers from a list, from one number, or from text such as 0.485,0.456,0.406.
std::vector<double> numbers(const std::string &name, const json::Value &value) {
    std::vector<double> result;
    if (const auto *items = value.get<json::Array>()) {
        for (const json::Value &item : *items) result.push_back(number(name, item));
    } else if (const auto *text = value.get<std::string>()) {
        for (std::size_t start = 0, end = 0; end != std::string::npos; start = end + 1) {
            end = text->find(',', start);
            result.push_back(number_in(name, text->substr(start, end == std::string::npos ? end : end - start)));
        }
    } else {
        result.push_back(number(name, value));
    }
    return result;
}

std::pair<std::int64_t, std::int64_t> pair(const std::string &name, const json::Value &value) {
    const auto *items = value.get<json::Array>();
    if (items && items->size() == 2) return {integer(name, (*items)[0]), integer(name, (*items)[1])};
    if (items) malformed("has a " + name + " that is neither an integer nor a height and a width");
    const std::int64_t side = integer(name, value);
    return {side, side};
}

/// One of the words, as its place among them.
template <std::size_t N>
std::size_t word(const std::string &name, const json::Value &value, const char *const (&words)[N]) {
    const auto *text = value.get<std::string>();
    const auto found = text ? std::find(std::begin(words), std::end(words), *text) : std::end(words);
    if (found == std::end(words)) malformed("has an unknown " + name);
    return static_cast<std::size_t>(found - std::begin(words));
}

json::Object parsed(const std::optional<std::string> &metadata) {
    if (!metadata) return {};
    json::Value document;
    try {
        document = json::parse(*metadata);
    } catch (const std::invalid_argument &error) {
        malformed(std::string("is no JSON: ") + error.what());
    }
    const auto *said = document.get<json::Object>();
    if (!said) malformed("is no JSON object");
    json::Object members;
    for (const auto &[name, value] : *said) {
        if (std::find(std::begin(kFields), std::end(kFields), name) == std::end(kFields))
            malformed("has an unknown entry '" + name + "'");
        if (!value.is_null()) members.emplace(name, value);
    }
    return members;
}

std::size_t count_of(Channels channels) { return channels == Channels::grey ? 1 : 3; }

std::string text_of(const std::vector<std::int64_t> &shape) {
    std::string text;
    for (const std::int64_t dim : shape) text += (text.empty() ? "" : ", ") + (dim > 0 ? std::to_string(dim) : "?");
    return "[" + text + "]";
}

void check(const Preprocessing &chosen) {
    if (chosen.size && *chosen.size < 1) malformed("has a size that is not a number of pixels");
    if (chosen.crop && std::min(chosen.crop->first, chosen.crop->second) < 1)
        malformed("has a crop that is not a number of pixels");
    const std::size_t count = count_of(chosen.channels);
    for (const auto *values : {&chosen.mean, &chosen.std})
        if (values->size() != 1 && values->size() != count)
            malformed("has " + std::to_string(values->size()) + " values of mean or std for " + std::to_string(count) +
                      " channels");
    const auto finite = [](double value) { return std::isfinite(value); };
    const auto zero = [](double value) { return value == 0; };
    if (!finite(chosen.scale) || !std::all_of(chosen.mean.begin(), chosen.mean.end(), finite) ||
        !std::all_of(chosen.std.begin(), chosen.std.end(), finite) || zero(chosen.scale) ||
        std::any_of(chosen.std.begin(), chosen.std.end(), zero))
        malformed("must have finite numbers for scale, mean and std, scale and std not 0");
}

/// One axis of the filter: which pixels each new one is made of, and their weights.
struct Window {
    std::size_t first;
    std::vector<std::int32_t> weights;
};

constexpr int kBits = 22;  // of a weight behind the point: 32 less the 8 of a pixel and 2 for what overshoots

std::vector<Window> windows(std::size_t from, std::size_t to) {
    const double scale = static_cast<double>(from) / static_cast<double>(to);
    const double reach = std::max(scale, 1.0);
    std::vector<Window> result(to);
    for (std::size_t i = 0; i < to; ++i) {
        const double centre = (static_cast<double>(i) + 0.5) * scale;
        const auto first = static_cast<std::size_t>(std::max(centre - reach + 0.5, 0.0));
        const auto last = static_cast<std::size_t>(std::min(centre + reach + 0.5, static_cast<double>(from)));
        std::vector<double> weights;
        double sum = 0;
        for (std::size_t x = first; x < last; ++x) {
            const double distance = std::abs((static_cast<double>(x) - centre + 0.5) * (1 / reach));
            weights.push_back(std::max(1 - distance, 0.0));
            sum += weights.back();
        }
        result[i].first = first;
        for (const double weight : weights)
            result[i].weights.push_back(
                static_cast<std::int32_t>(0.5 + (sum == 0 ? weight : weight / sum) * (1 << kBits)));
    }
    return result;
}

/// One new pixel: the window's pixels, `step` apart from `start` on.
Colour blended(const Window &window, const Colour *start, std::size_t step) {
    Colour result;
    for (std::size_t c = 0; c < 3; ++c) {
        std::int64_t sum = std::int64_t{1} << (kBits - 1);
        for (std::size_t i = 0; i < window.weights.size(); ++i)
            sum += std::int64_t{window.weights[i]} * start[(window.first + i) * step][c];
        result[c] = static_cast<std::uint8_t>(std::min<std::int64_t>(sum >> kBits, 255));
    }
    return result;
}

Image cropped(const Image &image, std::size_t left, std::size_t top, std::size_t width, std::size_t height) {
    Image result{width, height, {}};
    result.pixels.reserve(width * height);
    for (std::size_t y = 0; y < height; ++y) {
        const Colour *row = &image.at(left, top + y);
        result.pixels.insert(result.pixels.end(), row, row + width);
    }
    return result;
}

/// Rounded, halves to even, as Python's round does: the mode in which every program starts.
std::size_t rounded(double value) { return static_cast<std::size_t>(std::nearbyint(value)); }

/// The shorter side becomes `size`.
Image shorter_side(Image image, std::size_t size) {
    const std::size_t shorter = std::min(image.width, image.height);
    if (const std::size_t widest = kWidest * shorter; std::max(image.width, image.height) > widest) {
        const std::size_t width = std::min(image.width, widest), height = std::min(image.height, widest);
        image = cropped(image, (image.width - width) / 2, (image.height - height) / 2, width, height);
    }
    const auto side = [&](std::size_t old) {
        const double wanted = static_cast<double>(old) * static_cast<double>(size);
        return old == shorter ? size : rounded(wanted / static_cast<double>(shorter));
    };
    const std::size_t width = side(image.width), height = side(image.height);
    if (width > kMostPixels / height)
        throw Error("a picture of which the shorter side has " + std::to_string(size) + " pixels is too large");
    return resized(image, width, height);
}

}  // namespace

Image resized(const Image &image, std::size_t width, std::size_t height) {
    Image wide = image;
    if (width != image.width) {
        const std::vector<Window> columns = windows(image.width, width);
        wide = Image{width, image.height, std::vector<Colour>(width * image.height)};
        for (std::size_t y = 0; y < image.height; ++y)
            for (std::size_t x = 0; x < width; ++x)
                wide.pixels[y * width + x] = blended(columns[x], &image.at(0, y), 1);
    }
    if (height == image.height) return wide;
    const std::vector<Window> rows = windows(image.height, height);
    Image result{width, height, std::vector<Colour>(width * height)};
    for (std::size_t y = 0; y < height; ++y)
        for (std::size_t x = 0; x < width; ++x) result.pixels[y * width + x] = blended(rows[y], &wide.at(x, 0), width);
    return result;
}

Preprocessing Preprocessing::of(const std::optional<std::string> &metadata, const std::string &input,
                                const std::vector<std::int64_t> &shape) {
    const json::Object said = parsed(metadata);
    const auto get = [&](const char *name) {
        const auto found = said.find(name);
        return found == said.end() ? nullptr : &found->second;
    };
    const std::string where = "input '" + input + "' of shape " + text_of(shape);
    if (shape.size() != 4) throw Error(where + " takes no pictures");

    Preprocessing result;
    // Three or one at the end, and not at the front, can only be channels there.
    const auto colours = [](std::int64_t dim) { return dim == 1 || dim == 3; };
    result.layout = colours(shape[3]) && !colours(shape[1]) ? Layout::nhwc : Layout::nchw;
    if (const auto *value = get("layout")) result.layout = static_cast<Layout>(word("layout", *value, kLayouts));
    const bool last = result.layout == Layout::nhwc;
    const std::int64_t channels = shape[last ? 3 : 1], height = shape[last ? 1 : 2], width = shape[last ? 2 : 3];
    if (channels > 0 && !colours(channels))
        throw Error(where + " has " + std::to_string(channels) + " channels, where a picture has 1 or 3");

    result.channels = channels == 1 ? Channels::grey : Channels::rgb;
    if (const auto *value = get("channels"))
        result.channels = static_cast<Channels>(word("channels", *value, kChannels));
    if (const auto *value = get("scale")) result.scale = number("scale", *value);
    if (const auto *value = get("mean")) result.mean = numbers("mean", *value);
    if (const auto *value = get("std")) result.std = numbers("std", *value);
    if (height > 0 && width > 0) result.crop = {height, width};
    if (const auto *value = get("crop")) result.crop = pair("crop", *value);
    if (const auto *value = get("size"))
        result.size = integer("size", *value);
    else if (result.crop)
        result.size = std::max(result.crop->first, result.crop->second);  // either way round, the crop must fit in
    for (const std::string name : kFields) {
        const bool absent = (name == "size" && !result.size) || (name == "crop" && !result.crop);
        if (!absent && !get(name.c_str())) result.assumed.push_back(name);
    }
    check(result);

    if (channels > 0 && static_cast<std::size_t>(channels) != count_of(result.channels))
        throw Error(where + " has a channel axis of " + std::to_string(channels) + ", but the channels said are " +
                    std::to_string(count_of(result.channels)));
    if (result.crop) {
        const auto [high, wide] = *result.crop;
        const std::string crop = std::to_string(high) + " x " + std::to_string(wide);
        if ((height > 0 && height != high) || (width > 0 && width != wide))
            throw Error(where + " does not fit the crop " + crop);
        if (result.size && *result.size < std::min(high, wide))
            throw Error("size " + std::to_string(*result.size) + " is smaller than the crop " + crop +
                        ": convert with a larger one");
    }
    return result;
}

std::string Preprocessing::text() const {
    const auto number = [](const char *format, double value) {
        char buffer[32];
        std::snprintf(buffer, sizeof buffer, format, value);
        return std::string(buffer);
    };
    const auto list = [&](const std::vector<double> &values) {
        std::string joined;
        for (const double value : values) joined += (joined.empty() ? "" : ",") + number("%g", value);
        return joined;
    };
    std::string result;
    if (size) result += "shorter side " + std::to_string(*size) + ", ";
    if (crop) result += "crop " + std::to_string(crop->first) + " x " + std::to_string(crop->second) + ", ";
    return result + kChannels[static_cast<std::size_t>(channels)] + ", scale " + number("%.6g", scale) + ", mean " +
           list(mean) + ", std " + list(std) + ", " + kLayouts[static_cast<std::size_t>(layout)];
}

std::pair<std::vector<float>, std::vector<std::int64_t>> Preprocessing::prepare(const Image &photo) const {
    Image image = size ? shorter_side(photo, static_cast<std::size_t>(*size)) : photo;
    if (crop) {
        const auto high = static_cast<std::size_t>(crop->first), wide = static_cast<std::size_t>(crop->second);
        if (image.width < wide || image.height < high)
            throw Error("the picture is " + std::to_string(image.width) + " x " + std::to_string(image.height) +
                        ", smaller than the crop " + std::to_string(wide) + " x " + std::to_string(high));
        const auto margin = [](std::size_t whole, std::size_t part) {
            return rounded(static_cast<double>(whole - part) / 2);
        };
        image = cropped(image, margin(image.width, wide), margin(image.height, high), wide, high);
    }
    const std::size_t count = count_of(channels), area = image.pixels.size();
    std::vector<float> values(count * area);
    const auto one = [](const std::vector<double> &numbers, std::size_t c) {
        return static_cast<float>(numbers[numbers.size() == 1 ? 0 : c]);
    };
    for (std::size_t c = 0; c < count; ++c) {
        const float factor = static_cast<float>(scale), shift = one(mean, c), divisor = one(std, c);
        for (std::size_t i = 0; i < area; ++i) {
            const Colour &pixel = image.pixels[i];
            // The weights of ITU-R BT.601 in 16 bits, as Pillow has them.
            const unsigned grey = (pixel[0] * 19595u + pixel[1] * 38470u + pixel[2] * 7471u + 0x8000u) >> 16;
            const unsigned value = channels == Channels::grey ? grey : pixel[channels == Channels::bgr ? 2 - c : c];
            const float scaled = static_cast<float>(value) * factor;
            values[layout == Layout::nchw ? c * area + i : i * count + c] = (scaled - shift) / divisor;
        }
    }
    const auto high = static_cast<std::int64_t>(image.height), wide = static_cast<std::int64_t>(image.width);
    const auto deep = static_cast<std::int64_t>(count);
    if (layout == Layout::nhwc) return {std::move(values), {1, high, wide, deep}};
    return {std::move(values), {1, deep, high, wide}};
}

}  // namespace onnxgbp
