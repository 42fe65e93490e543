"""Metrics against scikit-learn and SciPy on random and degenerate inputs, and by hand where those have none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle

from fastbert.train import metrics

CLASSES = [2, 3, 7]


def predictions(num_labels, N=200, right=0.6):
    rng = np.random.default_rng(0)
    gold = rng.integers(0, num_labels, N)
    return np.where(rng.random(N) < right, gold, rng.integers(0, num_labels, N)), gold


@pytest.mark.parametrize("num_labels", CLASSES)
@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
def test_classes_against_scikit_learn(num_labels, right):
    predicted, gold = predictions(num_labels, right=right)
    assert metrics.accuracy(predicted, gold) == pytest.approx(oracle.accuracy_score(gold, predicted), abs=1e-12)
    expected = oracle.f1_score(gold, predicted, average="macro", zero_division=0)
    assert metrics.f1_macro(predicted, gold) == pytest.approx(expected, abs=1e-12)
    assert metrics.matthews(predicted, gold) == pytest.approx(oracle.matthews_corrcoef(gold, predicted), abs=1e-12)
    expected = oracle.f1_score(gold == 1, predicted == 1, zero_division=0)
    assert metrics.f1_binary(predicted, gold) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_array_equal(
        metrics.confusion(predicted, gold, num_labels),
        oracle.confusion_matrix(gold, predicted, labels=range(num_labels)),
    )


def test_mutants_of_classes_are_seen():
    """What a wrong metric would give differs by more than the tolerance above."""
    predicted, gold = predictions(3)
    weighted = oracle.f1_score(gold, predicted, average="weighted")
    assert abs(metrics.f1_macro(predicted, gold) - weighted) > 1e-4
    shifted = metrics.matthews(np.roll(predicted, 1), gold)
    assert abs(metrics.matthews(predicted, gold) - shifted) > 0.1


@pytest.mark.parametrize("constant", [0, 1])
def test_one_class_throughout(constant):
    predicted, gold = np.full(10, constant), np.random.default_rng(0).integers(0, 2, 10)
    assert metrics.matthews(predicted, gold) == 0.0
    expected = oracle.f1_score(gold, predicted, average="macro", zero_division=0)
    assert metrics.f1_macro(predicted, gold) == pytest.approx(expected)


def test_several_labels_against_scikit_learn():
    rng = np.random.default_rng(0)
    gold = rng.random((150, 6)) < 0.3
    predicted = gold ^ (rng.random((150, 6)) < 0.2)
    predicted[:, 5] = gold[:, 5] = False  # a label that never occurs
    micro, macro = metrics.f1_columns(predicted, gold)
    assert micro == pytest.approx(oracle.f1_score(gold, predicted, average="micro", zero_division=0), abs=1e-12)
    assert macro == pytest.approx(oracle.f1_score(gold, predicted, average="macro", zero_division=0), abs=1e-12)
    assert abs(micro - macro) > 0.01
    assert metrics.accuracy(predicted, gold) == pytest.approx(oracle.accuracy_score(gold, predicted))


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_against_scipy(ties):
    rng = np.random.default_rng(0)
    a = rng.normal(size=300) * 1e3 + 1e5
    b = 0.5 * a + rng.normal(size=300) * 500
    if ties:
        a, b = a.round(-3), b.round(-3)
    assert metrics.pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-10)
    assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-10)
    if ties:  # ranks by order of appearance, the usual slip, are told apart
        broken = metrics.pearson(a.argsort(kind="stable").argsort().astype(float), stats.rankdata(b))
        assert abs(broken - metrics.spearman(a, b)) > 1e-6


def test_a_constant_has_no_correlation():
    assert metrics.pearson(np.ones(5), np.arange(5.0)) == 0.0
    assert metrics.spearman(np.ones(5), np.arange(5.0)) == 0.0


def test_retrieval():
    vectors = np.eye(4)
    assert metrics.retrieval(vectors, vectors) == (1.0, 1.0)
    # Query 0 finds document 1 first and its own second, query 1 the other way round; 2 and 3 are right.
    assert metrics.retrieval(vectors[[1, 0, 2, 3]] * 0.8 + vectors * 0.6, vectors) == (0.5, 0.75)
    assert metrics.retrieval(vectors[[1, 0, 2, 3]] * 0.8 + vectors * 0.6, vectors, at=1) == (0.5, 0.5)
    queries, documents = np.random.default_rng(0).normal(size=(2, 50, 8))
    ranks = (-(queries @ documents.T)).argsort(1).argsort(1)[np.arange(50), np.arange(50)] + 1
    whole = metrics.retrieval(queries, documents)
    assert whole == pytest.approx(((ranks == 1).mean(), np.where(ranks <= 10, 1 / ranks, 0).mean()))
    assert metrics.retrieval(queries, documents, chunk=7) == whole


def test_entities_are_read_strictly():
    tags = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "B-LOC", "I-PER", "I-LOC"]
    assert metrics.entities(tags) == {("PER", 0, 2), ("LOC", 4, 5), ("LOC", 5, 6)}
    assert metrics.entities(["O", "B-ORG"]) == {("ORG", 1, 2)}
    assert metrics.entities([]) == set()
    assert metrics.entities(["B-creative-work", "I-creative-work"]) == {("creative-work", 0, 2)}


def test_entity_scores_count_whole_entities():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-ORG"]]
    scores = metrics.entity_scores(found, gold)  # 2 of 4 found are right, 2 of 3 are found
    assert scores == {"precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7)}
    assert metrics.entity_scores(gold, gold)["f1"] == 1.0
    assert metrics.entity_scores([["O"]], [["O"]])["f1"] == 0.0
    with pytest.raises(ValueError, match=r"sentence 1 has 2 tags but 1"):
        metrics.entity_scores([gold[0], ["O"]], gold)


@pytest.mark.parametrize(
    ("tags", "iob2"),
    [
        ("I-A I-A O I-B I-A", "B-A I-A O B-B B-A"),  # IOB1
        ("I-A B-A I-A", "B-A B-A I-A"),
        ("B-A E-A S-A O B-B I-B E-B", "B-A I-A B-A O B-B I-B I-B"),  # BIOES
        ("S-A I-A", "B-A B-A"),
        ("U-A B-A L-A", "B-A B-A I-A"),  # BILOU
        ("B-A I-A O B-A", "B-A I-A O B-A"),
        ("NN VB O", "NN VB O"),
    ],
)
def test_tags_in_other_schemes(tags, iob2):
    assert metrics.to_iob2(tags.split()) == iob2.split()


def test_entity_tags_are_told_from_others():
    assert metrics.is_iob2(["B-A", "I-A", "O"])
    assert not metrics.is_iob2(["NOUN", "O"])
    assert not metrics.is_iob2(["O"])


def test_answers():
    assert metrics.normalize_answer(" The  Eiffel-Tower, a\ttower!") == "eiffeltower tower"
    assert metrics.exact_match("the Beatles", ["Beatles!", "Wings"]) == 1.0
    assert metrics.exact_match("", []) == 1.0
    assert metrics.exact_match("x", []) == 0.0
    assert metrics.word_f1("red red fox", ["red fox jumps", "cat"]) == pytest.approx(2 * 2 / 6)
    assert metrics.word_f1("red", []) == 0.0
    assert metrics.word_f1("the", [""]) == 1.0  # an article alone is no word


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"predictions have shape \(2,\) but labels \(3,\)"):
        metrics.accuracy(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="no predictions"):
        metrics.accuracy(np.zeros(0), np.zeros(0))
