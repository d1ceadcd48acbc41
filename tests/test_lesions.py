"""The one order of the classes: published weights and data sets rely on it."""

from stgan_utils.lesions import CLASSES, LESIONS, MAJORITY, MINORITY, PRIOR_TRAINING_ORDER


def test_the_order_is_the_alphabetical_one_of_dermamnist():
    assert CLASSES == ("AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC")
    assert {*MINORITY, MAJORITY} == set(CLASSES) and MAJORITY not in MINORITY
    assert all(LESIONS[code].code == code == LESIONS[code].dx.upper() for code in CLASSES)


def test_the_prior_system_had_another():
    assert PRIOR_TRAINING_ORDER == ("NV", "MEL", "BKL", "BCC", "AKIEC", "VASC", "DF")
