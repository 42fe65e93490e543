// What Python sees of plan.cpp, and the reading of lists of ints, which only Python can do.
#include <pybind11/stl.h>

#include <climits>

#include "kernels.h"
#include "bindings_view.h"

namespace fastbert {
namespace {

// (num_tokens, max_seqlen), and cu_seqlens filled.
std::pair<int64_t, int64_t> mask_lengths(Arg mask_, Arg cu_seqlens_) {
  VIEW(mask); VIEW(cu_seqlens);
  mask.expect_ndim(2).expect(Dtype::boolean);
  const int64_t B = mask.size(0), L = mask.size(1);
  cu_seqlens.expect(Dtype::int32, {B + 1});
  const MaskPlan plan = plan_mask_lengths(mask, cu_seqlens, B, L);
  return {plan.num_tokens, plan.max_seqlen};
}

void mask_indices(Arg mask_, Arg indices_) {
  VIEW(mask); VIEW(indices);
  mask.expect(Dtype::boolean);
  indices.expect(Dtype::int64, {indices.numel()});
  plan_mask_indices(mask, indices, mask.numel());
}

std::vector<int64_t> batches(Arg lengths_, Arg order_, int64_t budget_tokens, int64_t max_sequences) {
  VIEW(lengths); VIEW(order);
  const int64_t S = lengths.numel();
  for (const View* v : {&lengths, &order}) v->expect(Dtype::int64, {S});
  return plan_batches(lengths, order, S, budget_tokens, max_sequences);
}

// One id; anything with __index__ counts as an int.
int64_t to_id(PyObject* item) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(item));
  const long long id = number ? PyLong_AsLongLong(number.ptr()) : -1;
  if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
  return id;
}

py::object fast_sequence(PyObject* object) {
  PyObject* sequence = PySequence_Fast(object, "sequences must be a list of lists of ints");
  if (sequence == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(sequence);
}

// Fills ids, positions and cu_seqlens; returns max_seqlen. The GIL stays: it reads Python objects.
int64_t concat(Arg sequences, Arg ids_, Arg positions_, Arg cu_seqlens_) {
  VIEW(ids); VIEW(positions); VIEW(cu_seqlens);
  const py::object outer = fast_sequence(sequences.ptr());
  const int64_t S = PySequence_Fast_GET_SIZE(outer.ptr()), T = ids.numel();
  if (T > INT_MAX) ids.fail<py::value_error>("has more than 2^31 - 1 tokens: split the batch");
  for (const View* v : {&ids, &positions}) v->expect(Dtype::int64, {T});
  cu_seqlens.expect(Dtype::int32, {S + 1});
  int64_t *id = ids, *position = positions;
  int32_t* cu = cu_seqlens;
  int64_t at = 0, longest = 0;
  cu[0] = 0;
  for (int64_t s = 0; s < S; ++s) {
    if (s >= PySequence_Fast_GET_SIZE(outer.ptr())) throw std::runtime_error("sequences changed while they were read");
    const py::object inner = fast_sequence(PySequence_Fast_GET_ITEM(outer.ptr(), s));
    // The size is asked for again each time: __index__ may run code that changes the list.
    for (int64_t i = 0; i < PySequence_Fast_GET_SIZE(inner.ptr()); ++i, ++at) {
      if (at >= T) throw std::runtime_error("sequences changed while they were read");
      id[at] = to_id(PySequence_Fast_GET_ITEM(inner.ptr(), i));
      position[at] = i;
    }
    longest = at - cu[s] > longest ? at - cu[s] : longest;
    cu[s + 1] = static_cast<int32_t>(at);
  }
  if (at != T) throw std::runtime_error("sequences changed while they were read");
  return longest;
}

}  // namespace

void bind_plans(py::module_& m) {
  m.def("mask_lengths", &mask_lengths);
  m.def("mask_indices", &mask_indices);
  m.def("batches", &batches);
  m.def("concat", &concat);
}

}  // namespace fastbert
