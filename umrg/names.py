"""Names of categories, super-categories and modalities, normalised: spellings of one thing become one.

Spelling only: case, white space, underscores, the plural of words in the table, British and American forms,
and known slips of the released data. Different things stay apart ("kidney" and "left kidney"). All functions
are idempotent.
"""

import re

UNKNOWN = "unknown"

_WORDS = {
    "arteries": "artery",
    "bones": "bone",
    "covid": "COVID-19",
    "covid-19": "COVID-19",
    "covid19": "COVID-19",
    "cysts": "cyst",
    "disk": "disc",
    "foetal": "fetal",
    "glands": "gland",
    "gliomas": "glioma",
    "haemorrhage": "hemorrhage",
    "infections": "infection",
    "instruments": "instrument",
    "kidneys": "kidney",
    "lesions": "lesion",
    "lungs": "lung",
    "masses": "mass",
    "melanomas": "melanoma",
    "neoplasms": "neoplasm",
    "nodules": "nodule",
    "nuclei": "nucleus",
    "oedema": "edema",
    "oesophagus": "esophagus",
    "opacities": "opacity",
    "organs": "organ",
    "polyps": "polyp",
    "structures": "structure",
    "tumors": "tumor",
    "tumour": "tumor",
    "tumours": "tumor",
    "veins": "vein",
    "ventricles": "ventricle",
    "vessels": "vessel",
}

_PHRASES = {
    "public symphysis": "pubic symphysis",
    # The veterinary name, which the released abdominal CT rows use.
    "postcava": "inferior vena cava",
    "ivc": "inferior vena cava",
}

# Words of a category that do not give away what is meant.
_PLACES = {
    "anterior",
    "inferior",
    "inner",
    "lateral",
    "left",
    "lower",
    "medial",
    "middle",
    "outer",
    "posterior",
    "right",
}
_PLACES |= {"superior", "upper"}
_KINDS = {"area", "organ", "part", "region", "structure", "the", "tissue"}

# Of the plural and of British spelling, longest first; what becomes itself is no plural.
_ENDINGS = (("sses", "ss"), ("ies", "y"), ("ae", "a"), ("is", "is"), ("ss", "ss"), ("us", "us"), ("i", "us"), ("s", ""))

_FAMILIES = {
    "computed tomography": "CT",
    "ct": "CT",
    "magnetic resonance imaging": "MRI",
    "mri": "MRI",
    "mr": "MRI",
    "radiography": "X-ray",
    "radiograph": "X-ray",
    "x-ray": "X-ray",
    "x ray": "X-ray",
    "xray": "X-ray",
    "ultrasonography": "ultrasound",
    "ultrasound": "ultrasound",
    "us": "ultrasound",
    "endoscopy": "endoscopy",
    "fundus photography": "fundus",
    "fundus": "fundus",
    "histopathology": "pathology",
    "pathology": "pathology",
    "dermatoscopy": "dermoscopy",
    "dermoscopy": "dermoscopy",
    "mammography": "mammography",
    "mammogram": "mammography",
    "optical coherence tomography": "OCT",
    "oct": "OCT",
}

_SEQUENCES = {
    "adc": "ADC",
    "dwi": "DWI",
    "flair": "FLAIR",
    "gd": "Gd",
    "pd": "PD",
    "t1": "T1",
    "t1c": "T1c",
    "t2": "T2",
}


def category_name(name: object) -> str:
    """A category's or super-category's normalised name; "unknown" for None and for blank text."""
    words = _spaced(name).split()
    text = " ".join(_WORDS.get(word, word) for word in words)
    return _PHRASES.get(text, text) or UNKNOWN


def modality_name(name: object) -> str:
    """A modality's normalised name: the family, and after dashes what the data adds to it ("MRI-T1-Gd").

    "unknown" for None and for blank text; a modality that the table does not have keeps its name.
    """
    text = _spaced(name)
    family, rest = _split_family(text)
    parts = [_SEQUENCES.get(part, part) for part in rest.replace("-", " ").split()]
    return "-".join([family, *parts]) if family else text or UNKNOWN


def modality_family(name: object) -> str:
    """The modality without its sequence or phase: "MRI" for "MRI-T1-Gd", "X-ray" for "X-Ray"."""
    return _split_family(_spaced(name))[0] or modality_name(name)


def category_matches(name: str, wanted: str) -> bool:
    """Whether a row's category or super-category is the wanted one, in any spelling."""
    return category_name(wanted) == category_name(name)


def names_outright(text: str, category: str) -> bool:
    """Whether a text names a category: all its words occur, in any order, spelling and number, except those that only
    say where it lies or that it is an organ or a structure ("left kidney" is named by "the kidneys", but not by
    "the left-sided organ")."""
    wanted = _bare_words(category)
    return bool(wanted) and (wanted - _PLACES - _KINDS or wanted) <= _bare_words(text)


def _bare_words(text: str) -> set[str]:
    words = (_WORDS.get(word, word) for word in re.findall(r"[^\W_]+", text.casefold()))
    joined = f" {' '.join(words)} "
    for phrase, standard in _PHRASES.items():
        joined = joined.replace(f" {phrase} ", f" {standard} ")
    return {_singular(word) for word in re.findall(r"[^\W_]+", joined.casefold())}


def _singular(word: str) -> str:
    ending, bare = next((pair for pair in _ENDINGS if len(word) > 3 and word.endswith(pair[0])), ("", ""))
    return (word.removesuffix(ending) + bare).replace("ae", "e").replace("oe", "e")


def modality_matches(name: str, wanted: str) -> bool:
    """Whether a row's modality is the wanted one. A family matches its sequences, a sequence itself."""
    return modality_name(wanted) in (modality_name(name), modality_family(name))


def _spaced(name: object) -> str:
    return " ".join(str("" if name is None else name).replace("_", " ").casefold().split())


def _split_family(text: str) -> tuple[str, str]:
    for spelling, family in _FAMILIES.items():
        rest = text.removeprefix(spelling)
        if rest != text and rest[:1] in ("", " ", "-"):
            return family, rest
    return "", text
