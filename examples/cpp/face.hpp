// Steps 2 to 4 of docs/device.md: find the face by YuNet, fit the similarity, cut the crop.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "onnx_runtime.hpp"
#include "pictures.hpp"

struct Point {
    double x = 0, y = 0;
};
using Points = std::array<Point, 5>;
using Matrix = std::array<std::array<double, 3>, 2>;  // takes (x, y, 1) of the photograph to x and y of the crop

constexpr Points TEMPLATE = {
    {{38.2946, 51.6963}, {73.5318, 51.5014}, {56.0252, 71.7366}, {41.5493, 92.3655}, {70.7299, 92.2041}}};

// Where the five points lie in a crop of this side.
inline Points wanted_points(int size) {
    Points points = TEMPLATE;
    for (Point& one : points) one.x *= size / 112.0, one.y *= size / 112.0;
    return points;
}

// Step 3: fit the similarity that takes the landmarks to the template.
inline Matrix similarity(const Points& landmarks, int size) {
    const Points wanted = wanted_points(size);
    Point p, q;
    for (int i = 0; i < 5; i++) p.x += landmarks[i].x / 5, p.y += landmarks[i].y / 5, q.x += wanted[i].x / 5, q.y += wanted[i].y / 5;
    double cos = 0, sin = 0, spread = 0;
    for (int i = 0; i < 5; i++) {
        const double px = landmarks[i].x - p.x, py = landmarks[i].y - p.y, qx = wanted[i].x - q.x, qy = wanted[i].y - q.y;
        cos += px * qx + py * qy;
        sin += px * qy - py * qx;
        spread += px * px + py * py;
    }
    const double a = cos / spread, b = sin / spread;
    return {{{a, -b, q.x - a * p.x + b * p.y}, {b, a, q.y - b * p.x - a * p.y}}};
}

// Average a picture down: each new pixel is the mean of the area that it covers.
inline Picture average(const Picture& picture, int width, int height) {
    struct Share {
        int from;
        double weight;
    };
    auto shares = [](int before, int after) {
        std::vector<std::vector<Share>> found(after);
        const double step = double(before) / after;
        for (int i = 0; i < after; i++) {
            const double low = i * step, high = std::min<double>((i + 1) * step, before);
            for (int k = int(low); k < before && k < high; k++) {
                const double part = std::min<double>(k + 1, high) - std::max<double>(k, low);
                if (part > 1e-9) found[i].push_back({k, part / (high - low)});
            }
        }
        return found;
    };
    const auto columns = shares(picture.width, width), rows = shares(picture.height, height);
    Picture made(width, height);
    std::vector<double> line(size_t(width) * 3);
    for (int y = 0; y < height; y++) {
        std::fill(line.begin(), line.end(), 0);
        for (const Share& row : rows[y])
            for (int x = 0; x < width; x++)
                for (const Share& column : columns[x])
                    for (int c = 0; c < 3; c++)
                        line[size_t(x) * 3 + c] += row.weight * column.weight * picture.at(column.from, row.from)[c];
        for (size_t i = 0; i < line.size(); i++) made.at(0, y)[i] = uint8_t(std::nearbyint(line[i]));
    }
    return made;
}

// Interpolate linearly between the four pixels around each pixel's place; black beyond the border.
inline Picture sample(const Picture& picture, const Matrix& m, int side) {
    Picture made(side, side);
    const double square = m[0][0] * m[0][0] + m[1][0] * m[1][0];
    for (int v = 0; v < side; v++)
        for (int u = 0; u < side; u++) {
            const double du = u - m[0][2], dv = v - m[1][2];
            const double x = (m[0][0] * du + m[1][0] * dv) / square, y = (m[0][1] * du + m[1][1] * dv) / square;
            if (!(x > -1 && y > -1 && x < picture.width && y < picture.height)) continue;  // all four lie outside
            const int left = int(std::floor(x)), top = int(std::floor(y));
            for (int c = 0; c < 3; c++) {
                double value = 0;
                for (int j = 0; j < 2; j++)
                    for (int i = 0; i < 2; i++) {
                        const int column = left + i, row = top + j;
                        if (column < 0 || row < 0 || column >= picture.width || row >= picture.height) continue;
                        value += picture.at(column, row)[c] * (i ? x - left : left + 1 - x) * (j ? y - top : top + 1 - y);
                    }
                made.at(u, v)[c] = uint8_t(std::nearbyint(value));
            }
        }
    return made;
}

// Step 4: cut the aligned face out, side × side pixels; faces of over twice its size are averaged first.
inline Picture crop(const Picture& photograph, const Matrix& m, int side) {
    const double scale = std::hypot(m[0][0], m[1][0]);
    if (scale >= 0.5) return sample(photograph, m, side);
    const int width = std::max(1, int(std::nearbyint(photograph.width * 2 * scale)));
    const int height = std::max(1, int(std::nearbyint(photograph.height * 2 * scale)));
    Points points = wanted_points(side);
    for (Point& one : points) {  // back to the photograph, then to the smaller picture
        const double u = one.x - m[0][2], v = one.y - m[1][2], square = scale * scale;
        const double x = (m[0][0] * u + m[1][0] * v) / square, y = (m[0][1] * u + m[1][1] * v) / square;
        one = {(x + 0.5) * width / photograph.width - 0.5, (y + 0.5) * height / photograph.height - 0.5};
    }
    return sample(average(photograph, width, height), similarity(points, side), side);
}

struct Face {
    double x, y, width, height, score;  // the box, in pixels
    Points points;
};

// Step 2: YuNet, as its ONNX file gives its raw outputs.
class Detector {
public:
    explicit Detector(const std::string& model) : network_(model) {}

    // Find the face that a photograph is of.
    std::optional<Points> detect(const Picture& photograph) {
        const double longest = std::max(photograph.width, photograph.height);
        if (std::min(photograph.width, photograph.height) < 16) return std::nullopt;
        for (const double side : {640.0, 1920.0}) {
            const double scale = std::min(1.0, side / longest);
            std::vector<Face> faces = search(photograph, scale);
            if (!faces.empty()) {
                for (Face& one : faces)
                    if (scale < 1 && std::max(one.width, one.height) * scale < 100) one = refined(photograph, one);
                return std::max_element(faces.begin(), faces.end(), [&](const Face& one, const Face& other) {
                           return weight(one, photograph) < weight(other, photograph);
                       })->points;
            }
            if (scale == 1) break;
        }
        return std::nullopt;
    }

private:
    static double weight(const Face& face, const Picture& picture) {
        const double across = (face.x + face.width / 2) / (picture.width / 2.0) - 1;
        const double down = (face.y + face.height / 2) / (picture.height / 2.0) - 1;
        return face.width * face.height / (1 + 4 * (across * across + down * down));
    }

    // Search the surroundings of a small face in a finer copy.
    Face refined(const Picture& photograph, const Face& face) {
        const double side = std::max(face.width, face.height), x = face.x + face.width / 2, y = face.y + face.height / 2;
        const int left = std::max(0, int(std::floor(x - 1.5 * side))), top = std::max(0, int(std::floor(y - 1.5 * side)));
        const int right = std::min(photograph.width, int(std::ceil(x + 1.5 * side)));
        const int bottom = std::min(photograph.height, int(std::ceil(y + 1.5 * side)));
        if (std::min(right - left, bottom - top) < 16) return face;
        Picture around(right - left, bottom - top);
        for (int row = 0; row < around.height; row++)
            memcpy(around.at(0, row), photograph.at(left, top + row), size_t(around.width) * 3);
        Face best = face;
        best.score = -1;
        for (Face one : search(around, std::min(1.0, 300.0 / std::max(around.width, around.height)))) {
            one.x += left, one.y += top;
            for (Point& point : one.points) point.x += left, point.y += top;
            const double away = std::hypot(one.x + one.width / 2 - x, one.y + one.height / 2 - y);
            if (away < side / 2 && one.score > best.score) best = one;
        }
        return best;
    }

    // Search a copy of the picture, smaller by scale → faces in pixels of the picture.
    std::vector<Face> search(const Picture& picture, double scale) {
        const int width = std::max(16, int(std::nearbyint(picture.width * scale)));
        const int height = std::max(16, int(std::nearbyint(picture.height * scale)));
        const Picture small = scale == 1 ? picture : average(picture, width, height);
        const int columns = (width + 31) / 32 * 32, rows = (height + 31) / 32 * 32;
        std::vector<float> pixels(size_t(3) * columns * rows, 0.0f);  // B, G, R planes, black at the right and below
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++)
                for (int c = 0; c < 3; c++) pixels[(size_t(c) * rows + y) * columns + x] = small.at(x, y)[2 - c];
        const auto given = network_.run("input", pixels, {1, 3, rows, columns},
                                        {"cls_8", "cls_16", "cls_32", "obj_8", "obj_16", "obj_32", "bbox_8", "bbox_16",
                                         "bbox_32", "kps_8", "kps_16", "kps_32"});
        std::vector<Face> found;
        for (int level = 0; level < 3; level++) {
            const int stride = 8 << level, across = columns / stride;
            const auto &cls = given[level], &obj = given[3 + level], &box = given[6 + level], &kps = given[9 + level];
            for (size_t cell = 0; cell < cls.size(); cell++) {
                const double score = std::sqrt(std::clamp(cls[cell], 0.0f, 1.0f) * std::clamp(obj[cell], 0.0f, 1.0f));
                if (score < 0.5) continue;
                const double c = double(cell % across), r = double(cell / across);
                const double w = std::exp(box[4 * cell + 2]) * stride, h = std::exp(box[4 * cell + 3]) * stride;
                Face face{(box[4 * cell] + c) * stride - w / 2, (box[4 * cell + 1] + r) * stride - h / 2, w, h, score, {}};
                for (int n = 0; n < 5; n++)
                    face.points[n] = {(kps[10 * cell + 2 * n] + c) * stride, (kps[10 * cell + 2 * n + 1] + r) * stride};
                found.push_back(face);
            }
        }
        std::stable_sort(found.begin(), found.end(), [](const Face& one, const Face& other) { return one.score > other.score; });
        std::vector<Face> kept;
        for (const Face& face : found)
            if (std::none_of(kept.begin(), kept.end(), [&](const Face& better) { return overlap(face, better) > 0.3; }))
                kept.push_back(face);
        const double wide = double(picture.width) / width, high = double(picture.height) / height;
        for (Face& face : kept) {
            face.x *= wide, face.width *= wide, face.y *= high, face.height *= high;
            for (Point& point : face.points) point = {(point.x + 0.5) * wide - 0.5, (point.y + 0.5) * high - 0.5};
        }
        return kept;
    }

    // Divide what two boxes share by what they cover, both cut to whole pixels as OpenCV does.
    static double overlap(Face a, Face b) {
        for (Face* one : {&a, &b})
            for (double* number : {&one->x, &one->y, &one->width, &one->height}) *number = std::trunc(*number);
        const double width = std::max(0.0, std::min(a.x + a.width, b.x + b.width) - std::max(a.x, b.x));
        const double height = std::max(0.0, std::min(a.y + a.height, b.y + b.height) - std::max(a.y, b.y));
        const double covered = a.width * a.height + b.width * b.height - width * height;
        return covered > 0 ? width * height / covered : 1;
    }

    Network network_;
};
