#include "image.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <string_view>

#include "error.hpp"

namespace onnxgbp {
namespace {

constexpr std::size_t kLargestFile = std::size_t{1} << 30;

bool starts_with(const Bytes &bytes, std::string_view magic) {
    return bytes.size() >= magic.size() &&
           std::equal(magic.begin(), magic.end(), bytes.begin(),
                      [](char a, std::uint8_t b) { return static_cast<std::uint8_t>(a) == b; });
}

/// The next number of a PNM header, and the one byte behind it; comments run from # to the end of a line.
std::size_t header_number(const Bytes &bytes, std::size_t &at) {
    while (at < bytes.size() && (std::isspace(bytes[at]) || bytes[at] == '#')) {
        const bool comment = bytes[at++] == '#';
        while (comment && at < bytes.size() && bytes[at - 1] != '\n') ++at;
    }
    std::size_t value = 0;
    const std::size_t start = at;
    for (; at < bytes.size() && std::isdigit(bytes[at]) && value < kMostPixels; ++at)
        value = value * 10 + static_cast<std::size_t>(bytes[at] - '0');
    if (at == start || at == bytes.size() || !std::isspace(bytes[at++])) throw Error("its header is damaged");
    return value;
}

Image decode_pnm(const Bytes &bytes) {
    std::size_t at = 2;
    Image image;
    image.width = header_number(bytes, at);
    image.height = header_number(bytes, at);
    const std::size_t most = header_number(bytes, at);
    if (image.width == 0 || image.height == 0) throw Error("it has no pixels");
    if (image.width > kMostPixels / image.height) throw Error("too many pixels");
    if (most == 0 || most > 255) throw Error("its pixels have more than 8 bits, or none");
    const std::size_t channels = bytes[1] == '6' ? 3 : 1, count = image.width * image.height;
    if (bytes.size() - at < count * channels) throw Error("the file is cut off");
    image.pixels.resize(count);
    for (std::size_t i = 0; i < count; ++i)
        for (std::size_t c = 0; c < 3; ++c) {
            const double value =
                static_cast<double>(bytes[at + i * channels + c % channels]) / static_cast<double>(most);
            image.pixels[i][c] = static_cast<std::uint8_t>(std::nearbyint(std::min(value * 255, 255.0)));
        }
    return image;
}

Image decode(const Bytes &bytes) {
    if (starts_with(bytes, "P6") || starts_with(bytes, "P5")) return decode_pnm(bytes);
    if (starts_with(bytes, "\x89PNG\r\n\x1a\n")) {
#ifdef ONNXGBP_PNG
        return decode_png(bytes);
#else
        throw Error("this program was built without libpng: convert it to PPM");
#endif
    }
    throw Error("no PNG and no binary PPM or PGM; convert it to one of them");
}

std::string suffix_of(const std::string &path) {
    std::string suffix = path.size() < 4 ? path : path.substr(path.size() - 4);
    for (char &c : suffix) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return suffix;
}

Bytes encode_ppm(const Image &image) {
    const std::string header = "P6\n" + std::to_string(image.width) + " " + std::to_string(image.height) + "\n255\n";
    Bytes bytes(header.begin(), header.end());
    bytes.reserve(bytes.size() + 3 * image.pixels.size());
    for (const Colour &pixel : image.pixels) bytes.insert(bytes.end(), pixel.begin(), pixel.end());
    return bytes;
}

}  // namespace

Image read_image(const std::string &path) {
    const Bytes bytes = read_file(path, kLargestFile);
    try {
        return decode(bytes);
    } catch (const Error &error) {
        throw Error("cannot read " + path + ": " + error.what());
    }
}

void check_picture_name(const std::string &path) {
    const std::string suffix = suffix_of(path);
#ifndef ONNXGBP_PNG
    if (suffix == ".png")
        throw Error("cannot write " + path + ": this program was built without libpng; choose a name in .ppm");
#endif
    if (suffix != ".png" && suffix != ".ppm") throw Error("cannot write " + path + ": choose a name in .ppm or .png");
}

void write_image(const std::string &path, const Image &image) {
    check_picture_name(path);
#ifdef ONNXGBP_PNG
    if (suffix_of(path) == ".png") return write_file(path, encode_png(image));
#endif
    write_file(path, encode_ppm(image));
}

}  // namespace onnxgbp
