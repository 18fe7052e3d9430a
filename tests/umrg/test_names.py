import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umrg.names import category_name, modality_family, modality_matches, modality_name, names_outright

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


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("Which of these are the Livers?", "liver"),
        ("Which kidney is displaced?", "left kidney"),
        ("Where is the tumour's core?", "tumor core"),
        ("Where is the IVC?", "inferior vena cava"),
        ("Where do you see a COVID infection?", "COVID-19 infection"),
        ("Count the haemangiomas", "hemangioma"),
        ("Are there naevi?", "naevus"),
        ("Which vertebrae are fractured?", "vertebra"),
        ("The disk of the optic nerve?", "optic disc"),
        ("Which organ is it?", "organ"),
    ],
)
def test_a_category_is_named_in_any_spelling_order_and_number(text: str, category: str) -> None:
    assert names_outright(text, category)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("Which left-sided organ filters blood?", "left kidney"),
        ("What could the baby be delivered through?", "liver"),
        ("Which gland makes cortisol?", "adrenal gland"),
        ("Which structure carries blood?", "glandular structure"),
        ("Which cavity drives blood toward the lungs?", "right heart ventricle"),
        ("", "liver"),
        ("What is it?", ""),
    ],
)
def test_a_category_that_is_only_hinted_at_is_not_named(text: str, category: str) -> None:
    assert not names_outright(text, category)
