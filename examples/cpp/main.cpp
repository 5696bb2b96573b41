// Denoise with an exported engine and LibTorch, without Python: denoise ENGINE.pt2 RUN.pt LATENTS.pt
//
//     surgery export out/shapes --target inductor --weights engine --decompose --shapes 2x64x64
//     python examples/cpp/prepare.py out/shapes "two green stars" --out run.pt
//     build/denoise out/shapes/engines/KEY/whole-0.pt2 run.pt latents.pt
//     python examples/cpp/prepare.py out/shapes --latents latents.pt --image stars.png
//
// RUN.pt is what torch.save wrote of a dictionary of tensors: latents (1, channels, height, width); text (2, tokens,
// width), of the empty prompt and the prompt; timesteps (steps); alphas (steps + 1), the share of the signal's variance
// before each step and after the last; guidance_scale and predicts_velocity, scalars; and under hyperparameters a list of
// vectors, in the order of engine.json's `values`. Each step is DDIM's, with eta 0 (Song et al., arXiv 2010.02502, eq. 12).

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

namespace {

std::vector<char> contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, path, " cannot be opened");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// One step: the prediction of the noise, or of the velocity, taken apart into image and noise, and mixed anew.
torch::Tensor stepped(const torch::Tensor& latents, const torch::Tensor& predicted, bool velocity, double alpha, double next) {
  const double signal = std::sqrt(alpha), noise = std::sqrt(1 - alpha);
  const auto image = velocity ? signal * latents - noise * predicted : (latents - noise * predicted) / signal;
  const auto direction = velocity ? signal * predicted + noise * latents : predicted;
  return std::sqrt(next) * image + std::sqrt(1 - next) * direction;
}

void denoise(const std::string& engine, const std::string& run, const std::string& out) {
  const c10::InferenceMode without_gradients;
  torch::inductor::AOTIModelPackageLoader loader(engine);
  const auto given = torch::pickle_load(contents(run)).toGenericDict();
  const auto tensor = [&](const char* name) { return given.at(name).toTensor(); };

  auto latents = tensor("latents");
  const auto text = tensor("text"), timesteps = tensor("timesteps").to(torch::kFloat), alphas = tensor("alphas");
  const double guidance_scale = tensor("guidance_scale").item<double>();
  const bool velocity = tensor("predicts_velocity").item<bool>();
  for (int64_t step = 0; step < timesteps.size(0); ++step) {
    // The order of engine.json's `inputs`: a UNet's sample, timestep and text, then the hyperparameters.
    std::vector<torch::Tensor> inputs = {torch::cat({latents, latents}), timesteps[step], text};
    for (const c10::IValue& vector : given.at("hyperparameters").toListRef()) {
      inputs.push_back(vector.toTensor());
    }
    const auto both = loader.run(inputs)[0].chunk(2);
    const auto predicted = both[0] + guidance_scale * (both[1] - both[0]);
    latents = stepped(latents, predicted, velocity, alphas[step].item<double>(), alphas[step + 1].item<double>());
  }
  const auto saved = torch::pickle_save(latents);
  std::ofstream(out, std::ios::binary).write(saved.data(), static_cast<std::streamsize>(saved.size()));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "denoise ENGINE.pt2 RUN.pt LATENTS.pt\n";
    return 2;
  }
  try {
    denoise(arguments[1], arguments[2], arguments[3]);
  } catch (const std::exception& error) {
    std::cerr << "denoise: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
