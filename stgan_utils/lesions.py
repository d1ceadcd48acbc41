"""The seven classes of HAM10000, in the one order that the whole project uses.

Every artifact that speaks of classes carries this order inside it, and whoever loads an artifact reads the order from
there: the prior system lost 58 points of accuracy to two orders that met.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lesion:
    """What is known of one class; `dx` is its code in HAM10000's metadata, `colour` its colour in every figure."""

    code: str
    dx: str
    name: str
    colour: str
    note: str
    look_for: str


LESIONS = {
    lesion.code: lesion
    for lesion in (
        Lesion(
            "AKIEC",
            "akiec",
            "actinic keratosis / Bowen's disease",
            "#0072B2",
            "Early, non-invasive forms of squamous cell carcinoma on sun-damaged skin. They can turn invasive, so "
            "missing them matters.",
            "a pink to red rough surface, white-yellow scale, dotted or glomerular vessels, a 'strawberry' pattern on "
            "the face; usually no pigment network",
        ),
        Lesion(
            "BCC",
            "bcc",
            "basal cell carcinoma",
            "#E69F00",
            "The most common skin cancer. It grows slowly and rarely spreads, but destroys the tissue around it.",
            "sharp branching (arborising) vessels, blue-grey ovoid nests, leaf-like areas at the edge, small ulcers, "
            "shiny white lines; no pigment network",
        ),
        Lesion(
            "BKL",
            "bkl",
            "benign keratosis (seborrhoeic, solar lentigo, lichen planus-like)",
            "#009E73",
            "Harmless growths of the upper skin. They matter because some look like melanoma.",
            "a sharp, 'moth-eaten' border, milia-like white cysts, comedo-like openings, ridges as on a brain, fine "
            "grey dots in the lichen planus-like form",
        ),
        Lesion(
            "DF",
            "df",
            "dermatofibroma",
            "#CC79A7",
            "A harmless, firm nodule of fibrous tissue, often on the legs and after a small injury.",
            "a white scar-like patch in the middle with a delicate, light-brown network around it; symmetric, without "
            "a sharp edge",
        ),
        Lesion(
            "MEL",
            "mel",
            "melanoma",
            "#D55E00",
            "The dangerous one: it spreads early, and it is usually curable if excised early.",
            "asymmetry in colour and structure, an atypical network, irregular streaks, dots and globules, a "
            "blue-white veil, several colours, a ragged border",
        ),
        Lesion(
            "NV",
            "nv",
            "melanocytic naevus (mole)",
            "#56B4E9",
            "A harmless mole; two thirds of HAM10000. It is the majority class and gets no GAN of its own.",
            "symmetry, one or two even browns, a regular network that fades to the edge or evenly spread globules",
        ),
        Lesion(
            "VASC",
            "vasc",
            "vascular lesion (angioma, angiokeratoma, haemorrhage)",
            "#7F3C8D",
            "Growths of blood vessels and bleeding in the skin; harmless, but dark ones are taken for melanoma.",
            "red, purple or blue-black round lacunae with sharp edges, an even red-blue colour; no network",
        ),
    )
}

CLASSES = tuple(LESIONS)
MAJORITY = "NV"
MINORITY = tuple(code for code in CLASSES if code != MAJORITY)

# The order in which the prior system's classifier was trained (its CSV's columns); only the post-mortem uses it.
PRIOR_TRAINING_ORDER = ("NV", "MEL", "BKL", "BCC", "AKIEC", "VASC", "DF")
