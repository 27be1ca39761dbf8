// Step 1 of docs/device.md: JPEG, PNG and WebP files → upright RGB bytes, with libjpeg, libpng and libwebp.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <jpeglib.h>
#include <png.h>
#include <webp/decode.h>

struct Picture {
    int width = 0, height = 0;
    std::vector<uint8_t> rgb;  // height × width × 3

    Picture() = default;
    Picture(int w, int h) : width(w), height(h), rgb(size_t(w) * h * 3) {}
    const uint8_t* at(int x, int y) const { return &rgb[(size_t(y) * width + x) * 3]; }
    uint8_t* at(int x, int y) { return &rgb[(size_t(y) * width + x) * 3]; }
};

constexpr int64_t MAX_PIXELS = 40'000'000;

inline void require_size(int64_t width, int64_t height) {
    if (width < 1 || height < 1 || width * height > MAX_PIXELS)
        throw std::runtime_error("the picture has " + std::to_string(width) + "×" + std::to_string(height) +
                                 " pixels; 1 to 40,000,000 are read. Downscale it first.");
}

// Find the orientation, 1 to 8, in EXIF data that begins with its TIFF header; 1 where there is none.
inline int orientation_of(const uint8_t* data, size_t size) {
    if (size >= 6 && !memcmp(data, "Exif\0\0", 6)) data += 6, size -= 6;
    if (size < 8) return 1;
    const bool little = data[0] == 'I';
    auto number = [&](size_t at, int bytes) -> uint32_t {
        uint32_t value = 0;
        for (int i = 0; i < bytes; i++) value |= uint32_t(data[at + i]) << 8 * (little ? i : bytes - 1 - i);
        return value;
    };
    const size_t first = number(4, 4);
    if (first + 2 > size) return 1;
    const uint32_t entries = number(first, 2);
    for (uint32_t i = 0; i < entries; i++) {
        const size_t entry = first + 2 + size_t(12) * i;
        if (entry + 12 > size) return 1;
        if (number(entry, 2) == 0x0112) {
            const uint32_t value = number(entry + 8, 2);
            return value >= 1 && value <= 8 ? int(value) : 1;
        }
    }
    return 1;
}

// Turn a picture upright: orientations 2, 4, 5 and 7 mirror; 5 to 8 exchange rows and columns.
inline Picture upright(const Picture& picture, int orientation) {
    if (orientation == 1) return picture;
    const bool turned = orientation >= 5;
    Picture made(turned ? picture.height : picture.width, turned ? picture.width : picture.height);
    const int right = picture.width - 1, bottom = picture.height - 1;
    for (int y = 0; y < made.height; y++)
        for (int x = 0; x < made.width; x++) {
            int from_x = turned ? y : x, from_y = turned ? x : y;
            if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) from_x = right - from_x;
            if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) from_y = bottom - from_y;
            memcpy(made.at(x, y), picture.at(from_x, from_y), 3);
        }
    return made;
}

// What a decoder fills; libjpeg and libpng report errors by longjmp, so nothing that owns memory may live in between.
struct Decoded {
    Picture picture;
    int orientation = 1;
    std::vector<uint8_t> row;
    std::vector<png_bytep> rows;
};

struct JpegFault : jpeg_error_mgr {
    jmp_buf back;
};

inline bool read_jpeg(const std::string& file, Decoded& made) {
    Picture& picture = made.picture;
    jpeg_decompress_struct jpeg;
    JpegFault fault;
    jpeg.err = jpeg_std_error(&fault);
    fault.error_exit = [](j_common_ptr one) { longjmp(static_cast<JpegFault*>(one->err)->back, 1); };
    fault.emit_message = [](j_common_ptr, int) {};
    if (setjmp(fault.back)) {
        jpeg_destroy_decompress(&jpeg);
        return false;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, reinterpret_cast<const unsigned char*>(file.data()), file.size());
    jpeg_save_markers(&jpeg, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(&jpeg, TRUE);
    if (int64_t(jpeg.image_width) * jpeg.image_height > MAX_PIXELS) longjmp(fault.back, 1);
    for (jpeg_saved_marker_ptr marker = jpeg.marker_list; marker; marker = marker->next)
        if (marker->data_length > 6 && !memcmp(marker->data, "Exif\0\0", 6))
            made.orientation = orientation_of(marker->data, marker->data_length);
    const bool cmyk = jpeg.num_components == 4;
    jpeg.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&jpeg);
    picture = Picture(int(jpeg.output_width), int(jpeg.output_height));
    made.row.resize(size_t(picture.width) * 4);
    while (jpeg.output_scanline < jpeg.output_height) {
        const int y = int(jpeg.output_scanline);
        JSAMPROW into = cmyk ? made.row.data() : picture.at(0, y);
        jpeg_read_scanlines(&jpeg, &into, 1);
        if (cmyk)
            for (int x = 0; x < picture.width; x++)
                for (int c = 0; c < 3; c++) {
                    const int ink = made.row[4 * x + c], black = made.row[4 * x + 3];
                    picture.at(x, y)[c] = uint8_t(black - ((255 - ink) * black >> 8));
                }
    }
    jpeg_finish_decompress(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return true;
}

inline bool read_png(const std::string& file, Decoded& made) {
    Picture& picture = made.picture;
    struct Source {
        const std::string& data;
        size_t at;
    } source{file, 0};
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, [](png_structp, png_const_charp) {});
    png_infop info = png_create_info_struct(png);
    if (setjmp(png_jmpbuf(png))) {
        png_destroy_read_struct(&png, &info, nullptr);
        return false;
    }
    png_set_read_fn(png, &source, [](png_structp one, png_bytep into, size_t count) {
        auto* from = static_cast<Source*>(png_get_io_ptr(one));
        if (count > from->data.size() - from->at) png_error(one, "truncated");
        memcpy(into, from->data.data() + from->at, count);
        from->at += count;
    });
    png_read_info(png, info);
    const int64_t width = png_get_image_width(png, info), height = png_get_image_height(png, info);
    if (width * height > MAX_PIXELS) png_error(png, "too large");
    png_set_expand(png);      // palettes and few bits to bytes
    png_set_strip_16(png);    // the high byte counts
    png_set_strip_alpha(png);  // dropped, not blended
    png_set_gray_to_rgb(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    picture = Picture(int(width), int(height));
    for (int y = 0; y < picture.height; y++) made.rows.push_back(picture.at(0, y));
    png_read_image(png, made.rows.data());
    png_read_end(png, info);
    png_uint_32 size = 0;
    png_bytep exif = nullptr;
    if (png_get_eXIf_1(png, info, &size, &exif)) made.orientation = orientation_of(exif, size);
    png_destroy_read_struct(&png, &info, nullptr);
    return true;
}

inline bool read_webp(const std::string& file, Decoded& made) {
    Picture& picture = made.picture;
    const auto* data = reinterpret_cast<const uint8_t*>(file.data());
    int width = 0, height = 0;
    if (!WebPGetInfo(data, file.size(), &width, &height)) return false;
    require_size(width, height);
    picture = Picture(width, height);
    if (!WebPDecodeRGBInto(data, file.size(), picture.rgb.data(), picture.rgb.size(), width * 3)) return false;
    for (size_t at = 12; at + 8 <= file.size();) {  // chunks of RIFF, each padded to an even length
        const size_t size = data[at + 4] | data[at + 5] << 8 | data[at + 6] << 16 | size_t(data[at + 7]) << 24;
        if (at + 8 + size > file.size()) break;
        if (!memcmp(data + at, "EXIF", 4)) made.orientation = orientation_of(data + at + 8, size);
        at += 8 + size + (size & 1);
    }
    return true;
}

// Decode a picture file, turned upright by its EXIF.
inline Picture decode(const std::string& file) {
    Decoded made;
    const bool read = file.compare(0, 3, "\xff\xd8\xff") == 0          ? read_jpeg(file, made)
                      : file.compare(0, 4, "\x89PNG") == 0             ? read_png(file, made)
                      : file.size() > 12 && !file.compare(8, 4, "WEBP") ? read_webp(file, made)
                                                                        : false;
    if (!read) throw std::runtime_error("the picture cannot be decoded: give a whole JPEG, PNG or WebP file.");
    require_size(made.picture.width, made.picture.height);
    return upright(made.picture, made.orientation);
}
