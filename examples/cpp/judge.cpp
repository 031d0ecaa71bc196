// Judges images with a bundle's OpenVINO model: judge MODEL.xml IMAGE.ppm...
//
// Prints one line per image: label, score, largest value of the map, share of masked pixels. Images are binary PPM
// (P6, 8 bits per channel), so that this program needs no image library: replace read_ppm by your camera's buffer.
#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

struct Image {
    std::size_t height = 0;
    std::size_t width = 0;
    std::vector<std::uint8_t> rgb;  // row by row, three values a pixel
};

// A number of a PPM header; comments begin with #.
static std::size_t read_number(std::istream& file) {
    int next = file.peek();
    while (std::isspace(next) != 0 || next == '#') {
        if (next == '#') {
            std::string comment;
            std::getline(file, comment);
        } else {
            file.get();
        }
        next = file.peek();
    }
    std::size_t number = 0;
    if (!(file >> number)) {
        throw std::runtime_error("the header of the image cannot be read");
    }
    return number;
}

static Image read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic(2, ' ');
    if (!file.read(&magic[0], 2) || magic != "P6") {
        throw std::runtime_error(path + " is not a binary PPM image");
    }
    Image image;
    image.width = read_number(file);
    image.height = read_number(file);
    if (read_number(file) != 255 || image.width == 0 || image.height == 0 || image.width > 65536 || image.height > 65536) {
        throw std::runtime_error(path + " is empty, or has not 8 bits per channel");
    }
    file.get();  // the single white space after the header
    image.rgb.resize(3 * image.width * image.height);
    if (!file.read(reinterpret_cast<char*>(image.rgb.data()), static_cast<std::streamsize>(image.rgb.size()))) {
        throw std::runtime_error(path + " is truncated");
    }
    return image;
}

// Planes of red, green and blue in [0, 1], as the bundle's model takes them; it resizes and normalizes them itself.
static ov::Tensor to_tensor(const Image& image) {
    ov::Tensor tensor(ov::element::f32, {1, 3, image.height, image.width});
    float* values = tensor.data<float>();
    const std::size_t plane = image.height * image.width;
    for (std::size_t pixel = 0; pixel < plane; ++pixel) {
        for (std::size_t channel = 0; channel < 3; ++channel) {
            values[channel * plane + pixel] = static_cast<float>(image.rgb[3 * pixel + channel]) / 255.0F;
        }
    }
    return tensor;
}

// Whether the model has an output of this name: detectors without maps, or without thresholds, lack some.
static bool has_output(const ov::CompiledModel& model, const std::string& name) {
    const auto outputs = model.outputs();
    return std::any_of(outputs.begin(), outputs.end(),
                       [&](const ov::Output<const ov::Node>& output) { return output.get_names().count(name) > 0; });
}

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: judge MODEL.xml IMAGE.ppm...\n");
        return 2;
    }
    try {
        ov::Core core;
        // f32 gives exactly the detector's own scores; without it, OpenVINO resizes in bfloat16 where the processor can
        auto model = core.compile_model(argv[1], "CPU", ov::hint::inference_precision(ov::element::f32),
                                        ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));
        auto request = model.create_infer_request();
        for (int index = 2; index < argc; ++index) {
            request.set_input_tensor(to_tensor(read_ppm(argv[index])));
            request.infer();
            const float score = request.get_tensor("pred_score").data<float>()[0];
            const char* label = "score";
            if (has_output(model, "pred_label")) {
                label = request.get_tensor("pred_label").data<bool>()[0] ? "reject" : "good";
            }
            float highest = 0.0F;
            if (has_output(model, "anomaly_map")) {
                const ov::Tensor map = request.get_tensor("anomaly_map");
                highest = *std::max_element(map.data<float>(), map.data<float>() + map.get_size());
            }
            double masked = 0.0;
            if (has_output(model, "pred_mask")) {
                const ov::Tensor mask = request.get_tensor("pred_mask");
                const bool* pixels = mask.data<bool>();
                masked = static_cast<double>(std::count(pixels, pixels + mask.get_size(), true)) /
                         static_cast<double>(mask.get_size());
            }
            std::printf("%s %.7f %.7f %.7f %s\n", label, score, highest, masked, argv[index]);
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
