"""Writes the six class notebooks of Stage 2 from their one template: `make notebooks`.

Edit `03_stage2.template.ipynb`, never the six.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # works before anything is installed

from stgan_utils.lesions import LESIONS, MINORITY  # noqa: E402

TEMPLATE = HERE / "03_stage2.template.ipynb"


def render(template, code):
    """The template's text with `{{CODE}}`, `{{NAME}}`, `{{NOTE}}` and `{{LOOK_FOR}}` of one class filled in.

    Raises:
        ValueError: the template names something else.
    """
    lesion = LESIONS[code]
    values = {"CODE": lesion.code, "NAME": lesion.name, "NOTE": lesion.note, "LOOK_FOR": lesion.look_for}
    unknown = set(re.findall(r"\{\{([A-Z_]+)\}\}", template)) - set(values)
    if unknown:
        raise ValueError(f"{TEMPLATE.name} has places that nothing fills: {', '.join(sorted(unknown))}.")
    for name, value in values.items():
        # The template is JSON text, so the value goes in as JSON writes it, without the quotes.
        template = template.replace(f"{{{{{name}}}}}", json.dumps(value, ensure_ascii=False)[1:-1])
    return template


def path_of(code):
    return HERE / f"03_stage2_{code}.ipynb"


if __name__ == "__main__":
    for code in MINORITY:
        path_of(code).write_text(render(TEMPLATE.read_text(encoding="utf-8"), code), encoding="utf-8")
        print(path_of(code).relative_to(HERE.parent))
