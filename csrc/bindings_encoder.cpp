// What Python sees of the frozen encoder: one object, of float, bf16, 8-bit or split weights, with one call for a whole forward pass.
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "bindings_view.h"
#include "encoder_driver.h"

namespace fastbert {
namespace {

constexpr const char* kActivations[] = {"gelu", "gelu_tanh", "relu", "silu", "identity"};  // in the order of Activation

Activation activation_of(const std::string& name) {
  for (int i = 0; i < 5; ++i)
    if (name == kActivations[i]) return static_cast<Activation>(i);
  throw py::value_error("unknown activation '" + name + "'");
}

template <class T>
constexpr Dtype dtype_of() {
  return std::is_same_v<T, float> ? Dtype::float32 : std::is_same_v<T, bf16> ? Dtype::bfloat16 : Dtype::int8;
}

template <class T>
Matrix<T> matrix(Arg tensor, const char* name, int64_t columns = -1) {
  const View view(tensor, name);
  if (!view.present()) return {};
  view.expect_ndim(2).expect(dtype_of<T>(), {view.size(0), columns < 0 ? view.size(1) : columns});
  return {view, view.size(0), view.size(1)};
}

template <class T>
const T* vector(Arg tensor, const char* name, int64_t size) {
  const View view(tensor, name);
  view.expect(dtype_of<T>(), {size});
  return view.present() ? static_cast<const T*>(view) : nullptr;
}

// (weight (out, in), bias (out) or None), and of 8-bit weights (..., scale (out), scale of inputs (in), leading rows
// whose activations have 8 bits: whole ones of num_parts parts); out < 0 takes any.
template <class T>
LinearSource<T> linear(Arg tuple, const char* name, int64_t out, int64_t in, int64_t num_parts = 1) {
  const auto parts = py::cast<py::tuple>(tuple);
  const std::size_t count = std::is_same_v<T, std::int8_t> ? 5 : 2;
  if (parts.size() != count) throw py::value_error(std::string(name) + " needs " + std::to_string(count) + " parts");
  const View view(parts[0], name);
  view.expect_ndim(2).expect(dtype_of<Given<T>>(), {out < 0 ? view.size(0) : out, in});
  const int64_t rows = view.size(0);
  LinearSource<T> source{{view, rows, in}, vector<Stored<T>>(parts[1], name, rows)};
  if constexpr (std::is_same_v<T, std::int8_t>) {
    source.scales = vector<float>(parts[2], name, rows);
    source.input_scale = vector<float>(parts[3], name, in);
    if (source.scales == nullptr || source.input_scale == nullptr)
      throw py::value_error(std::string(name) + " needs a scale for each row and for each input");
    source.fours = py::cast<int64_t>(parts[4]);
    if (source.fours < 0 || source.fours > rows || source.fours * num_parts % rows)
      throw py::value_error(std::string(name) + " takes activations of 8 bits in " + std::to_string(source.fours) +
                            " of " + std::to_string(rows) + " rows, which is no whole number of its parts");
  }
  return source;
}

// (weight (size), bias (size), eps).
template <class T>
NormSource<T> norm(Arg triple, const char* name, int64_t size) {
  const auto [weight, bias, eps] = py::cast<std::tuple<py::object, py::object, float>>(triple);
  if (weight.is_none() || bias.is_none()) throw py::value_error(std::string(name) + " needs a weight and a bias");
  return {vector<T>(weight, name, size), vector<T>(bias, name, size), eps};
}

template <class T>
EncoderSource<T> read(const py::dict& weights) {
  EncoderSource<T> source;
  source.word = matrix<Stored<T>>(weights["word"], "word");
  const int64_t E = source.word.columns;
  source.position = matrix<Stored<T>>(weights["position"], "position", E);
  source.token_type = matrix<Stored<T>>(weights["token_type"], "token_type", E);
  source.embed_norm = norm<Stored<T>>(weights["embed_norm"], "embed_norm", E);
  const py::object project = weights["project"];
  if (!project.is_none()) source.project = linear<T>(project, "project", -1, E);
  const int64_t D = project.is_none() ? E : source.project.weight.rows;
  source.num_heads = py::cast<int64_t>(weights["num_heads"]);
  if (source.num_heads < 1 || D % source.num_heads)
    throw py::value_error("num_heads " + std::to_string(source.num_heads) + " does not divide " + std::to_string(D));
  source.activation = activation_of(py::cast<std::string>(weights["activation"]));
  int64_t F = -1;
  for (const py::handle item : weights["layers"]) {
    const auto layer = py::cast<py::dict>(item);
    const auto intermediate = linear<T>(layer["intermediate"], "intermediate", F, D);
    F = intermediate.weight.rows;
    source.layers.push_back({linear<T>(layer["qkv"], "qkv", 3 * D, D, 3), linear<T>(layer["dense"], "dense", D, D),
                             intermediate, linear<T>(layer["output"], "output", D, F),
                             norm<Stored<T>>(layer["attention_norm"], "attention_norm", D),
                             norm<Stored<T>>(layer["output_norm"], "output_norm", D)});
  }
  source.order = py::cast<std::vector<int64_t>>(weights["order"]);
  for (const int64_t index : source.order)
    if (index < 0 || index >= static_cast<int64_t>(source.layers.size()))
      throw py::value_error("order names layer " + std::to_string(index) + " of " +
                            std::to_string(source.layers.size()));
  if (source.order.empty()) throw py::value_error("order names no layer");
  source.rel_bias = matrix<float>(weights["rel_bias"], "rel_bias");
  if (source.rel_bias.data && (source.rel_bias.rows != source.num_heads || source.rel_bias.columns % 2 == 0))
    throw py::value_error("rel_bias must be (num_heads, an odd number of offsets)");
  return source;
}

void check_ids(const View& ids, const char* name, int64_t rows) {
  const int64_t* id = ids;
  int64_t low = 0, high = 0;
  for (int64_t i = 0; i < ids.numel(); ++i) {
    low = id[i] < low ? id[i] : low;
    high = id[i] > high ? id[i] : high;
  }
  if (low < 0 || high >= rows)
    throw py::index_error(std::string(name) + " has values from " + std::to_string(low) + " to " +
                          std::to_string(high) + " but the table has rows 0 to " + std::to_string(rows - 1));
}

// The encoder of one dtype, and the sizes of the tables that ids must fit.
template <class T>
struct Frozen {
  explicit Frozen(const EncoderSource<T>& source)
      : encoder(source), words(source.word.rows), positions(source.position.rows), types(source.token_type.rows) {}
  Encoder<T> encoder;
  int64_t words, positions, types;

  void forward(Arg input_ids_, Arg position_ids_, Arg type_ids_, Arg cu_seqlens_, Arg out_, int64_t max_seqlen,
               int num_threads, const std::optional<PoolMode>& mode, bool unit) {
    VIEW(input_ids); VIEW(position_ids); VIEW(type_ids); VIEW(cu_seqlens); VIEW(out);
    const int64_t T_ = input_ids.expect_ndim(1).numel();
    for (const View* v : {&input_ids, &position_ids, &type_ids}) v->expect(Dtype::int64, {T_});
    const int64_t S = check_cu_seqlens(cu_seqlens, T_, max_seqlen);
    out.expect(unit ? Dtype::float32 : dtype_of<Stored<T>>(), {mode ? S : T_, encoder.hidden_size()});
    if (unit && !mode) throw py::value_error("vectors of length 1 need a pooling mode");
    check_ids(input_ids, "input_ids", words);
    check_ids(position_ids, "position_ids", positions);
    if (type_ids.present() && types) check_ids(type_ids, "type_ids", types);
    const Tokens tokens{input_ids, position_ids, type_ids.present() ? static_cast<const int64_t*>(type_ids) : nullptr,
                        cu_seqlens, 0, S};
    Stored<T>* to = unit ? nullptr : static_cast<Stored<T>*>(out);
    float* unit_to = unit ? static_cast<float*>(out) : nullptr;
    const int threads = num_threads < 1 ? 1 : num_threads;
    const py::gil_scoped_release nogil;
    if (mode)
      encoder.forward_pooled(tokens, max_seqlen, *mode, to, unit_to, threads);
    else
      encoder.forward(tokens, max_seqlen, to, threads);
  }
};

class Either {
 public:
  Either(const py::dict& weights, bool high) {
    const py::list layers = weights["layers"];
    if (layers.empty()) throw py::value_error("there is no layer");
    const auto first = py::cast<py::dict>(layers[0]);
    const auto parts = py::cast<py::tuple>(first["qkv"]);
    const View qkv(parts[0], "qkv");
    if (high && !has_split()) throw py::value_error("precision high needs AMX");
    if (high)
      frozen_ = std::make_unique<Frozen<split>>(read<split>(weights));
    else if (qkv.is(Dtype::int8))
      frozen_ = std::make_unique<Frozen<std::int8_t>>(read<std::int8_t>(weights));
    else if (qkv.expect_float().is(Dtype::float32))
      frozen_ = std::make_unique<Frozen<float>>(read<float>(weights));
    else
      frozen_ = std::make_unique<Frozen<bf16>>(read<bf16>(weights));
  }
  // Hidden states to out (T, D); given a pooling mode, vectors to out (S, D); of length 1 and in fp32 if `unit`.
  void forward(Arg input_ids, Arg position_ids, Arg type_ids, Arg cu_seqlens, Arg out, int64_t max_seqlen,
               int num_threads, const std::optional<std::string>& pooling, bool unit) {
    std::optional<PoolMode> mode;
    if (pooling) mode = pool_mode(*pooling);
    std::visit(
        [&](auto& f) {
          f->forward(input_ids, position_ids, type_ids, cu_seqlens, out, max_seqlen, num_threads, mode, unit);
        },
        frozen_);
  }
  int64_t nbytes() const {
    return std::visit([](const auto& f) { return f->encoder.nbytes(); }, frozen_);
  }

 private:
  std::variant<std::unique_ptr<Frozen<float>>, std::unique_ptr<Frozen<bf16>>, std::unique_ptr<Frozen<std::int8_t>>,
               std::unique_ptr<Frozen<split>>>
      frozen_;
};

// Where some tensors lie, how often torch wrote to them, and some bytes of those that are `sampled`, as they were. Writes
// that torch does not count (through .data or NumPy) change the bytes, unless they are to few elements only.
class Stamps {
 public:
  Stamps(py::list tensors, py::list sampled) : tensors_(std::move(tensors)), sampled_(std::move(sampled)) {
    for (const py::handle tensor : tensors_) stamps_.push_back(stamp(tensor));
    for (const py::handle tensor : sampled_) {
      const View view(tensor, "parameter");
      const char* first = view;
      const int64_t nbytes = view.numel() * view.nbytes_of_one();
      for (int64_t i = 0; i < kEach && nbytes >= 4; ++i) {
        at_.push_back(first + (nbytes - 4) / 4 * i / (kEach - 1) * 4);
        values_.push_back(word(at_.back()));
      }
    }
  }
  bool same() const {
    for (std::size_t i = 0; i < stamps_.size(); ++i)
      if (stamp(PyList_GET_ITEM(tensors_.ptr(), i)) != stamps_[i]) return false;
    bool equal = true;
    for (std::size_t i = 0; i < at_.size(); ++i) equal &= word(at_[i]) == values_[i];
    return equal;
  }

 private:
  static constexpr int64_t kEach = 8;
  static std::pair<const void*, int64_t> stamp(py::handle tensor) {
    return {torch.address(tensor), torch.version(tensor)};
  }
  static std::uint32_t word(const char* p) {
    std::uint32_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  py::list tensors_, sampled_;
  std::vector<std::pair<const void*, int64_t>> stamps_;
  std::vector<const char*> at_;
  std::vector<std::uint32_t> values_;
};

}  // namespace

void bind_encoder(py::module_& m) {
  py::class_<Stamps>(m, "Stamps").def(py::init<py::list, py::list>()).def("same", &Stamps::same);
  py::class_<TeamSize>(m, "TeamSize")
      .def(py::init<>())
      .def("of", &TeamSize::of, py::arg("asked"))
      .def("took", &TeamSize::took, py::arg("tokens"), py::arg("nanoseconds"));
  py::class_<Either>(m, "Encoder")
      .def(py::init<const py::dict&, bool>(), py::arg("weights"), py::arg("high") = false)
      .def("forward", &Either::forward, py::arg("input_ids"), py::arg("position_ids"), py::arg("type_ids"),
           py::arg("cu_seqlens"), py::arg("out"), py::arg("max_seqlen"), py::arg("num_threads"),
           py::arg("pooling") = py::none(), py::arg("unit") = false)
      .def_property_readonly("nbytes", &Either::nbytes);
  m.def("has_fours", &has_fours);
  m.def("has_split", &has_split);
}

}  // namespace fastbert
