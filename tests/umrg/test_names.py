import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umrg.names import category_name, modality_family, modality_matches, modality_name

# A busy machine is slow without being wrong.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("public symphysis", "pubic symphysis"),
        ("Postcava", "inferior vena cava"),
        ("covid-19 Infection", "COVID-19 infection"),
        ("left_Kidneys", "left kidney"),
        ("  liver   tumours ", "liver tumor"),
        ("abdomen anatomies", "abdomen anatomies"),
        ("pancreas", "pancreas"),
        (None, "unknown"),
        ("", "unknown"),
    ],
)
def test_spellings_of_one_category_become_one_name(written: str | None, name: str) -> None:
    assert category_name(written) == name


@pytest.mark.parametrize(
    ("written", "name", "family"),
    [
        ("X-Ray", "X-ray", "X-ray"),
        ("xray", "X-ray", "X-ray"),
        ("MRI-T1-Gd", "MRI-T1-Gd", "MRI"),
        ("mri_flair", "MRI-FLAIR", "MRI"),
        ("Magnetic Resonance Imaging", "MRI", "MRI"),
        ("CT", "CT", "CT"),
        ("ctg", "ctg", "ctg"),
        ("Thermography", "thermography", "thermography"),
        (None, "unknown", "unknown"),
    ],
)
def test_a_modality_has_a_name_and_a_family(written: str | None, name: str, family: str) -> None:
    assert modality_name(written) == name
    assert modality_family(written) == family


def test_a_family_matches_its_sequences_and_a_sequence_only_itself() -> None:
    assert modality_matches("MRI-FLAIR", "mri")
    assert modality_matches("MRI-FLAIR", "MRI-flair")
    assert not modality_matches("MRI", "MRI-FLAIR")
    assert not modality_matches("MRI-T1-Gd", "MRI-FLAIR")


@given(st.text(max_size=40) | st.sampled_from(["MRI T1", "ct-Art", "X ray chest", "Tumours", "optic DISK"]))
@steady
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert category_name(category_name(text)) == category_name(text)
    assert modality_name(modality_name(text)) == modality_name(text)
    assert modality_family(modality_name(text)) == modality_family(text)
