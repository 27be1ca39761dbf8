// A device's half of pkd in C++17: photograph → embedding → request. docs/device.md specifies every step.
//
// Run as: pkd_device BUNDLE DETECTOR.onnx PHOTO [GALLERY SUBJECT]          prints the body of POST /v1/verify
//         pkd_device BUNDLE --landmarks X,Y,… PHOTO [GALLERY SUBJECT]      the same with five given points
//         pkd_device BUNDLE DETECTOR.onnx --kit KIT REPORT.json            computes the conformance kit
//         pkd_device BUNDLE - --kit KIT REPORT.json                        without a detector
//
// BUNDLE is a bundle's folder, DETECTOR.onnx a YuNet of free size. CMakeLists.txt names the libraries.

#include <cstdio>
#include <iostream>
#include <optional>

#include <nlohmann/json.hpp>

#include "encodings.hpp"
#include "face.hpp"

using Json = nlohmann::ordered_json;

// Turn photographs into embeddings of one bundle's encoder. One thread at a time.
class Device {
public:
    explicit Device(const std::string& bundle)
        : manifest_(Json::parse(read_file(bundle + "/manifest.json"))), student_(read_file(bundle + "/encoder.onnx")) {
        encoder = manifest_.at("encoder").at("id");
        size = manifest_.at("encoder").at("preprocess").at("size");
        self_test(read_file(bundle + "/golden.npz"));
    }

    // Step 5: run the student on one crop → a unit vector.
    std::vector<float> embed(const Picture& crop) {
        std::vector<uint8_t> pixels = crop.rgb;
        return student_.run("crops", pixels, {1, size, size, 3}, {"embedding"}).at(0);
    }

    // Step 7: the body of POST /v1/verify.
    Json request(const std::vector<float>& vector, const std::string& gallery, const std::string& subject) const {
        return {{"a", {{"embedding", encodings(vector).at("b64_f16")}, {"encoding", "b64_f16"}, {"encoder", encoder}}},
                {"b", {{"gallery", gallery}, {"subject", subject}}}};
    }

    std::string encoder;
    int size = 0;

private:
    // Stop unless the bundle's golden crops give its golden embeddings here.
    void self_test(const std::string& golden) {
        const std::string crops = npz_values(golden, "crops"), rows = npz_values(golden, "embeddings");
        const size_t one = size_t(size) * size * 3, dim = manifest_.at("encoder").at("space").at("dim");
        const size_t count = crops.size() / one;
        if (!count || crops.size() != count * one || rows.size() != count * dim * 4)
            throw std::runtime_error("golden.npz does not fit the manifest. Copy the bundle again.");
        const double allowed = manifest_.at("golden_tolerance");
        for (size_t i = 0; i < count; i++) {
            Picture crop(size, size);
            memcpy(crop.rgb.data(), crops.data() + i * one, one);
            const std::vector<float> made = embed(crop);
            double square = 0;
            for (size_t k = 0; k < dim; k++) {
                float expected;
                memcpy(&expected, rows.data() + (i * dim + k) * 4, 4);
                square += std::pow(double(expected) - made.at(k), 2);
            }
            // ½·|a − b|² is 1 − cosine of vectors of length 1; it sees another length, too, and NaN is not below.
            if (!(square / 2 <= allowed))
                throw std::runtime_error("the student computes something else here: " + std::to_string(square / 2) +
                                         " from its golden embeddings.");
        }
    }

    Json manifest_;
    Network student_;
};

Json pairs(const Points& points) {
    Json made = Json::array();
    for (const Point& one : points) made.push_back({one.x, one.y});
    return made;
}

// Compute every case of a conformance kit, each step from the kit's own output of the step before.
Json report(Device& device, Detector* detector, const std::string& kit) {
    const Json stated = Json::parse(read_file(kit + "/kit.json"));
    Json cases = Json::object();
    for (const Json& one : stated.at("cases")) {
        auto file = [&](const char* field) { return read_file(kit + "/" + one.at(field).get<std::string>()); };
        const Picture decoded = decode(file("photograph"));
        Picture given(one.at("width"), one.at("height")), cut(device.size, device.size);
        const std::string packed = file("rgb"), rgb = inflated(packed.data(), packed.size(), 31), pixels = file("crop");
        if (rgb.size() != given.rgb.size() || pixels.size() != cut.rgb.size())
            throw std::runtime_error(kit + ": the files do not have the sizes that kit.json states. Write it anew.");
        memcpy(given.rgb.data(), rgb.data(), rgb.size());
        memcpy(cut.rgb.data(), pixels.data(), pixels.size());
        Points landmarks;
        Matrix matrix;
        for (int i = 0; i < 5; i++) landmarks[i] = {one.at("landmarks")[i][0], one.at("landmarks")[i][1]};
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 3; k++) matrix[i][k] = one.at("matrix")[i][k];
        const std::string raw = file("embedding");
        std::vector<float> vector(raw.size() / 4);
        memcpy(vector.data(), raw.data(), vector.size() * 4);

        Json made;
        made["rgb_base64"] = base64(decoded.rgb.data(), decoded.rgb.size());
        made["matrix"] = similarity(landmarks, device.size);
        const Picture own = crop(given, matrix, device.size);
        made["crop_base64"] = base64(own.rgb.data(), own.rgb.size());
        made["embedding"] = device.embed(cut);
        made["encodings"] = encodings(vector);
        made["request"] = device.request(vector, "GALLERY", "SUBJECT");
        if (const auto found = detector ? detector->detect(decoded) : std::nullopt) {
            made["landmarks"] = pairs(*found);
            made["whole"] = device.embed(crop(decoded, similarity(*found, device.size), device.size));
        }
        cases[one.at("name").get<std::string>()] = made;
    }
    return {{"device", "examples/cpp"}, {"encoder", device.encoder}, {"cases", cases}};
}

Points parse_points(const std::string& text) {
    std::istringstream numbers(text);
    Points points;
    char comma = ',';
    for (Point& one : points)
        if (!(numbers >> one.x >> comma >> one.y) || (&one != &points.back() && !(numbers >> comma)))
            throw std::runtime_error("--landmarks " + text + ": give ten numbers, x,y of each of the five points.");
    return points;
}

int run(const std::vector<std::string>& given) {
    const bool kit = given.size() == 5 && given[2] == "--kit", points = given.size() > 2 && given[1] == "--landmarks";
    const size_t photo = points ? 3 : 2;
    if (!kit && given.size() != photo + 1 && given.size() != photo + 3) {
        std::cerr << "usage: pkd_device BUNDLE (DETECTOR.onnx | --landmarks X,Y,…) PHOTO [GALLERY SUBJECT]\n"
                     "       pkd_device BUNDLE (DETECTOR.onnx | -) --kit KIT REPORT.json\n";
        return 2;
    }
    Device device(given[0]);
    if (kit) {
        std::optional<Detector> detector;
        if (given[1] != "-") detector.emplace(read_file(given[1]));
        std::ofstream file(given[4]);
        if (!(file << report(device, detector ? &*detector : nullptr, given[3]).dump() << '\n'))
            throw std::runtime_error(given[4] + ": cannot be written.");
        return 0;
    }
    std::optional<Points> landmarks;
    if (points) landmarks = parse_points(given[2]);
    const Picture photograph = decode(read_file(given[photo]));
    if (!points) landmarks = Detector(read_file(given[1])).detect(photograph);
    if (!landmarks) throw std::runtime_error("no face was found in the photograph.");
    const std::vector<float> vector = device.embed(crop(photograph, similarity(*landmarks, device.size), device.size));
    const bool named = given.size() == photo + 3;
    std::cout << device.request(vector, named ? given[photo + 1] : "staff", named ? given[photo + 2] : "ann").dump() << '\n';
    return 0;
}

int main(int count, char** given) {
    try {
        return run({given + 1, given + count});
    } catch (const std::exception& error) {
        std::cerr << "pkd_device: " << error.what() << '\n';
        return 1;
    }
}
