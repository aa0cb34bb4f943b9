// libpng leaves through longjmp: between setjmp and it, no function here owns anything that has to be destroyed. What
// is allocated belongs to the caller, in a Picture or in a vector.
#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <string>

#include "error.hpp"
#include "image.hpp"

namespace onnxgbp {
namespace {

struct Picture {
    const Bytes *file = nullptr;
    std::size_t at = 0;
    std::string fault;
    png_uint_32 width = 0, height = 0;
    std::vector<std::uint8_t> rgba;
    std::vector<png_bytep> rows;
    int orientation = 1;
};

struct Reader {  // libpng's two structures, freed however the reading ends
    png_structp png;
    png_infop info = nullptr;

    ~Reader() { png_destroy_read_struct(&png, &info, nullptr); }
};

[[noreturn]] void on_error(png_structp png, png_const_charp message) {
    static_cast<Picture *>(png_get_error_ptr(png))->fault = message;
    png_longjmp(png, 1);
}

void on_warning(png_structp, png_const_charp) {}

void on_read(png_structp png, png_bytep to, std::size_t count) {
    auto &picture = *static_cast<Picture *>(png_get_io_ptr(png));
    if (picture.file->size() - picture.at < count) png_error(png, "the file is cut off");
    std::memcpy(to, picture.file->data() + picture.at, count);
    picture.at += count;
}

/// How an EXIF block (TIFF, of either byte order) says that the picture lies: 1 upright, 2 to 8 turned or mirrored.
int orientation_of(const png_byte *exif, std::size_t size) {
    constexpr unsigned kOrientation = 0x0112, kShort = 3;
    const bool little = size >= 2 && exif[0] == 'I';
    const auto number = [&](std::size_t at, int count) {
        unsigned value = 0;
        for (int i = 0; i < count; ++i)
            value = value << 8 | exif[at + static_cast<std::size_t>(little ? count - 1 - i : i)];
        return value;
    };
    if (size < 8) return 1;
    const std::size_t directory = number(4, 4);
    if (directory > size - 2) return 1;
    const std::size_t entries = std::min<std::size_t>(number(directory, 2), (size - directory - 2) / 12);
    for (std::size_t i = 0; i < entries; ++i) {
        const std::size_t entry = directory + 2 + 12 * i;
        if (number(entry, 2) != kOrientation || number(entry + 2, 2) != kShort) continue;
        const unsigned value = number(entry + 8, 2);
        return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
    }
    return 1;
}

/// Fills the picture. False: libpng failed, and `fault` says why.
bool read_png(png_structp png, png_infop info, Picture &picture) {
    if (setjmp(png_jmpbuf(png))) return false;
    png_set_read_fn(png, &picture, on_read);
    png_set_user_limits(png, 0x7FFFFFFF, 0x7FFFFFFF);  // what counts is their product, below
    png_read_info(png, info);
    picture.width = png_get_image_width(png, info);
    picture.height = png_get_image_height(png, info);
    if (picture.width > kMostPixels / picture.height) png_error(png, "too many pixels");
    png_set_expand(png);  // palettes to colours, 1 to 4 bits to 8, a transparent colour to an alpha channel
    png_set_strip_16(png);
    png_set_gray_to_rgb(png);
    png_set_add_alpha(png, 255, PNG_FILLER_AFTER);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    const std::size_t row = 4 * std::size_t{picture.width};
    if (png_get_rowbytes(png, info) != row) png_error(png, "an unknown pixel format");
    picture.rgba.resize(row * picture.height);
    picture.rows.resize(picture.height);
    for (std::size_t y = 0; y < picture.height; ++y) picture.rows[y] = picture.rgba.data() + y * row;
    png_read_image(png, picture.rows.data());
    png_read_end(png, info);
#ifdef PNG_eXIf_SUPPORTED
    png_uint_32 size = 0;
    png_bytep exif = nullptr;
    if (png_get_eXIf_1(png, info, &size, &exif) && exif) picture.orientation = orientation_of(exif, size);
#endif
    return true;
}

/// Laid on white and turned upright.
Image upright(const Picture &picture) {
    const bool sideways = picture.orientation >= 5;
    const std::size_t width = picture.width, height = picture.height;
    Image image{sideways ? height : width, sideways ? width : height, std::vector<Colour>(width * height)};
    for (std::size_t y = 0; y < image.height; ++y)
        for (std::size_t x = 0; x < image.width; ++x) {
            std::size_t from_x = sideways ? y : x, from_y = sideways ? x : y;
            const int turn = picture.orientation;
            if (turn == 2 || turn == 3 || turn == 7 || turn == 8) from_x = width - 1 - from_x;
            if (turn == 3 || turn == 4 || turn == 6 || turn == 7) from_y = height - 1 - from_y;
            const std::uint8_t *pixel = picture.rgba.data() + 4 * (from_y * width + from_x);
            const unsigned alpha = pixel[3];
            for (std::size_t c = 0; c < 3; ++c)
                image.pixels[y * image.width + x][c] =
                    static_cast<std::uint8_t>((pixel[c] * alpha + 255 * (255 - alpha) + 127) / 255);
        }
    return image;
}

}  // namespace

Image decode_png(const Bytes &bytes) {
    Picture picture;
    picture.file = &bytes;
    Reader reader{png_create_read_struct(PNG_LIBPNG_VER_STRING, &picture, on_error, on_warning)};
    if (reader.png) reader.info = png_create_info_struct(reader.png);
    if (!reader.info) throw Error("libpng could not start");
    if (!read_png(reader.png, reader.info, picture)) throw Error(picture.fault);
    return upright(picture);
}

Bytes encode_png(const Image &image) {
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    png.width = static_cast<png_uint_32>(image.width);
    png.height = static_cast<png_uint_32>(image.height);
    png.format = PNG_FORMAT_RGB;
    Bytes bytes(PNG_IMAGE_PNG_SIZE_MAX(png));
    png_alloc_size_t size = bytes.size();
    if (!png_image_write_to_memory(&png, bytes.data(), &size, 0, image.pixels.data(), 0, nullptr))
        throw Error(std::string("cannot write a PNG: ") + png.message);
    bytes.resize(size);
    return bytes;
}

}  // namespace onnxgbp
