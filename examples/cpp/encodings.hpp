// Files, base64, float16 and the arrays of golden.npz.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <zlib.h>

inline std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": cannot be read.");
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

inline std::string base64(const void* data, size_t size) {
    static const char* letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const auto* bytes = static_cast<const uint8_t*>(data);
    std::string text;
    for (size_t i = 0; i < size; i += 3) {
        const uint32_t group = bytes[i] << 16 | (i + 1 < size ? bytes[i + 1] : 0) << 8 | (i + 2 < size ? bytes[i + 2] : 0);
        for (int k = 0; k < 4; k++) text += i + k <= size ? letters[group >> (18 - 6 * k) & 63] : '=';
    }
    return text;
}

// Round a float of magnitude up to 1 to float16, halves to even.
inline uint16_t half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (size < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(size * 16777216.0f));  // below 2^-14: steps of 2^-24
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return sign | uint16_t((rounded >> 13) - (112 << 10));
}

// Step 6: the three base64 texts of a unit vector. Bytes are little-endian, as on every device of today.
inline std::map<std::string, std::string> encodings(const std::vector<float>& vector) {
    float most = 0;
    for (float one : vector) most = std::max(most, std::fabs(one));
    std::vector<uint16_t> halves;
    std::vector<int8_t> steps;
    for (float one : vector) {
        halves.push_back(half(one));
        steps.push_back(int8_t(std::nearbyint(one * (127.0f / most))));
    }
    return {{"b64_f32", base64(vector.data(), vector.size() * 4)},
            {"b64_f16", base64(halves.data(), halves.size() * 2)},
            {"b64_i8", base64(steps.data(), steps.size())}};
}

// Inflate raw deflate, zlib or gzip data, by zlib's number of window bits.
inline std::string inflated(const char* data, size_t size, int window_bits) {
    z_stream stream{};
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data));
    stream.avail_in = uInt(size);
    if (inflateInit2(&stream, window_bits) != Z_OK) throw std::runtime_error("zlib does not start.");
    std::string made;
    std::vector<char> part(1 << 16);
    int state = Z_OK;
    while (state == Z_OK) {
        stream.next_out = reinterpret_cast<Bytef*>(part.data());
        stream.avail_out = uInt(part.size());
        state = inflate(&stream, Z_NO_FLUSH);
        made.append(part.data(), part.size() - stream.avail_out);
    }
    inflateEnd(&stream);
    if (state != Z_STREAM_END) throw std::runtime_error("compressed data are damaged. Copy the file again.");
    return made;
}

// Read the raw values of one array of an .npz file, which is a zip of .npy files.
inline std::string npz_values(const std::string& zip, const std::string& array) {
    auto number = [&](size_t at, int bytes) -> uint64_t {
        if (at + bytes > zip.size()) throw std::runtime_error("golden.npz is cut off. Copy the bundle again.");
        uint64_t value = 0;
        for (int i = bytes; i--;) value = value << 8 | uint8_t(zip[at + i]);
        return value;
    };
    const size_t end = zip.rfind("PK\5\6");
    if (end == std::string::npos) throw std::runtime_error("golden.npz is no zip file. Copy the bundle again.");
    size_t at = number(end + 16, 4);
    for (uint64_t left = number(end + 10, 2); left--;) {
        const size_t size = number(at + 20, 4), name = number(at + 28, 2), local = number(at + 42, 4);
        if (zip.compare(at + 46, name, array + ".npy") == 0) {
            const size_t start = local + 30 + number(local + 26, 2) + number(local + 28, 2);
            if (start + size > zip.size()) throw std::runtime_error("golden.npz is cut off. Copy the bundle again.");
            std::string npy = number(at + 10, 2) ? inflated(zip.data() + start, size, -15) : zip.substr(start, size);
            return npy.substr(10 + (uint8_t(npy.at(8)) | uint8_t(npy.at(9)) << 8));  // after magic, version and header
        }
        at += 46 + name + number(at + 30, 2) + number(at + 32, 2);
    }
    throw std::runtime_error("golden.npz has no " + array + ". Export the bundle again.");
}
