// Pictures: PPM always, PNG where the build found libpng.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "files.hpp"

namespace onnxgbp {

using Colour = std::array<std::uint8_t, 3>;

/// RGB, row by row from the top left.
struct Image {
    std::size_t width = 0, height = 0;
    std::vector<Colour> pixels;

    const Colour &at(std::size_t x, std::size_t y) const { return pixels[y * width + x]; }
};

/// More pixels are refused before any memory is taken for them: Pillow's own limit.
constexpr std::size_t kMostPixels = 178'956'970;

/// A binary PPM or PGM of up to 8 bits, or a PNG: transparency laid on white, 16 bits made 8, turned upright as its
/// EXIF data says. Throws Error for what is not there, no such picture, cut off, empty or too large.
Image read_image(const std::string &path);

/// Throws Error where no picture can be written under this name: it ends in neither .ppm nor .png, or in .png without
/// libpng.
void check_picture_name(const std::string &path);

/// Writes a PPM or a PNG, as the name says.
void write_image(const std::string &path, const Image &image);

#ifdef ONNXGBP_PNG
/// As `read_image` and `write_image`, of a PNG's bytes. Throws Error without naming the file.
Image decode_png(const Bytes &bytes);
Bytes encode_png(const Image &image);
#endif

}  // namespace onnxgbp
