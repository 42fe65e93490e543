// A torch tensor as an address, a dtype and a shape, checked. Borrowed from Python for the length of a call (50 ns).
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "dlpack.h"
#include "kernels.h"

namespace fastbert {

namespace py = pybind11;
using std::int32_t;
using std::int64_t;

enum class Dtype { float32, float64, bfloat16, int64, int32, int8, boolean };

// torch.Tensor and its DLPack functions; loaded once, when the module is.
struct Torch {
  PyTypeObject* tensor = nullptr;
  const DLPackExchangeAPI* dlpack = nullptr;
  void load() {
    const py::object type = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (!capsule.is_none())
      dlpack = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (dlpack == nullptr || dlpack->version.major != 1)
      throw py::import_error("fastbert needs a torch with DLPack 1.3's exchange API: install torch 2.11 or newer");
    tensor = reinterpret_cast<PyTypeObject*>(type.ptr());
    const py::object descriptor = type.attr("_version");
    if (!Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type))
      throw py::import_error("fastbert needs torch.Tensor._version to be a descriptor of C, as torch 2.11 has it");
    version_of = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
  }
  // Of a tensor: the address of its first element, null where it has no plain memory; and how often torch wrote to it.
  const void* address(py::handle object) const {
    DLTensor view;
    if (dlpack->tensor_from_object(object.ptr(), &view) != 0) {
      PyErr_Clear();
      return nullptr;
    }
    return static_cast<const char*>(view.data) + view.byte_offset;
  }
  int64_t version(py::handle object) const {
    const auto version = py::reinterpret_steal<py::object>(version_of->get(object.ptr(), version_of->closure));
    if (!version) throw py::error_already_set();
    return PyLong_AsLongLong(version.ptr());
  }

 private:
  const PyGetSetDef* version_of = nullptr;
};
inline Torch torch;

// None gives an absent view with a null address. Converts to a pointer of whatever type its dtype was checked for.
class View {
 public:
  using Shape = std::initializer_list<int64_t>;

  View(py::handle object, const char* name) : object_(object), name_(name) {
    if (object.is_none()) return;
    if (!PyObject_TypeCheck(object.ptr(), torch.tensor))
      fail<py::type_error>("must be a torch tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
    if (torch.dlpack->tensor_from_object(object.ptr(), &tensor_) != 0) {
      const py::error_already_set error;  // sparse, meta, fake: tensors without plain memory
      fail<py::value_error>("is not a plain tensor on the CPU: " + std::string(error.what()));
    }
    if (tensor_.device_type != 1) fail<py::value_error>("must be on the CPU, got " + text("device"));
    for (int64_t i = tensor_.ndim - 1, step = 1; i >= 0; step *= size(i--))
      if (size(i) > 1 && tensor_.strides[i] != step && numel() > 0)
        fail<py::value_error>("must be contiguous (call .contiguous()), got shape " + text("shape"));
  }

  bool present() const { return !object_.is_none(); }
  int64_t ndim() const { return tensor_.ndim; }
  int64_t size(int64_t axis) const { return tensor_.shape[axis]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < ndim(); ++i) n *= size(i);
    return n;
  }
  int64_t nbytes_of_one() const { return tensor_.type_bits / 8; }
  int64_t columns() const { return ndim() ? size(ndim() - 1) : 1; }
  int64_t rows() const { return columns() ? numel() / columns() : 0; }

  bool is(Dtype dtype) const {
    constexpr struct {
      std::uint8_t code, bits;
    } types[] = {{2, 32}, {2, 64}, {4, 16}, {0, 64}, {0, 32}, {0, 8}, {6, 8}};
    const auto type = types[static_cast<int>(dtype)];
    return tensor_.type_code == type.code && tensor_.type_bits == type.bits;
  }

  // Each fails with an error that prints both sides. An absent view passes what speaks of its contents.
  const View& expect_ndim(int64_t expected) const {
    if (ndim() != expected)
      fail<py::value_error>("must have " + std::to_string(expected) + " dimensions, got shape " + text("shape"));
    return *this;
  }
  const View& expect(Dtype dtype) const {
    constexpr const char* names[] = {"float32", "float64", "bfloat16", "int64", "int32", "int8", "bool"};
    if (present() && !is(dtype))
      fail<py::type_error>("must be torch." + std::string(names[static_cast<int>(dtype)]) + ", got " + text("dtype"));
    return *this;
  }
  const View& expect(Dtype dtype, Shape shape) const { return expect(dtype).expect(shape.begin(), shape.size()); }
  const View& expect_float() const {
    if (!is(Dtype::float32) && !is(Dtype::bfloat16))
      fail<py::type_error>("must be torch.float32 or torch.bfloat16, got " + text("dtype"));
    return *this;
  }
  const View& expect_like(const View& other, Shape shape) const {
    return same_dtype(other).expect(shape.begin(), shape.size());
  }
  const View& expect_like(const View& other) const {
    return same_dtype(other).expect(other.tensor_.shape, other.ndim());
  }

  // The shape of `other`, and its dtype or float32.
  const View& expect_widened(const View& other) const {
    return (is(Dtype::float32) ? *this : same_dtype(other)).expect(other.tensor_.shape, other.ndim());
  }

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor_.data) + tensor_.byte_offset);
  }
  template <class Error>
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(name_ + (" " + what));
  }

 private:
  const View& same_dtype(const View& other) const {
    if (present() && (tensor_.type_code != other.tensor_.type_code || tensor_.type_bits != other.tensor_.type_bits))
      fail<py::type_error>("is " + text("dtype") + " but " + other.name_ + " is " + other.text("dtype"));
    return *this;
  }
  const View& expect(const int64_t* shape, size_t count) const {
    bool same = static_cast<size_t>(ndim()) == count;
    for (size_t i = 0; same && i < count; ++i) same = size(i) == shape[i];
    if (present() && !same) {
      std::string wanted;
      for (size_t i = 0; i < count; ++i) wanted += (i ? ", " : "") + std::to_string(shape[i]);
      fail<py::value_error>("must have shape [" + wanted + "], got " + text("shape"));
    }
    return *this;
  }
  std::string text(const char* attribute) const { return py::str(object_.attr(attribute)); }

  py::handle object_;
  const char* name_;
  DLTensor tensor_{};
};

// Ascending from 0 to num_tokens, no sequence longer than max_seqlen: what keeps the kernels inside their arrays.
inline int64_t check_cu_seqlens(const View& cu, int64_t num_tokens, int64_t max_seqlen) {
  cu.expect_ndim(1).expect(Dtype::int32);
  const int64_t S = cu.numel() - 1;
  const int32_t* at = cu;
  if (S < 0 || at[0] != 0 || at[S] != num_tokens)
    cu.fail<py::value_error>("must run from 0 to the number of tokens, " + std::to_string(num_tokens));
  for (int64_t s = 0; s < S; ++s) {
    const int64_t length = static_cast<int64_t>(at[s + 1]) - at[s];
    if (length < 0 || length > max_seqlen)
      cu.fail<py::value_error>("gives sequence " + std::to_string(s) + " a length of " + std::to_string(length) +
                               ", expected 0 to max_seqlen = " + std::to_string(max_seqlen));
  }
  return S;
}

inline PoolMode pool_mode(const std::string& name) {
  constexpr const char* kNames[] = {"cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"};  // in its order
  for (int i = 0; i < 6; ++i)
    if (name == kNames[i]) return static_cast<PoolMode>(i);
  throw py::value_error("unknown pooling mode '" + name + "'");
}

// The view `x` of the argument `x_`, which errors call "x".
#define VIEW(name) const View name(name##_, #name)
using Arg = py::handle;

}  // namespace fastbert
