"""Students for distillation: which layers they take of their teacher, and which cannot be made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from twin_models import ALBERT, DISTILBERT, ELECTRA, SMALL, same

import fastbert
from fastbert.train.student import student_of, teacher_layers


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        ((12, 6), [0, 2, 4, 7, 9, 11]),
        ((12, 12), list(range(12))),
        ((12, 3), [0, 6, 11]),
        ((24, 2), [0, 23]),
        ((6, 1), [0]),
    ],
)
def test_which_layers_a_student_takes(depths, expected):
    assert teacher_layers(*depths) == expected


@pytest.mark.parametrize("num", [0, 13])
def test_a_student_has_one_layer_to_all(num):
    with pytest.raises(ValueError, match=f"1 to 12, not {num}"):
        teacher_layers(12, num)


def teacher(name: str, config: dict[str, Any], num_layers: int) -> Any:
    field = "n_layers" if "n_layers" in config else "num_hidden_layers"
    return same(name, config | {field: num_layers}, torch.float32, seed=2)[0].eval()


FAMILIES = {
    "BertForMaskedLM": SMALL,
    "RobertaForMaskedLM": SMALL | {"pad_token_id": 1, "max_position_embeddings": 42},
    "DistilBertForMaskedLM": DISTILBERT,
    "MPNetForMaskedLM": SMALL | {"pad_token_id": 1, "max_position_embeddings": 42},
    "ElectraForMaskedLM": ELECTRA,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_as_deep_as_its_teacher_is_its_teacher(name):
    model = teacher(name, FAMILIES[name], 3)
    student = student_of(model, 3)
    assert type(student).__name__ == ("DistilBertForMaskedLM" if name.startswith("Bert") else name)
    assert student.training
    ids = torch.tensor([[5, 7, 9, 33, 6], [8, 20, 21, 22, 23]])
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        shallow = student_of(model).eval()
        assert shallow.config.num_hidden_layers == 1
        assert (shallow(ids).logits - model(ids).logits).abs().max() > 1e-2


def test_a_student_takes_the_layers_it_should():
    model = teacher("BertForMaskedLM", SMALL, 5)
    for student in (student_of(model, 3), student_of(model, 3, distilbert=False)):
        for i, layer in enumerate(student.base_model.encoder.layer):
            source = model.base_model.encoder.layer[2 * i]
            for (key, a), (_, b) in zip(layer.named_parameters(), source.named_parameters(), strict=True):
                assert torch.equal(a, b), key
                assert a.data_ptr() != b.data_ptr()
    assert type(student) is type(model)


def test_students_that_cannot_be_made():
    albert = fastbert.AlbertForMaskedLM(fastbert.AlbertConfig.from_dict(ALBERT))
    with pytest.raises(ValueError, match="ALBERT's layers share"):
        student_of(albert)
    with pytest.raises(ValueError, match="the teacher is a ElectraForMaskedLM"):
        student_of(teacher("ElectraForMaskedLM", ELECTRA, 2), distilbert=True)
    with pytest.raises(ValueError, match="layer_norm_eps is 1e-05"):
        student_of(teacher("BertForMaskedLM", SMALL | {"layer_norm_eps": 1e-5}, 2))
