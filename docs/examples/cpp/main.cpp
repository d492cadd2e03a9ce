// One step of a forecast in C++: the model that `trainer export --aoti` compiled, and raw float32 files.
//
//   step model.aoti.pt2 fields.f32 forecast.f32 [expected.f32]
//
// fields.f32    [input time, ensemble, cells, inputs]   units of the dataset, NaN where a field has no value
// forecast.f32  [ensemble, cells, outputs]              units of the dataset, NaN where the last input time has none
//
// How many members there are follows from the size of the file; all else is in the model's metadata. With
// expected.f32, a forecast made in Python, it ends with 1 unless no variable differs by more than 1e-6 of its largest
// value.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr double kTolerance = 1e-6;

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');) words.push_back(word);
  return words;
}

std::vector<float> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + " cannot be read. Give a file of raw float32 numbers.");
  std::vector<float> values(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0).read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
  return values;
}

void write(const std::string& path, const at::Tensor& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(values.data_ptr()), static_cast<std::streamsize>(values.nbytes()));
  if (!file.flush()) throw std::runtime_error(path + " cannot be written. Give a folder with room.");
}

// Largest difference of a variable, in units of its largest value.
double difference(const at::Tensor& forecast, const std::vector<float>& expected) {
  if (static_cast<int64_t>(expected.size()) != forecast.numel()) {
    throw std::runtime_error("the expected forecast has " + std::to_string(expected.size()) + " numbers, not " +
                             std::to_string(forecast.numel()) + ". Make it from the same fields.");
  }
  const auto size = static_cast<size_t>(forecast.size(-1));
  const float* values = forecast.data_ptr<float>();
  std::vector<double> apart(size, 0.0), largest(size, 0.0);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(values[i]) && std::isnan(expected[i])) continue;  // no value there
    const double gap = std::abs(static_cast<double>(values[i]) - expected[i]);
    if (!(gap < INFINITY)) return INFINITY;  // not finite on one side
    apart[i % size] = std::max(apart[i % size], gap);
    largest[i % size] = std::max(largest[i % size], std::abs(static_cast<double>(expected[i])));
  }
  double worst = 0.0;
  for (size_t i = 0; i < size; ++i) worst = std::max(worst, apart[i] / std::max(largest[i], 1e-30));
  return worst;
}

torch::inductor::AOTIModelPackageLoader load(const std::string& path) {
  try {
    return torch::inductor::AOTIModelPackageLoader(path);
  } catch (const c10::Error& error) {
    const std::string why = error.what_without_backtrace();
    throw std::runtime_error(path + " is no compiled model: " + why.substr(0, why.find('\n')) +
                             ". Give the .aoti.pt2 that trainer export --aoti wrote.");
  }
}

int step(const std::vector<std::string>& paths) {
  auto model = load(paths[0]);
  auto about = model.get_metadata();
  const auto inputs = split(about["inputs"]), outputs = split(about["outputs"]);
  if (inputs.empty() || outputs.empty()) {
    throw std::runtime_error(paths[0] + " does not say what its variables are. Give one that trainer export wrote.");
  }
  const int64_t times = std::stoll(about["input_steps"]), cells = std::stoll(about["cells"]);
  const int64_t variables = static_cast<int64_t>(inputs.size());

  std::vector<float> values = read(paths[1]);
  const int64_t member = times * cells * variables, members = static_cast<int64_t>(values.size()) / member;
  if (members < 1 || static_cast<int64_t>(values.size()) != members * member) {
    throw std::runtime_error(paths[1] + " has " + std::to_string(values.size()) + " numbers. The model takes " +
                             std::to_string(times) + " times x members x " + std::to_string(cells) + " cells x " +
                             std::to_string(variables) + " variables: " + about["inputs"] + ".");
  }
  const at::Tensor fields = at::from_blob(values.data(), {1, times, members, cells, variables}, at::kFloat);

  const c10::InferenceMode inference;
  const at::Tensor forecast = model.run({fields})[0][0].contiguous();  // [ensemble, cells, outputs]
  write(paths[2], forecast);
  std::cout << "wrote " << paths[2] << ": " << about["outputs"] << ", " << about["step_seconds"]
            << " s after the last input time\n";
  if (paths.size() < 4) return 0;
  const double worst = difference(forecast, read(paths[3]));
  std::cout << "differs from " << paths[3] << " by " << worst << " of a variable's largest value\n";
  return worst <= kTolerance ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> paths(arguments + 1, arguments + count);
  if (paths.size() < 3 || paths.size() > 4) {
    std::cerr << "usage: step model.aoti.pt2 fields.f32 forecast.f32 [expected.f32]\n";
    return 2;
  }
  try {
    return step(paths);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
