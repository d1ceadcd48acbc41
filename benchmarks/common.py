"""What the benchmarks share: their page of results."""

import os
import platform
import re
import shlex
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
# As Linux calls them; what a network's step takes depends on them more than on anything else about a processor.
INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}


def write_section(title, body, packages):
    """Put a section into RESULTS.md, in place of the one of that title, or at the end; the others stay as they are.

    Args:
        title: heading of the section.
        body: Markdown below it; the machine, the versions and the command are added here.
        packages: names of the installed packages whose versions the figures depend on.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    section = (
        f"## {title}\n\n{body.strip()}\n\n"
        f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; {date.today()}.\n"
        f"Command: `{shlex.join(['python', *sys.argv])}`\n"
    )
    page = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    head, *others = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    titles = [other.splitlines()[0] for other in others]
    if f"## {title}" in titles:
        others[titles.index(f"## {title}")] = section
    else:
        others.append(section)
    RESULTS.write_text("\n".join(part.strip() + "\n" for part in (head, *others)))


def processor():
    """The processor's name and the widest instructions that it has, such as "AMD EPYC (AVX2)"."""
    info = Path("/proc/cpuinfo")
    said = info.read_text() if info.exists() else ""
    names = re.findall(r"model name\s*: (.*)", said) or [platform.processor() or platform.machine()]
    widest = next((name for flag, name in INSTRUCTIONS.items() if re.search(rf"\b{flag}\b", said)), "")
    return names[0] + (f" ({widest})" if widest else "")
