"""Normalisation of category, super-category and modality names.

Only spelling is unified: case, white space, underscores, plurals of words in the table, British and American forms, and
known errors in the released data. Different structures stay distinct ("kidney" and "left kidney"). Normalising a name
twice changes nothing.
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
    # A spelling error in the released data.
    "public symphysis": "pubic symphysis",
    # The veterinary name, which the released abdominal CT rows use.
    "postcava": "inferior vena cava",
    "ivc": "inferior vena cava",
}

# Words of a category that say where a structure lies or of which kind it is, without identifying it.
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

# Plural endings and their singular; the first match applies, so longer endings come first. An ending that maps to
# itself is not a plural ("pelvis", "abscess", "humerus").
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
    """Normalise the name of a category or super-category. None and blank text become "unknown"."""
    words = _spaced(name).split()
    text = " ".join(_WORDS.get(word, word) for word in words)
    return _PHRASES.get(text, text) or UNKNOWN


def modality_name(name: object) -> str:
    """Normalise the name of a modality: its family, followed by sequence or phase after dashes ("MRI-T1-Gd").

    None and blank text become "unknown". A modality that is not in the table keeps its name.
    """
    text = _spaced(name)
    family, rest = _split_family(text)
    parts = [_SEQUENCES.get(part, part) for part in rest.replace("-", " ").split()]
    return "-".join([family, *parts]) if family else text or UNKNOWN


def modality_family(name: object) -> str:
    """The modality without sequence or phase: "MRI" for "MRI-T1-Gd", "X-ray" for "X-Ray"."""
    return _split_family(_spaced(name))[0] or modality_name(name)


def category_matches(name: str, wanted: str) -> bool:
    """Whether two spellings name the same category or super-category."""
    return category_name(wanted) == category_name(name)


def names_outright(text: str, category: str) -> bool:
    """Whether a text names a category explicitly, that is, contains all of its words in any order, spelling or number.

    Words that only state a location or a kind are ignored: "the kidneys" names "left kidney", but "the left-sided
    organ" does not.
    """
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
    # The digraphs ae and oe are British ("anaemia", "oedema").
    return (word.removesuffix(ending) + bare).replace("ae", "e").replace("oe", "e")


def modality_matches(name: str, wanted: str) -> bool:
    """Whether a row's modality matches the wanted one. A family matches all of its sequences."""
    return modality_name(wanted) in (modality_name(name), modality_family(name))


def _spaced(name: object) -> str:
    return " ".join(str("" if name is None else name).replace("_", " ").casefold().split())


def _split_family(text: str) -> tuple[str, str]:
    for spelling, family in _FAMILIES.items():
        rest = text.removeprefix(spelling)
        if rest != text and rest[:1] in ("", " ", "-"):
            return family, rest
    return "", text
